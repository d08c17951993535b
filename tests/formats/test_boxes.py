"""Boxes cover a tensor or do not, and share elements or do not, as painting each element tells."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from distckpt.formats.boxes import Ints, are_whole, cells, corners, fault, grid_of, overlaps
from distckpt.progressions import condensed

Shape = tuple[int, ...]
Box = tuple[Shape, Shape]  # offsets, and sizes

PINWHEEL: list[Box] = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]


def rows(boxes: list[Box], dims: int) -> tuple[Ints, Ints]:
    offsets, sizes = ([box[at] for box in boxes] for at in (0, 1))
    return tuple(np.array(one, dtype=np.int64).reshape(len(boxes), dims) for one in (offsets, sizes))


def elements(box: Box) -> set[Shape]:
    return set(product(*(range(begin, begin + size) for begin, size in zip(*box, strict=True))))


def is_painted_once(shape: Shape, boxes: list[Box]) -> bool:
    """By looking at each element."""
    if 0 in shape:
        return boxes == [((0,) * len(shape), shape)]
    painted = [element for box in boxes for element in elements(box)]
    return all(map(elements, boxes)) and sorted(painted) == sorted(product(*map(range, shape)))


def assert_judged(shape: Shape, boxes: list[Box]) -> None:
    told = fault(shape, *rows(boxes, len(shape)))
    assert (told == "") == is_painted_once(shape, boxes), told


def grid(shape: Shape, cuts: list[set[int]]) -> list[Box]:
    ranges = [
        [*pairwise(sorted({0, extent} | {cut for cut in of if cut < extent}))]
        for extent, of in zip(shape, cuts, strict=True)
    ]
    return [(tuple(low for low, _ in cell), tuple(high - low for low, high in cell)) for cell in product(*ranges)]


@st.composite
def grids(draw: st.DrawFn) -> tuple[Shape, list[Box]]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    return shape, grid(shape, [draw(st.sets(st.integers(1, 4), max_size=3)) for _ in shape])


def halved(draw: st.DrawFn, box: Box, depth: int) -> list[Box]:
    """The box in two, each of which may be cut elsewhere: as a rule no grid."""
    offsets, sizes = box
    dims = [dim for dim, size in enumerate(sizes) if size > 1]
    if not depth or not dims or not draw(st.booleans()):
        return [box]
    dim = draw(st.sampled_from(dims))
    cut = draw(st.integers(1, sizes[dim] - 1))
    first = *sizes[:dim], cut, *sizes[dim + 1 :]
    second = *sizes[:dim], sizes[dim] - cut, *sizes[dim + 1 :]
    behind = *offsets[:dim], offsets[dim] + cut, *offsets[dim + 1 :]
    return halved(draw, (offsets, first), depth - 1) + halved(draw, (behind, second), depth - 1)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[Shape, list[Box]]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    return shape, halved(draw, ((0,) * len(shape), shape), 4)


covers = st.one_of(grids(), tilings(), st.just(((3, 3), PINWHEEL)))


@given(covers, st.randoms())
def test_boxes_that_hold_each_element_once_are_whole_in_any_order(cover, random):
    shape, boxes = cover[0], [*cover[1]]
    random.shuffle(boxes)
    assert fault(shape, *rows(boxes, len(shape))) == ""


@st.composite
def spoilt(draw: st.DrawFn) -> tuple[Shape, list[Box]]:
    """A cover in which a number was changed, a box lost, told twice, or put in the place of another."""
    shape, boxes = draw(covers.map(lambda cover: (cover[0], [*cover[1]])))
    at = draw(st.integers(0, len(boxes) - 1))
    what = draw(st.sampled_from(["number", "lost", "twice", "replaced"]))
    if what == "number":
        box = [[*boxes[at][0]], [*boxes[at][1]]]
        box[draw(st.integers(0, 1))][draw(st.integers(0, len(shape) - 1))] += draw(st.sampled_from([-1, 1]))
        boxes[at] = (tuple(box[0]), tuple(box[1]))
    elif what == "lost":
        del boxes[at]
    elif what == "twice":
        boxes.append(boxes[at])
    else:
        boxes[at] = boxes[draw(st.integers(0, len(boxes) - 1))]
    return shape, boxes


@given(spoilt())
def test_boxes_that_are_not_whole_are_found(case):
    assume(not is_painted_once(*case))
    assert_judged(*case)


@given(st.data())
@example(None)
def test_any_boxes_are_judged_as_painting_them_does(data):
    if data is None:
        return assert_judged((3, 3), PINWHEEL)
    shape = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    numbers = st.tuples(*[st.integers(-1, 3)] * len(shape))
    return assert_judged(shape, data.draw(st.lists(st.tuples(numbers, numbers), max_size=4)))


@pytest.mark.parametrize(
    "shape, boxes, words",
    [
        ((4, 2), [((0, 0), (1, 2)), ((2, 0), (2, 2))], "2 of its 8 elements are missing"),
        ((4, 2), [], "8 of its 8 elements are missing"),
        ((4, 2), [((0, 0), (3, 2)), ((2, 0), (2, 2))], "parts of it overlap"),
        ((4, 2), [((0, 0), (2, 2)), ((1, 0), (2, 2))], "parts of it overlap"),
        ((4, 2), [((0, 0), (2, 2)), ((3, 0), (2, 2))], "a part of it lies outside of it, or is empty"),
        ((4, 2), [((0, 0), (4, 2)), ((4, 0), (0, 2))], "a part of it lies outside of it, or is empty"),
        ((4, 2), [((-1, 0), (1, 2)), ((0, 0), (4, 2))], "a part of it lies outside of it, or is empty"),
        ((), [], "it is in 0 parts, and should be in one"),
        ((), [((), ()), ((), ())], "it is in 2 parts, and should be in one"),
        ((0, 3), [((0, 0), (0, 3)), ((0, 0), (0, 3))], "it is in 2 parts, and should be in one"),
        ((0, 3), [], "it is in 0 parts, and should be in one"),
    ],
)
def test_it_is_said_what_is_wrong(shape, boxes, words):
    assert fault(shape, *rows(boxes, len(shape))) == words


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0)])
def test_what_has_no_elements_or_one_is_whole_in_one_box(shape):
    whole = ((0,) * len(shape), shape)
    assert fault(shape, *rows([whole], len(shape))) == ""
    if shape:
        assert fault(shape, *rows([(whole[0], tuple(size + 1 for size in shape))], len(shape)))


def test_numbers_that_are_beyond_all_bounds_are_outside():
    most = np.iinfo(np.int64).max
    for box in (((most,), (1,)), ((1,), (most,)), ((most,), (most,)), ((-most,), (most,)), ((0,), (-most,))):
        assert "outside" in fault((4,), *rows([box], 1))


def test_so_many_boxes_that_their_elements_are_more_than_can_be_counted_overlap():
    extent = 1 << 58  # and 65 times that is as much again, counted in 64 bits
    boxes = [((0,), (extent,))] * 65
    assert fault((extent,), *rows(boxes, 1)) == "parts of it overlap"


@pytest.mark.parametrize("is_moved", [False, True])
def test_thousands_of_boxes_that_make_no_grid_are_compared_without_each_with_each(is_moved):
    count = 100_000  # of rows, each cut elsewhere
    cuts = np.random.default_rng(0).integers(2, 60, count)
    at, nothing, one = np.arange(count), np.zeros(count, dtype=np.int64), np.ones(count, dtype=np.int64)
    offsets = np.concatenate([np.stack([at, nothing], 1), np.stack([at, cuts], 1)])
    sizes = np.concatenate([np.stack([one, cuts], 1), np.stack([one, 64 - cuts], 1)])
    if is_moved:
        offsets[count + 7, 1] -= 1
    assert fault((count, 64), offsets, sizes) == ("parts of it overlap" if is_moved else "")


@given(st.data())
def test_what_boxes_share_with_one_is_what_is_in_both(data):
    dims = data.draw(st.integers(1, 3))
    box = st.tuples(st.tuples(*[st.integers(0, 4)] * dims), st.tuples(*[st.integers(0, 4)] * dims))
    mine, boxes = data.draw(box), data.draw(st.lists(box, max_size=5))
    found, low, high = overlaps(*mine, *rows(boxes, dims))
    shared = {nth: both for nth, one in enumerate(boxes) if (both := elements(one) & elements(mine))}
    told = {
        int(nth): elements((tuple(begin.tolist()), tuple((end - begin).tolist())))
        for nth, begin, end in zip(found, low, high, strict=True)
    }
    assert told == shared


def test_numbers_without_dimensions_share_their_element():
    found, low, high = overlaps((), (), *rows([((), ())], 0))
    assert found.tolist() == [0] and low.shape == high.shape == (1, 0)


def in_order(shape: Shape, boxes: list[Box]) -> tuple[Ints, Ints]:
    offsets, sizes = rows(boxes, len(shape))
    order = np.argsort(corners(shape, offsets), kind="stable")
    return offsets[order], sizes[order]


@given(st.lists(st.one_of(covers, spoilt()), min_size=1, max_size=4).map(lambda of: [one for one in of if one[1]]))
def test_of_many_tensors_those_are_whole_that_are_and_grids_all_are_known_to_be(many):
    for dims in {len(shape) for shape, _ in many}:
        mine = [one for one in many if len(one[0]) == dims]
        parts = [in_order(*one) for one in mine]
        counts = [len(boxes) for _, boxes in mine]
        is_first = np.concatenate([np.arange(count) == 0 for count in counts])
        wholes = np.repeat([shape for shape, _ in mine], counts, axis=0)
        offsets, sizes = (np.concatenate([part[at] for part in parts]) for at in (0, 1))
        told = are_whole(wholes, offsets, sizes, is_first).tolist()
        assert len(told) == len(mine)
        for is_known, (shape, boxes), part in zip(told, mine, parts, strict=True):
            assert not is_known or is_painted_once(shape, boxes)
            assert is_known or not is_painted_once(shape, boxes) or grid_of(*part) is None


@given(covers)
def test_cells_of_a_grid_are_known_as_one_and_made_from_it_again(cover):
    shape, boxes = cover
    offsets, sizes = in_order(shape, boxes)
    starts = grid_of(offsets, sizes)
    cuts = [sorted({box[0][dim] for box in boxes}) for dim in range(len(shape))]
    is_grid = sorted(boxes) == sorted(grid(shape, [set(cut) for cut in cuts]))
    assert (starts is not None) == is_grid
    if starts is not None:
        assert starts == tuple(map(condensed, cuts))
        made = cells(shape, starts)
        assert (made[0] == offsets).all() and (made[1] == sizes).all()


def test_a_number_is_a_grid_of_one_cell():
    offsets, sizes = cells((), ())
    assert offsets.shape == sizes.shape == (1, 0) and grid_of(offsets, sizes) == ()


@pytest.mark.parametrize(
    "boxes",
    [
        [((0,), (2,)), ((2,), (0,)), ((2,), (2,))],
        [((0,), (3,)), ((3,), (-1,)), ((2,), (2,))],
        [((0,), (6,)), ((6,), (-2,))],
        [((0,), (3,))],
        [((1,), (3,))],
    ],
)
def test_boxes_that_only_follow_each_other_are_not_whole(boxes):
    offsets, sizes = rows(boxes, 1)
    is_first = np.arange(len(boxes)) == 0
    assert are_whole(np.full_like(offsets, 4), offsets, sizes, is_first).tolist() == [False]

"""What a box of a tensor consists of is found, however the tensor was cut, and is all of it."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.chunks import Chunks, Grid
from distckpt.formats.tiling import tiling_of
from distckpt.progressions import condensed

Shape = tuple[int, ...]


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
    starts = tuple(condensed(sorted({0} | draw(st.sets(st.integers(0, extent - 1), max_size=8)))) for extent in shape)
    files = tuple(f"file-{nth}" for nth in range(math.prod(map(len, starts))))
    return Grid(files, shape, starts)


@st.composite
def boxes_in(draw: st.DrawFn, shape: Shape) -> tuple[Shape, Shape]:
    """Offsets and sizes."""
    offsets = tuple(draw(st.integers(0, extent - 1)) for extent in shape)
    return offsets, tuple(draw(st.integers(1, extent - begin)) for begin, extent in zip(offsets, shape, strict=True))


def slices(offsets: Shape, sizes: Shape) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))


def chunks_of(grid: Grid) -> dict[str, np.ndarray]:
    """The chunks, by file, of a tensor whose elements are numbered."""
    whole, dims = np.arange(math.prod(grid.shape)).reshape(grid.shape), len(grid.shape)
    places = [slice(nth * dims, (nth + 1) * dims) for nth in range(len(grid.files))]
    return {file: whole[slices(grid.offsets[at], grid.sizes[at])] for file, at in zip(grid.files, places, strict=True)}


@given(st.data())
def test_what_is_read_of_the_chunks_is_the_box(data):
    grid = data.draw(grids())
    offsets, sizes = data.draw(boxes_in(grid.shape))
    whole = np.arange(math.prod(grid.shape)).reshape(grid.shape)
    for chunks in (grid, Chunks(grid.files, grid.offsets, grid.sizes)):
        read = np.full(sizes, -1)
        held = chunks_of(grid)
        for one in tiling_of(grid.shape, chunks).overlaps(offsets, sizes):
            assert held[grid.files[one.nth]].shape == one.sizes and 0 not in one.shared
            target = slices(one.begins, one.shared)
            assert (read[target] == -1).all(), "nothing is read twice"
            read[target] = held[grid.files[one.nth]][slices(one.low, one.shared)]
        assert np.array_equal(read, whole[slices(offsets, sizes)])


def test_a_tensor_in_one_file_is_one_chunk():
    (one,) = tiling_of((4, 5), None).overlaps((1, 2), (2, 3))
    assert one == (0, (4, 5), (1, 2), (0, 0), (2, 3))
    (one,) = tiling_of((), None).overlaps((), ())
    assert one == (0, (), (), (), ())


@pytest.mark.parametrize("chunks", [None, Grid(("a", "b"), (4, 2), (range(0, 4, 2), range(1)))])
def test_an_empty_box_consists_of_nothing(chunks):
    assert tiling_of((4, 2), chunks).overlaps((2, 0), (0, 2)) == []


def test_chunks_that_make_no_grid_are_found_too():
    chunks = Chunks(tuple("abcde"), (0, 0, 0, 2, 1, 0, 1, 1, 2, 1), (1, 2, 2, 1, 2, 1, 1, 1, 1, 2))
    tiling = tiling_of((3, 3), chunks)
    assert {one.nth for one in tiling.overlaps((0, 0), (3, 3))} == {*range(5)}
    for row, column in product(range(3), repeat=2):
        assert len(tiling.overlaps((row, column), (1, 1))) == 1


@pytest.mark.parametrize(
    "chunks, words",
    [
        (Chunks(("a",), (0,), (3,)), "1 of its 4 elements are missing"),
        (Chunks(("a", "b"), (0, 1), (3, 1)), "overlap"),
        (Chunks(("a",), (1,), (4,)), "outside"),
        (Chunks(("a",), (1 << 80,), (4,)), "outside"),
        (Grid(("a", "b"), (6,), (range(0, 6, 3),)), "of one of shape"),
    ],
)
def test_what_is_not_whole_is_refused(chunks, words):
    with pytest.raises(ValueError, match=words):
        tiling_of((4,), chunks)

"""A rank's boxes hold what torch gave it: for every rank of a mesh, however a tensor was cut."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from distckpt.formats.shards import boxes_at, boxes_of, is_spread, local_of, narrowed, view_of
from distckpt.formats.spread import Box

Mesh = tuple[int, ...]


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def by_torch(whole: Tensor, mesh: Mesh, at: Mesh, placements: list[Placement]) -> Tensor:
    """What the rank there has of it, by torch's own splitting."""
    for number, nth, placement in zip(mesh, at, placements, strict=True):
        if not isinstance(placement, Replicate):
            whole = placement._split_tensor(whole, number, with_padding=False)[0][nth]
    return whole


def by_fsdp(inner: Tensor, number: int, at: int) -> Tensor:
    """What FSDP2 leaves a rank of what it had already."""
    return [*torch.chunk(inner, number), *[inner[:0]] * number][at]


def assert_held(whole: Tensor, local: Tensor, boxes: list[Box]) -> None:
    """The boxes are all that is here, each once, and what lies there in the whole."""
    seen = torch.zeros(local.shape, dtype=torch.int64)
    for box in boxes:
        view = narrowed(local, box.begins, box.sizes)
        there = whole[tuple(slice(begin, begin + size) for begin, size in zip(box.offsets, box.sizes, strict=True))]
        assert torch.equal(view, there)
        narrowed(seen, box.begins, box.sizes).add_(1)
    assert bool((seen == 1).all())


def coordinates(mesh: Mesh) -> list[Mesh]:
    return list(product(*map(range, mesh)))


@st.composite
def placed(draw: st.DrawFn) -> tuple[tuple[int, ...], Mesh, list[Placement]]:
    shape = tuple(draw(st.lists(st.integers(1, 13), min_size=1, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    dims = st.integers(0, len(shape) - 1)
    kinds = st.one_of(
        st.builds(Shard, dims),
        st.just(Replicate()),
        st.builds(lambda dim, factor: _StridedShard(dim, split_factor=factor), dims, st.integers(1, 4)),
    )
    return shape, mesh, [draw(kinds) for _ in mesh]


@given(placed())
@example(((8,), (2,), [_StridedShard(0, split_factor=2)]))
@example(((2, 4), (4,), [Shard(0)]))
@example(((13,), (4, 3), [Shard(0), Shard(0)]))
@example(((10, 4), (2, 2), [_StridedShard(0, split_factor=2), Shard(0)]))
@example(((10, 4), (2, 2), [Shard(0), _StridedShard(1, split_factor=3)]))
def test_the_boxes_of_every_rank_hold_what_torch_gives_it(case):
    shape, mesh, placements = case
    whole = numbered(shape)
    for at in coordinates(mesh):
        boxes = boxes_at(shape, mesh, at, placements, is_left_to_right=True)
        assert_held(whole, by_torch(whole, mesh, at, placements), boxes)


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5))
@example(27, 3, 4)  # where a rank has one row of either, and not the same one
def test_what_fsdp_cuts_again_is_held_as_fsdp_has_it(rows, data_ranks, tensor_ranks):
    whole = numbered((rows, 2))
    placements = [_StridedShard(0, split_factor=tensor_ranks), Shard(0)]
    for at in coordinates((data_ranks, tensor_ranks)):
        inner = by_torch(whole, (tensor_ranks,), at[1:], [Shard(0)])
        boxes = boxes_at((rows, 2), (data_ranks, tensor_ranks), at, placements)
        assert_held(whole, by_fsdp(inner, data_ranks, at[0]), boxes)
        assert len(boxes) <= 1


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_what_fsdp_cuts_a_third_time_is_held_as_fsdp_has_it(rows, data_ranks, expert_ranks, tensor_ranks):
    whole = numbered((rows,))
    factors = expert_ranks * tensor_ranks, tensor_ranks
    placements = [*(_StridedShard(0, split_factor=factor) for factor in factors), Shard(0)]
    mesh = (data_ranks, expert_ranks, tensor_ranks)
    for at in coordinates(mesh):
        inner = by_torch(whole, (tensor_ranks,), at[2:], [Shard(0)])
        inner = by_torch(inner, (expert_ranks,), at[1:2], [Shard(0)])
        assert_held(whole, by_fsdp(inner, data_ranks, at[0]), boxes_at((rows,), mesh, at, placements))


@given(placed())
def test_where_pieces_are_even_both_orders_give_the_same(case):
    shape, mesh, placements = case
    factors = [int(getattr(placement, "split_factor", 1)) for placement in placements]
    even = tuple(extent * torch.Size(mesh).numel() * torch.Size(factors).numel() for extent in shape)
    for at in coordinates(mesh):
        told = boxes_at(even, mesh, at, placements, is_left_to_right=True)
        assert sorted(boxes_at(even, mesh, at, placements)) == sorted(told)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
def test_of_a_tensor_without_elements_the_first_rank_has_all(shape):
    held = {at: boxes_at(shape, (2, 2), at, [Shard(0), Replicate()]) for at in coordinates((2, 2))}
    assert {at: len(boxes) for at, boxes in held.items()} == {(0, 0): 1, (0, 1): 0, (1, 0): 0, (1, 1): 0}
    assert held[0, 0][0].sizes == shape


def test_a_number_lies_whole_on_every_rank():
    assert boxes_at((), (3,), (2,), [Replicate()]) == (Box((), (), ()),)


def test_a_sum_that_nobody_has_worked_out_is_refused():
    with pytest.raises(TypeError, match=r"P\(sum\).*redistribute"):
        boxes_at((4,), (2,), (0,), [Partial()])


def test_a_tensor_that_is_not_spread_is_one_box_of_its_own_memory():
    tensor = numbered((3, 4))
    (box,) = boxes_of(tensor)
    assert box == Box((0, 0), (3, 4), (0, 0)) and not is_spread(tensor)
    assert view_of(tensor, box).data_ptr() == tensor.data_ptr()


def test_a_narrowed_tensor_is_the_same_memory():
    tensor = numbered((3, 4))
    narrowed(tensor, (1, 2), (2, 1)).zero_()
    assert tensor.tolist() == [[0, 1, 2, 3], [4, 5, 0, 7], [8, 9, 0, 11]]


def test_a_box_in_the_middle_of_nothing_is_a_view():
    assert narrowed(torch.empty(0, 2), (0, 0), (0, 4)).shape == (0, 4)


def test_the_time_does_not_grow_with_the_number_of_ranks():
    (box,) = boxes_at((1 << 40, 2), (1 << 30,), ((1 << 30) - 1,), [Shard(0)])
    assert box == Box(((1 << 40) - (1 << 10), 0), (1 << 10, 2), (0, 0))


def _held(rank: int) -> list[list[int]]:
    """FSDP2 over rows that two tensor-parallel ranks have 4 and 3 of: torch tells the seventh of the wrong rank."""
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("data", "tensor"))
    layer = nn.Linear(2, 7, bias=False)
    with torch.no_grad():
        layer.weight.copy_(numbered((7, 2)))
    fully_shard(parallelize_module(layer, mesh["tensor"], ColwiseParallel()), mesh=mesh["data"])
    whole = numbered((7, 2)).to(torch.float32)
    assert_held(whole, local_of(layer.weight.detach()), boxes_of(layer.weight))
    return [row for box in boxes_of(layer.weight) for row in view_of(layer.weight.detach(), box)[:, 0].tolist()]


def test_uneven_rows_of_fsdp_and_tensor_parallel_ranks_are_told_of_who_has_them(run_ranks):
    assert sorted(sum(run_ranks(6, _held), [])) == [0, 2, 4, 6, 8, 10, 12]


def _distributed(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for shape, placement in [((5, 3), Shard(0)), ((1, 3), Shard(0)), ((4, 3), Shard(1)), ((0, 4), Shard(1))]:
        whole = numbered(shape)
        tensor = distribute_tensor(whole, mesh, [placement])
        boxes = boxes_of(tensor)
        assert is_spread(tensor)
        assert all(view_of(tensor, box).shape == box.sizes for box in boxes)
        if 0 not in shape:
            assert_held(whole, local_of(tensor), boxes)
    other = DTensor.from_local(torch.zeros(3, 3), mesh, [Shard(0)], run_check=False, shape=(5, 3), stride=(3, 1))
    if rank == 1:  # of five rows it should have two
        with pytest.raises(TypeError, match=r"has the shape \(3, 3\).*of \(5, 3\)"):
            boxes_of(other)


def test_what_is_not_cut_as_its_placements_say_is_refused(run_ranks):
    run_ranks(2, _distributed)


def _outside(rank: int) -> int:
    mesh = DeviceMesh("cpu", [0, 1])
    return len(boxes_of(distribute_tensor(numbered((4,)), mesh, [Shard(0)])))


def test_a_rank_outside_of_the_mesh_has_no_box(run_ranks):
    assert run_ranks(3, _outside) == [1, 1, 0]

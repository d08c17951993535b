"""What a rank tells of what it holds is what the leader reads, and takes few bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from distckpt.formats.held import Holding, Kind, Rows, Told, pack_numbers, unpack_numbers
from distckpt.formats.safetensors_file import DTYPES
from distckpt.formats.spread import Box
from distckpt.manifest import digest


def told_by(holding: Holding, *, is_schema_told: bool = True) -> Told:
    return Told.parse(json.loads(json.dumps(holding.tell(is_schema_told=is_schema_told))))


def boxes_in(told: Told, kinds: list[Kind]) -> list[Box | None]:
    """As the leader finds them."""
    found: list[Box | None] = []
    for kind, begin in zip(kinds, Rows(kinds).begins(told.which).tolist(), strict=True):
        dims = len(kind.shape)
        is_held, *numbers = told.rows[begin : begin + 1 + 2 * dims].tolist()
        found.append(Box(tuple(numbers[:dims]), tuple(numbers[dims:]), ()) if is_held else None)
    return found


numbers = st.integers(0, 1 << 62)
shapes = st.sampled_from([(), (3,), (4, 4), (4, 5), (2, 3, 4)])


@st.composite
def holdings(draw: st.DrawFn) -> Holding:
    kinds = sorted(
        Kind(f"t{nth}", place, draw(st.sampled_from(["F32", "BF16"])), shape)
        for nth in range(draw(st.integers(0, 8)))
        for shape in [draw(shapes)]
        for place in range(draw(st.integers(1, 2)))
    )
    several: dict[tuple[int, ...], list[Box | None]] = {}
    for shape in sorted({kind.shape for kind in kinds}):
        place = st.tuples(*[numbers] * len(shape))
        box = st.one_of(st.none(), st.builds(lambda offsets, sizes: Box(offsets, sizes, ()), place, place))
        several[shape] = draw(st.lists(box, min_size=1, max_size=3))
    return Holding(kinds, [draw(st.sampled_from(several[kind.shape])) for kind in kinds])


@given(holdings())
def test_what_was_told_is_read(holding):
    told = told_by(holding)
    assert told.schema == digest(holding.schema())
    assert told.kinds == holding.kinds
    assert boxes_in(told, list(holding.kinds)) == holding.boxes


@given(holdings())
def test_of_ranks_that_know_the_same_one_tells_what_it_is(holding):
    told = told_by(holding, is_schema_told=False)
    assert told.kinds is None and told.schema == told_by(holding).schema
    assert boxes_in(told, list(holding.kinds)) == holding.boxes


@pytest.mark.parametrize("count", [255, 256, 257])
def test_a_rank_may_have_any_number_of_boxes_of_one_shape(count):
    kinds = [Kind(f"t{nth:03d}", 0, "F32", (1000,)) for nth in range(count)]
    kinds += [Kind("u", 0, "F32", (7,))]
    boxes = [*(Box((nth,), (1,), ()) for nth in range(count)), Box((5,), (2,), ())]
    assert boxes_in(told_by(Holding(kinds, boxes)), kinds) == boxes


@pytest.mark.parametrize("change", [{"key": "other"}, {"dtype": "BF16"}, {"shape": (2, 6)}, {"nth": 1}])
def test_ranks_that_know_something_else_tell_another_schema(change):
    kinds = [Kind("weight", 0, "F32", (3, 4)), Kind("z", 0, "F32", (3, 4))]
    other = [kinds[0]._replace(**change), kinds[1]]
    assert Holding(kinds, [None, None]).schema() != Holding(other, [None, None]).schema()


@pytest.mark.parametrize("rank", [0, 3, 1023])
def test_thousands_of_tensors_of_a_few_shapes_take_few_bytes_on_any_rank(rank):
    shapes = [(4096 + nth, 64) for nth in range(60)]
    kinds = [Kind(f"layers.{nth:05d}.weight", 0, "F32", shapes[nth * 7919 % 60]) for nth in range(10_000)]
    boxes = [Box((rank * 4, 0), (4, 64), (0, 0)) if rank < 1023 else None for _ in kinds]
    assert len(json.dumps(Holding(kinds, boxes).tell(is_schema_told=False))) < 1000
    assert len(json.dumps(Holding(kinds, boxes).tell(is_schema_told=True))) < 100_000


@given(st.lists(st.integers(0, (1 << 63) - 1)))
def test_whole_numbers_are_packed_and_unpacked(many):
    assert unpack_numbers(pack_numbers(np.array(many, dtype=np.int64))).tolist() == many


@given(st.lists(st.floats(allow_nan=False)))
def test_fractions_are_packed_and_unpacked_bit_by_bit(many):
    assert unpack_numbers(pack_numbers(np.array(many, dtype=np.float64))).tobytes() == np.array(many).tobytes()


def test_a_rank_holds_all_of_tensors_that_are_not_spread_sorted_by_key():
    holding = Holding.of({"b": torch.zeros(2, 3, dtype=torch.bfloat16), "a": torch.tensor(1), "c": torch.zeros(0, 3)})
    assert holding.kinds == [Kind("a", 0, "I64", ()), Kind("b", 0, "BF16", (2, 3)), Kind("c", 0, "F32", (0, 3))]
    assert holding.boxes == [Box((), (), ()), Box((0, 0), (2, 3), (0, 0)), Box((0, 0), (0, 3), (0, 0))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_is_told_with_its_type(dtype):
    assert Holding.of({"a": torch.zeros(2).to(dtype)}).kinds[0].dtype == DTYPES[dtype]


def _of_ranks(rank: int) -> list[object]:
    mesh = init_device_mesh("cpu", (3,))
    rows = distribute_tensor(torch.zeros(5, 2), mesh, [Shard(0)])
    few = distribute_tensor(torch.zeros(2, 2), mesh, [Shard(0)])
    copy = distribute_tensor(torch.zeros(4), mesh, [Replicate()])
    holding = Holding.of({"rows": rows, "few": few, "copy": copy})
    with pytest.raises(TypeError, match=r"^model.sum cannot be saved: .*P\(sum\)"):
        Holding.of({"model.sum": DTensor.from_local(torch.zeros(2), mesh, [Partial()], run_check=False)})
    assert told_by(holding).kinds == holding.kinds
    return [box and (box.offsets, box.sizes) for box in holding.boxes]


def test_a_rank_holds_its_boxes_of_tensors_that_are_spread(run_ranks):
    assert run_ranks(3, _of_ranks) == [
        [((0,), (4,)), ((0, 0), (1, 2)), ((0, 0), (2, 2))],
        [((0,), (4,)), ((1, 0), (1, 2)), ((2, 0), (2, 2))],
        [((0,), (4,)), None, ((4, 0), (1, 2))],
    ]

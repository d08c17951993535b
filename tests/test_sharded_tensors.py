"""``ShardedTensor``, which was there before DTensor: saved and restored as what ranks have of it says, however many."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_processes import RankProcesses
from sharded_programs import Holder, mesh_of, running
from torch import Tensor, nn
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Rows
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distckpt import SaveFailed

WHOLE = {
    "rows": torch.arange(35, dtype=torch.float32).reshape(7, 5),
    "columns": torch.arange(36, dtype=torch.int64).reshape(4, 9),
    "grid": torch.arange(120, dtype=torch.float64).reshape(6, 5, 4).to(torch.bfloat16),
    "few": torch.arange(6, dtype=torch.float32).reshape(1, 6),
    "wide": torch.complex(*torch.arange(60, dtype=torch.float64).reshape(2, 10, 3)),
    "none": torch.empty(0, 3),
}
# Boxes of the grid: two ranks have three each, three have two each, and one has them all.
CORNERS = [((0, 0, 0), (2, 5, 4)), ((2, 0, 0), (2, 2, 4)), ((2, 2, 0), (2, 3, 4)), ((4, 0, 0), (1, 5, 4))]
CORNERS += [((5, 0, 0), (1, 5, 1)), ((5, 0, 1), (1, 5, 3))]


def in_chunks(whole: Tensor, dim: int) -> ShardedTensor:
    placements = [f"rank:{rank}/cpu" for rank in range(dist.get_world_size())]
    cut = sharded_tensor.empty(ChunkShardingSpec(dim, placements), *whole.shape, dtype=whole.dtype)
    for shard in cut.local_shards():
        shard.tensor.copy_(box_of(whole, shard.metadata.shard_offsets, shard.metadata.shard_sizes))
    return cut


def in_boxes(whole: Tensor, corners: Sequence[tuple[Sequence[int], Sequence[int]]]) -> ShardedTensor:
    """Which each of the ranks takes in turn: with several of a tensor on a rank, whose order is not that in memory."""
    mine = [
        Shard.from_tensor_and_offsets(box_of(whole, offsets, sizes).clone(), [*offsets], dist.get_rank())
        for nth, (offsets, sizes) in reversed([*enumerate(corners)])
        if nth % dist.get_world_size() == dist.get_rank()
    ]
    return sharded_tensor.init_from_local_shards(mine, *whole.shape)


def box_of(whole: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    if 0 in sizes:  # of a shard without elements torch says whatever of where it lies
        return whole.new_empty(sizes)
    for dim, (begin, size) in enumerate(zip(offsets, sizes, strict=True)):
        whole = whole.narrow(dim, begin, size)
    return whole


def cut(whole: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "rows": in_chunks(whole["rows"], 0),
        "inner": {"columns": in_chunks(whole["columns"], 1), "list": [in_boxes(whole["grid"], CORNERS)]},
        "few": in_chunks(whole["few"], 0),  # one rank has it
        "wide": in_chunks(whole["wide"], 0),  # safetensors has no word for its dtype
        "none": in_chunks(whole["none"], 0),
        "step": 3,
    }


def uncut(whole: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "rows": whole["rows"].clone(),
        "inner": {"columns": whole["columns"].clone(), "list": [whole["grid"].clone()]},
        **{key: whole[key].clone() for key in ("few", "wide", "none")},
        "step": 3,
    }


def spread(whole: dict[str, Tensor]) -> dict[str, Any]:
    mesh = mesh_of(dist.get_world_size())
    mine = whole["wide"].tensor_split([5])[dist.get_rank()].clone()
    wide = DTensor.from_local(mine, mesh, [Rows(0)], run_check=False, shape=whole["wide"].shape, stride=(3, 1))
    return {**uncut(whole), "rows": distribute_tensor(whole["rows"], mesh, [Rows(1)]), "wide": wide}


def spoilt() -> dict[str, Tensor]:
    return {key: torch.full_like(one, 77) for key, one in WHOLE.items()}


def faults(found: Any, expected: Any, place: str = "") -> list[str]:
    """Where what this rank has of ``found`` is not what it should have."""
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        return [one for key in found for one in faults(found[key], expected[key], f"{place}.{key}")]
    if isinstance(found, list):
        return faults(found[0], expected[0], f"{place}.0")
    if isinstance(found, ShardedTensor):
        boxes = [(one.tensor, one.metadata.shard_offsets, one.metadata.shard_sizes) for one in found.local_shards()]
        is_right = all(torch.equal(tensor, box_of(expected, offsets, sizes)) for tensor, offsets, sizes in boxes)
        return [] if is_right and found.dtype == expected.dtype else [place]
    if isinstance(found, DTensor):
        at = compute_local_shape_and_global_offset(found.shape, found.device_mesh, found.placements)
        return [] if torch.equal(found.to_local(), box_of(expected, at[1], at[0])) else [place]
    return [] if (torch.equal(found, expected) if isinstance(found, Tensor) else found == expected) else [place]


def save(rank: int, out: str) -> None:
    with running(out, {"part": Holder(cut(WHOLE))}) as ckpt:
        for _ in range(2):
            ckpt.step()
            ckpt.save(wait=True)
        assert ckpt.latest.format == "sharded"


def restore(rank: int, out: str, make: Any) -> tuple[list[str], list[str]]:
    """What did not come back; and what is no ShardedTensor, where it was one."""
    part = Holder(make(spoilt()))
    before = part.tensors
    with running(out, {"part": part}) as ckpt:
        assert ckpt.resume() == 2
    others = [key for key, one in part.tensors.items() if type(one) is not type(before[key])]
    return faults(part.tensors, uncut(WHOLE)), others


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("runs")
    for ranks in (1, 2, 3):
        RankProcesses()(ranks, save, str(root / str(ranks)))
    return root


@pytest.mark.parametrize("there", [1, 2, 3])
@pytest.mark.parametrize(
    "make, here", [(cut, 1), (cut, 2), (cut, 3), (uncut, 1), (spread, 2)], ids=lambda one: getattr(one, "__name__", one)
)
def test_a_sharded_tensor_comes_back_however_many_ranks_have_it(run_ranks, saved, there, make, here):
    assert run_ranks(here, restore, str(saved / str(there)), make) == [([], [])] * here


def save_uncut(rank: int, out: str, format: str) -> None:
    with running(out, {"part": Holder(uncut(WHOLE))}, format=format) as ckpt:
        for _ in range(2):
            ckpt.step()
            ckpt.save(wait=True)


@pytest.mark.parametrize("format", ["full", "sharded"])
def test_what_was_whole_is_cut_in_every_way(run_ranks, tmp_path, format):
    run_ranks(2, save_uncut, str(tmp_path / "run"), format)
    assert run_ranks(3, restore, str(tmp_path / "run"), cut) == [([], [])] * 3
    assert run_ranks(2, restore, str(tmp_path / "run"), spread) == [([], [])] * 2


def stock(rank: int, folder: str) -> list[str]:
    """What torch itself does not read as it was: all that it has a word for."""
    expected = {"rows": WHOLE["rows"], "inner": {"columns": WHOLE["columns"], "list": [WHOLE["grid"]]}}
    found = {key: torch.full_like(one, 77) for key, one in expected.items() if key == "rows"}
    found["inner"] = {"columns": torch.full_like(WHOLE["columns"], 77), "list": [torch.full_like(WHOLE["grid"], 77)]}
    dcp.load({"part": found}, storage_reader=dcp.HuggingFaceStorageReader(folder))
    return faults(found, expected)


@pytest.mark.parametrize("there", [1, 2, 3])
def test_torch_itself_reads_what_was_a_sharded_tensor(run_ranks, saved, there):
    (folder,) = Path(saved / str(there)).glob("step-00000002")
    assert run_ranks(2, stock, str(folder)) == [[], []]


class Sharded(nn.Module):
    """A module that shows its weight as a ShardedTensor, and takes it so, as those of torchrec do."""

    def __init__(self, whole: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((3,), float(whole.sum())))
        self.weight = in_boxes(whole, CORNERS)
        self._register_state_dict_hook(self._show)
        self._register_load_state_dict_pre_hook(self._put)

    @staticmethod
    def _show(module: Sharded, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[f"{prefix}weight"] = module.weight

    def _put(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        there = state.pop(f"{prefix}weight")
        for mine, one in zip(self.weight.local_shards(), there.local_shards(), strict=True):
            assert mine.metadata.shard_offsets == one.metadata.shard_offsets
            mine.tensor.copy_(one.tensor)


def save_module(rank: int, out: str) -> None:
    with running(out, {"model": Sharded(WHOLE["grid"])}) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)


def restore_module(rank: int, out: str) -> tuple[list[str], list[float]]:
    model = Sharded(spoilt()["grid"])
    with running(out, {"model": model}) as ckpt:
        assert ckpt.resume() == 1
    return faults(model.weight, WHOLE["grid"], "weight"), model.bias.tolist()


def test_a_module_that_shows_a_sharded_tensor_is_given_one(run_ranks, tmp_path):
    run_ranks(2, save_module, str(tmp_path / "run"))
    for wrong, bias in run_ranks(3, restore_module, str(tmp_path / "run")):
        assert wrong == [] and bias == [float(WHOLE["grid"].sum())] * 3


def grown(rank: int, out: str) -> None:
    """A rank that holds other shards than before tells so, and all is there all the same."""
    part = Holder({"tensor": in_chunks(WHOLE["rows"], 0)})
    with running(out, {"part": part}) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)
        part.tensors = {"tensor": in_chunks(WHOLE["rows"], 1)}
        ckpt.step()
        ckpt.save(wait=True)
        part.tensors = {"tensor": in_chunks(WHOLE["rows"] + 1, 1)}
        ckpt.step()
        ckpt.save(wait=True)


def restore_grown(rank: int, out: str, step: int) -> list[str]:
    part = Holder({"tensor": torch.zeros(7, 5)})
    with running(out, {"part": part}) as ckpt:
        ckpt.resume(step)
    return faults(part.tensors["tensor"], WHOLE["rows"] + (step == 3), "tensor")


def test_shards_that_are_others_than_in_the_save_before_are_saved_as_they_are(run_ranks, tmp_path):
    run_ranks(2, grown, str(tmp_path / "run"))
    for step in (1, 2, 3):
        assert run_ranks(1, restore_grown, str(tmp_path / "run"), step) == [[]]


def refused(rank: int, out: str) -> str:
    with running(f"{out}.full", {"part": Holder({"old": in_chunks(WHOLE["rows"], 0)})}, format="full") as ckpt:
        ckpt.step()
        with pytest.raises(SaveFailed) as raised:
            ckpt.save(wait=True)
    return str(raised.value)


def test_the_full_format_refuses_a_sharded_tensor_by_name(run_ranks, tmp_path):
    for told in run_ranks(2, refused, str(tmp_path / "run")):
        assert "part.old is sharded over ranks (a ShardedTensor)" in told

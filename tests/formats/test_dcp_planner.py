"""A planner that somebody wrote for torch.distributed.checkpoint says what is saved of each tensor, here too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from flows import read_now, write_now
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

import distckpt
from distckpt import RankFailure
from distckpt.formats import Snapshot
from distckpt.formats.dcp_planner import check_planner, planned
from distckpt.formats.sharded import Sharded
from distckpt.manifest import Manifest
from distckpt.progress import Progress
from distckpt.stores.local import LocalStore


class Halves(DefaultSavePlanner):
    """What is large is saved as bfloat16, and what is frozen is not saved."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        return replace(plan, items=[item for item in plan.items if "frozen" not in item.index.fqn])

    def transform_object(self, write_item: Any, object: Any) -> Any:
        data = super().transform_object(write_item, object)
        return data.bfloat16() if isinstance(data, Tensor) and data.dtype is torch.float32 else data


class Cuts(DefaultSavePlanner):
    def transform_object(self, write_item: Any, object: Any) -> Any:
        return object.detach()[:1]


class Decides(DefaultSavePlanner):
    def create_global_plan(self, all_plans: Any) -> Any:
        return super().create_global_plan(all_plans)


def state() -> dict[str, Any]:
    return {"weight": torch.randn(30, 4), "count": torch.tensor(3), "frozen": torch.ones(5), "lr": 0.1}


def test_what_a_planner_leaves_as_it_is_is_the_tensor_itself():
    tensors = {"a": torch.ones(3), "b": torch.tensor(1), "none": torch.empty(0, 2)}
    found = planned(DefaultSavePlanner(), tensors, is_leader=True)
    assert found.keys() == tensors.keys() and all(found[key] is tensors[key] for key in ("a", "b"))


@pytest.mark.parametrize("turns", [1, 3])
def test_what_it_makes_of_a_tensor_is_saved_and_what_it_leaves_out_is_not_missed(tmp_path, turns):
    format, store = Sharded(Halves()), LocalStore(tmp_path)
    for turn in range(turns):
        path = f"step-{turn}"
        store.make_folder(path)
        saved = state()
        written = write_now(format, Snapshot({"model": saved}, {}), store, path)
        manifest = Manifest(Progress(1), "sharded", 1, (), "", "", 0, 0, written.files, format.tensors_of([written]))
        restored = read_now(format, store, path, manifest).shared["model"]
        assert list(restored) == ["weight", "count", "lr"] and restored["lr"] == 0.1
        assert torch.equal(restored["weight"], saved["weight"].bfloat16()) and restored["count"].dtype is torch.int64


def test_a_tensor_in_a_list_cannot_be_left_out_of_it(tmp_path):
    tensors = {"list": [torch.ones(2), torch.ones(3)], "other": torch.ones(1)}

    class LeavesOut(DefaultSavePlanner):
        def create_local_plan(self) -> Any:
            plan = super().create_local_plan()
            return replace(plan, items=[item for item in plan.items if item.index.fqn != "model.list.1"])

    with pytest.raises(TypeError, match=r"model.list.1 is in a list"):
        Sharded(LeavesOut()).lay_out(Snapshot({"model": tensors}, {}), 0)


def test_a_planner_that_changes_a_shape_is_told_so():
    with pytest.raises(TypeError, match=r"Cuts makes a tensor of \(1, 4\) of model.weight: its shape has to stay"):
        Sharded(Cuts()).lay_out(Snapshot({"model": {"weight": torch.ones(3, 4)}}, {}), 0)


@pytest.mark.parametrize("planner", [object(), DefaultLoadPlanner(), DefaultSavePlanner])
def test_what_is_no_planner_of_saves_is_refused(planner):
    with pytest.raises(TypeError, match="should be a SavePlanner"):
        check_planner(planner)


def test_a_planner_that_decides_for_all_ranks_is_refused():
    with pytest.raises(TypeError, match="Decides has a create_global_plan of its own"):
        check_planner(Decides())


def test_the_full_format_has_no_use_for_a_planner(tmp_path):
    with pytest.raises(ValueError, match='planner: .* format="sharded"'):
        distckpt.Checkpointer(tmp_path, {"model": nn.Linear(1, 1)}, planner=DefaultSavePlanner(), format="full")


def save(rank: int, out: str) -> list[np.ndarray]:
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(10, 9), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with distckpt.Checkpointer(out, {"model": model}, planner=Halves(), sync_buffers=False) as checkpointer:
        for _ in range(2):
            with torch.no_grad():
                model.weight.add_(1)
            checkpointer.step()
            checkpointer.save(wait=True)
    return [one.detach().full_tensor().numpy() for one in model.parameters() if isinstance(one, DTensor)]


class Backwards(Halves):
    """Says what is to be saved in another order."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        return replace(plan, items=plan.items[::-1])


class LeavesBoxesOut(DefaultSavePlanner):
    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        return replace(plan, items=plan.items[1:])


def save_fsdp1(rank: int, out: str) -> list[np.ndarray]:
    """Each rank has several boxes of the weight, and one has nothing of the bias."""
    torch.manual_seed(0)
    model = FullyShardedDataParallel(nn.Linear(10, 9), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(RankFailure, match=r"leaves a part of model.weight out"):
        distckpt.Checkpointer(f"{out}-refused", {"model": model}, planner=LeavesBoxesOut(), save_last=False).prepare()
    with distckpt.Checkpointer(out, {"model": model}, planner=Backwards()) as checkpointer:
        for _ in range(2):
            with torch.no_grad():
                for one in model.parameters():
                    one.add_(1)
            checkpointer.step()
            checkpointer.save(wait=True)
    return [one.detach().numpy() for one in model.state_dict().values()]


def restore(rank: int, out: str) -> list[np.ndarray]:
    model = nn.Linear(10, 9)
    with distckpt.Checkpointer(out, {"model": model}, save_last=False) as checkpointer:
        assert checkpointer.resume() == 2
    return [one.detach().numpy() for one in model.parameters()]


@pytest.mark.parametrize("save", [save, save_fsdp1])
def test_what_ranks_have_of_a_tensor_is_saved_as_their_planners_want_it(run_ranks, tmp_path, save):
    out = str(tmp_path / "run")
    saved = run_ranks(2, save, out)[0]
    (restored,) = run_ranks(1, restore, out)
    for one, other in zip(saved, restored, strict=True):
        assert np.array_equal(torch.from_numpy(one).bfloat16().float().numpy(), other)

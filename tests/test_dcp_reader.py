"""Checkpoints of ours under torch.distributed.checkpoint.load, whoever wrote the planner."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from rank_processes import RankProcesses
from sharded_programs import Holder, adamw, ddp, differing, fsdp, plain, running, told, train
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from distckpt import CheckpointReader, DamagedCheckpoint, NoCheckpoint

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
VALUES = {
    "steps": 7,
    "words": ["a", "b"],
    "array": np.arange(6.0).reshape(2, 3),
    "odd": torch.ones(3, dtype=torch.complex128),
}


def save(rank: int, out: str, kind: str, format: str) -> dict[str, np.ndarray]:
    model = fsdp() if kind == "fsdp" else ddp() if kind == "ddp" else plain()
    optimizer = adamw(model, lr=0.25)
    train(model, optimizer)
    with running(out, {"model": model, "optim": optimizer, "more": Holder(dict(VALUES))}, format=format) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)
    return told(model, optimizer)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("runs")
    saved = {"fsdp": (2, "sharded"), "ddp": (3, "sharded"), "plain": (1, "full")}
    expected = {
        kind: RankProcesses()(ranks, save, str(root / kind), kind, format)[0] for kind, (ranks, format) in saved.items()
    }
    return root, expected


def spoilt(make: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make()
    optimizer = adamw(model, lr=0.5)
    train(model, optimizer, steps=1)
    with torch.no_grad():
        for one in (*model.parameters(), *model.buffers()):
            one.fill_(7)
    return model, optimizer


def load(rank: int, checkpoint: str) -> dict[str, np.ndarray]:
    """As the tutorial of torch has it; values of groups are none of the state that is loaded in place, so they go by
    themselves."""
    model, optimizer = spoilt(fsdp)
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer, options=FLAT)}
    lrs = [key for key in state["optim"] if key.startswith("param_groups.") and key.endswith(".lr")]
    assert len(lrs) == 7 and {state["optim"][key] for key in lrs} == {0.5}
    left = {key: state["optim"].pop(key) for key in [*state["optim"]] if key.startswith("param_groups.")}
    state["optim"] |= {key: left[key] for key in lrs}
    dcp.load(state, storage_reader=CheckpointReader(checkpoint))
    assert {state["optim"][key] for key in lrs} == {0.25}
    set_optimizer_state_dict(model, optimizer, left | state["optim"], options=FLAT)
    return told(model, optimizer)


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_torch_loads_models_and_optimizers_on_any_number_of_ranks(run_ranks, checkpoints, kind, ranks):
    root, expected = checkpoints
    for found in run_ranks(ranks, load, str(root / kind / "latest")):
        assert differing(found, expected[kind]) == []


class Renaming(DefaultLoadPlanner):
    """As in the documentation of torch: what is called ``new.`` here was called ``model.`` there."""

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.state_dict = {key.replace("new.", "model.", 1): one for key, one in self.state_dict.items()}


class Doubling(Renaming):
    """Takes what is read somewhere else, and puts in twice as much; and leaves out what is not there."""

    def resolve_tensor(self, read_item: Any) -> Tensor:
        return torch.empty_like(super().resolve_tensor(read_item))

    def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
        super().resolve_tensor(read_item).copy_(tensor * 2)


def load_renamed(rank: int, checkpoint: str, planner: Any, dtype: torch.dtype) -> dict[str, np.ndarray]:
    model = spoilt(fsdp)[0].to(dtype)
    state: dict[str, Any] = {"new": get_model_state_dict(model)}
    if planner.allow_partial_load:
        state["new"]["none.such"] = torch.ones(2)
    dcp.load(state, storage_reader=CheckpointReader(checkpoint), planner=planner)
    return {key: one for key, one in told(model.float(), adamw(model)).items() if key.startswith("model.")}


@pytest.mark.parametrize("kind", ["fsdp", "plain"])
def test_planners_of_others_say_what_is_read_and_where_to(run_ranks, checkpoints, kind):
    root, expected = checkpoints
    weights = {key: one for key, one in expected[kind].items() if key.startswith("model.")}
    place = str(root / kind / "step-00000001")
    for found in run_ranks(3, load_renamed, place, Renaming(), torch.float32):
        assert differing(found, weights) == []
    for found in run_ranks(2, load_renamed, place, Doubling(allow_partial_load=True), torch.float32):
        assert differing(found, {key: one * 2 for key, one in weights.items()}) == []
    for found in run_ranks(2, load_renamed, place, Renaming(), torch.bfloat16):
        low = {key: one if one.dtype.kind == "i" else _as_bfloat16(one) for key, one in weights.items()}
        assert differing(found, low) == []


def _as_bfloat16(array: np.ndarray) -> np.ndarray:
    return torch.from_numpy(array).bfloat16().float().numpy()


@pytest.mark.parametrize("kind", ["fsdp", "plain"])
def test_what_is_no_tensor_and_what_safetensors_has_no_word_for_is_there_too(checkpoints, kind):
    root, _ = checkpoints
    state = {"more": {"steps": 0, "words": ["c", "d"], "array": torch.zeros(2, 3), "odd": torch.zeros(3)}}
    state["more"]["array"], state["more"]["odd"] = (
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros_like(VALUES["odd"]),
    )
    dcp.load(state, storage_reader=CheckpointReader(root / kind / "latest"), no_dist=True)
    found = state["more"]
    assert found["steps"] == 7 and found["words"] == ["a", "b"] and torch.equal(found["odd"], VALUES["odd"])
    assert np.array_equal(found["array"].numpy(), VALUES["array"])


def test_what_was_damaged_is_named(checkpoints, tmp_path):
    root, _ = checkpoints
    folder = tmp_path / "copy"
    for path in (root / "fsdp" / "step-00000001").iterdir():
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    state = {"model": {"first.weight": torch.zeros(17, 10)}}
    dcp.load(state, storage_reader=CheckpointReader(folder), no_dist=True)
    assert state["model"]["first.weight"].any()
    shard = folder / "rank-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(dcp.api.CheckpointException, match=re.escape("copy/rank-00001.safetensors: its bytes changed")):
        dcp.load(state, storage_reader=CheckpointReader(folder), no_dist=True)
    with pytest.raises(dcp.api.CheckpointException) as raised:
        dcp.load(state, storage_reader=CheckpointReader(folder), no_dist=True)
    assert any(isinstance(error, DamagedCheckpoint) for error, _ in raised.value.failures.values())


def test_a_checkpoint_has_to_be_named(checkpoints, tmp_path):
    root, _ = checkpoints
    with pytest.raises(ValueError, match="is the directory of a run: name a checkpoint in it"):
        CheckpointReader(root / "fsdp")
    with pytest.raises(NoCheckpoint):
        CheckpointReader(tmp_path / "nothing")
    state = {"model": {"first.weight": torch.zeros(17, 10)}}
    reader = CheckpointReader(root / "fsdp" / "latest")
    dcp.load(state, checkpoint_id=root / "plain" / "latest", storage_reader=reader, no_dist=True)
    other = {"model": {"first.weight": torch.zeros(17, 10)}}
    dcp.load(other, storage_reader=CheckpointReader(root / "plain" / "latest"), no_dist=True)
    assert torch.equal(state["model"]["first.weight"], other["model"]["first.weight"])


class Wrong(DefaultLoadPlanner):
    def resolve_tensor(self, read_item: Any) -> Tensor:
        return torch.zeros(3)


def test_a_planner_with_a_tensor_of_another_shape_is_told_so(checkpoints):
    root, _ = checkpoints
    state = {"model": {"first.weight": torch.zeros(17, 10)}}
    with pytest.raises(dcp.api.CheckpointException, match=r"has \(3,\) for \(17, 10\) elements of model.first.weight"):
        dcp.load(state, storage_reader=CheckpointReader(root / "fsdp" / "latest"), planner=Wrong(), no_dist=True)

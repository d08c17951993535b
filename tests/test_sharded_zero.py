"""``ZeroRedundancyOptimizer``: each rank has the state of some parameters, and writes it under their names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_processes import RankProcesses
from safetensors import safe_open
from sharded_programs import adamw, ddp, differing, fsdp, plain, running, told, train
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

Program = Callable[[float], tuple[nn.Module, torch.optim.Optimizer]]


def zero(lr: float, **words: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Of two groups."""
    model = ddp()
    named = dict(model.named_parameters())
    few = [one for key, one in named.items() if "bias" in key]
    rest = [one for key, one in named.items() if "bias" not in key]
    groups = [{"params": rest}, {"params": few}]
    return model, ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, lr=lr, **words)


def zero_in_buckets(lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    return zero(lr, parameters_as_bucket_view=True)


def whole_ddp(lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    return (model := ddp()), adamw(model, lr)


def of_fsdp(lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    return (model := fsdp()), adamw(model, lr)


def of_one(lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    return (model := plain()), adamw(model, lr)


PROGRAMS: dict[int, tuple[Program, ...]] = {1: (of_one, zero), 2: (zero, whole_ddp, of_fsdp), 3: (zero_in_buckets,)}


def whole_state(model: nn.Module, optimizer: Any) -> dict[str, np.ndarray]:
    """All tensors by name; moments that are shared out as torch puts them together. Collective."""
    if not isinstance(optimizer, ZeroRedundancyOptimizer):
        return told(model, optimizer)
    found = {f"model.{key.removeprefix('module.')}": one for key, one in model.state_dict().items()}
    names = {id(one): key.removeprefix("module.") for key, one in model.named_parameters()}
    ordered = [names[id(one)] for group in optimizer.param_groups for one in group["params"]]
    optimizer.consolidate_state_dict(0)
    state = [optimizer.state_dict()["state"] if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(state)
    for nth, of in state[0].items():
        found |= {f"optim.state.{ordered[nth]}.{name}": one for name, one in of.items()}
    return {key: one.detach().clone().numpy() for key, one in found.items()}


def save(out: str, make: Program) -> dict[str, np.ndarray]:
    model, optimizer = make(0.01)
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)  # before there is any state
        train(model, optimizer)
        for _ in range(2):
            ckpt.step()
            ckpt.save(wait=True)
    return whole_state(model, optimizer)


def restore(out: str, make: Program) -> dict[str, np.ndarray]:
    model, optimizer = make(0.5)
    with torch.no_grad():
        for one in (*model.parameters(), *model.buffers()):
            one.fill_(7)
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        assert ckpt.resume() == 3
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    return whole_state(model, optimizer)


def save_all(rank: int, root: str, world_size: int) -> dict[str, dict[str, np.ndarray]]:
    return {(name := f"{make.__name__}-{world_size}"): save(f"{root}/{name}", make) for make in PROGRAMS[world_size]}


def restore_all(rank: int, root: str, world_size: int, expected: Any) -> dict[str, list[str]]:
    return {
        f"{name} in {make.__name__}": keys
        for name in expected
        for make in PROGRAMS[world_size]
        if "zero" in name + make.__name__
        if (keys := differing(expected[name], restore(f"{root}/{name}", make)))
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("runs")
    expected: dict[str, Any] = {}
    for count in PROGRAMS:
        expected |= RankProcesses()(count, save_all, str(root), count)[0]
    return root, expected


@pytest.mark.parametrize("world_size", PROGRAMS)
def test_moments_that_ranks_have_shared_among_them_are_restored_on_others(run_ranks, checkpoints, world_size):
    root, expected = checkpoints
    assert len(expected["zero-2"]) == 10 + 3 * 7
    assert run_ranks(world_size, restore_all, str(root), world_size, expected) == [{}] * world_size


@pytest.mark.parametrize("name", ["zero-2", "zero_in_buckets-3"])
def test_each_rank_writes_what_it_has_and_none_of_it_is_written_twice(checkpoints, name):
    root, expected = checkpoints
    folder = root / name / "step-00000003"
    files = sorted(folder.glob("*.safetensors"))
    moments = []
    for path in files:
        with safe_open(path, "pt") as opened:
            moments.append([key for key in opened.keys() if key.startswith("optim.state.")])  # noqa: SIM118
    assert len(files) == int(name[-1]) and all(len(keys) >= 3 for keys in moments)
    counts = Counter(key for keys in moments for key in keys)
    assert set(counts) == {key for key in expected[name] if key.startswith("optim.")} and set(counts.values()) == {1}
    assert json.loads((folder / "state.json").read_text())["optim"]["param_groups"].keys() == {"few", "first.bias"}


def torch_reads(rank: int, folder: str, expected: dict[str, np.ndarray]) -> list[str]:
    found = {key: torch.full_like(torch.from_numpy(one), 7) for key, one in expected.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(folder))
    return differing({key: one.numpy() for key, one in found.items()}, expected)


def test_torch_itself_reads_them_all(run_ranks, checkpoints):
    root, expected = checkpoints
    assert run_ranks(2, torch_reads, str(root / "zero-2" / "step-00000003"), expected["zero-2"]) == [[]] * 2


def train_on(rank: int, out: str) -> tuple[list[str], list[bool], list[int]]:
    """What is another after a resume than without one; of which parameters a rank was given moments; and how many
    collectives there were before and after a save and a resume."""
    group = dist.distributed_c10d._get_default_group()
    model, optimizer = zero(0.01)
    train(model, optimizer)
    counts = [group._get_sequence_number_for_group()]
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)
        counts.append(group._get_sequence_number_for_group())
    train(model, optimizer)
    other, another = zero(0.5)
    counts.append(group._get_sequence_number_for_group())
    with running(out, {"model": other, "optim": another}) as ckpt:
        ckpt.resume()
        counts.append(group._get_sequence_number_for_group())
    mine = {id(one) for inner in another.optim.param_groups for one in inner["params"]}  # type: ignore[attr-defined]
    given = [id(one) in mine for one in another.state]
    train(other, another)
    return differing(whole_state(model, optimizer), whole_state(other, another)), given, counts


def test_training_goes_on_bit_for_bit_and_no_rank_is_given_what_another_has(run_ranks, tmp_path):
    given_to = []
    for wrong, given, (before, saved, then, resumed) in run_ranks(2, train_on, str(tmp_path / "run")):
        assert wrong == [] and all(given) and 0 < before == saved and 0 < then == resumed
        given_to.append(len(given))
    assert sum(given_to) == 7 and min(given_to) > 0

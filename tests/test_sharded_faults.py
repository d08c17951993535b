"""One rank fails, dies or hangs in a sharded save: nothing is committed, all others learn which, nothing is lost."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distckpt
from distckpt.stores.local import LocalStore

SOON = timedelta(seconds=4)


def training(out: str) -> tuple[nn.Module, distckpt.Checkpointer]:
    torch.manual_seed(1)
    model = nn.Linear(300, 700)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = {"model": model, "optimizer": optimizer}
    return model, distckpt.Checkpointer(out, state, save_last=False, timeout=SOON, sync_buffers=False)


def train(model: nn.Module, checkpointer: distckpt.Checkpointer) -> None:
    with torch.no_grad():
        for one in model.parameters():
            one.add_(1)
    checkpointer.step()


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def dies() -> None:
    os._exit(9)


def hangs() -> None:
    threading.Event().wait()


def moments(monkey: Callable[[], None], moment: str) -> None:
    """This rank does that before it writes its file, in the middle of it, or when it has been written."""
    real = LocalStore.create
    real_settle = LocalStore.settle

    class Failing:
        def __init__(self, context: Any) -> None:
            self._context = context

        def __enter__(self) -> Any:
            self._sink = self._context.__enter__()
            return self

        def __exit__(self, *error: object) -> Any:
            return self._context.__exit__(*error)

        def write(self, data: Any) -> None:
            half = len(data) // 2
            self._sink.write(memoryview(data)[:half])
            monkey()
            self._sink.write(memoryview(data)[half:])

    def create(store: LocalStore, path: str) -> Any:
        if moment == "before" and path.endswith(".safetensors"):
            monkey()
        context = real(store, path)
        return Failing(context) if moment == "during" and path.endswith(".safetensors") else context

    def settle(store: LocalStore, folder: str = "") -> None:
        if moment == "after" and folder.startswith("step-"):
            monkey()
        real_settle(store, folder)

    LocalStore.create, LocalStore.settle = create, settle  # type: ignore[method-assign, assignment]  # of this process


def save_and_lose_a_rank(rank: int, out: str, what: str, moment: str) -> list[Any]:
    model, checkpointer = training(out)
    train(model, checkpointer)
    checkpointer.save(wait=True)
    before = digests(Path(out) / "step-00000001")
    dist.barrier()
    if rank == 1:
        moments({"dies": dies, "hangs": hangs}[what], moment)
    train(model, checkpointer)
    try:
        checkpointer.save(wait=True)
    except distckpt.SaveFailed as failure:
        return [sorted(failure.failures), str(failure), before == digests(Path(out) / "step-00000001")]
    return ["saved"]


@pytest.mark.parametrize("what", ["dies", "hangs"])
@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_rank_that_is_lost_is_named_on_all_others_and_the_checkpoint_before_stays(run_ranks, tmp_path, what, moment):
    out = str(tmp_path / "run")
    told = run_ranks(3, save_and_lose_a_rank, out, what, moment, lost=[1])
    for failing, words, is_intact in (told[0], told[2]):
        assert failing == [1] and "did not come within" in words and is_intact
    records = sorted(path.name for path in Path(out).glob("*.committed"))
    assert records == ["step-00000001.committed"]
    # A new start goes on from there, with other ranks, and saves that step.
    assert run_ranks(2, go_on, out) == [[1, 2.0], [1, 2.0]]
    assert (Path(out) / "step-00000002.committed").exists()


def go_on(rank: int, out: str) -> list[float]:
    model, checkpointer = training(out)
    with checkpointer:
        done = checkpointer.resume()
        begun = next(iter(model.parameters())).full_tensor().sum().item()
        train(model, checkpointer)
        checkpointer.save(wait=True)
        grown = next(iter(model.parameters())).full_tensor().sum().item() - begun
    return [done, round(grown / 210_000 + 1, 3)]


def fail_and_go_on(rank: int, out: str, moment: str) -> list[Any]:
    model, checkpointer = training(out)
    train(model, checkpointer)
    checkpointer.save(wait=True)
    broken = []

    def breaks() -> None:
        if not broken:
            broken.append(True)
            raise OSError(28, "No space left on device", "rank-00001.safetensors")

    if rank == 1:
        moments(breaks, moment)
    train(model, checkpointer)
    with pytest.raises(distckpt.SaveFailed) as caught:
        checkpointer.save(wait=True)
    train(model, checkpointer)
    checkpointer.save(wait=True)
    checkpointer.close()
    return [sorted(caught.value.failures), str(caught.value)]


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_disk_that_is_full_on_one_rank_fails_that_save_on_all_and_the_next_one_works(run_ranks, tmp_path, moment):
    out = str(tmp_path / "run")
    for failing, words in run_ranks(3, fail_and_go_on, out, moment):
        assert failing == [1] and "No space left" in words and "rank-00001" in words
    records = sorted(path.name for path in Path(out).glob("*.committed"))
    assert records == ["step-00000001.committed", "step-00000003.committed"]
    assert run_ranks(1, go_on, out) == [[3, 2.0]]

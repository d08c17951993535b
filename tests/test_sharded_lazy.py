"""Sharded saves beside training: what is copied late is what it was at the step that was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import distckpt


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 5001), nn.ReLU(), nn.Linear(5001, 64))
    if kind == "ddp":
        return DistributedDataParallel(model)
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def whole(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).numpy().copy()


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[np.ndarray]:
    parameters = list(model.parameters())
    return [
        whole(tensor)
        for one in parameters
        for tensor in (one, *(moment for _, moment in sorted(optimizer.state[one].items())))
    ]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 64)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(rank: int, out: str, kind: str, snapshot: str) -> list[Any]:
    model = model_of(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    events: list[Any] = []
    checkpointer = distckpt.Checkpointer(
        out,
        {"model": model, "optimizer": optimizer},
        format="sharded",
        snapshot=snapshot,
        save_last=False,
        on_event=events.append,
    )
    step(model, optimizer)
    checkpointer.prepare()
    for _ in range(3):
        step(model, optimizer)
        checkpointer.step()
        kept = held(model, optimizer)
        checkpointer.save()
        step(model, optimizer)  # while it is being copied
        checkpointer.step()
    checkpointer.close()
    engine = [event["engine"] for event in events if event["event"] == "saved"]
    return [kept, [one["retakes"] for one in engine], [one["arena_bytes"] for one in engine]]


def restore(rank: int, out: str, kind: str) -> list[np.ndarray]:
    model = model_of(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    with distckpt.Checkpointer(out, {"model": model, "optimizer": optimizer}, save_last=False) as checkpointer:
        assert checkpointer.resume() == 5
    return held(model, optimizer)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("snapshot", ["eager", "lazy", "paranoid"])
def test_a_save_beside_training_holds_the_step_that_was_saved(run_ranks, tmp_path: Path, kind: str, snapshot: str):
    out = str(tmp_path / "run")
    kept, retakes, arenas = run_ranks(2, save, out, kind, snapshot)[0]
    (restored, _) = run_ranks(2, restore, out, kind)
    assert len(restored) == len(kept) and all(map(np.array_equal, restored, kept))
    assert retakes == [0] * 3, "nobody changed what was being copied"
    share = sum(one.nbytes for one in kept) / 2
    assert max(arenas) <= 1.01 * share + (32 << 20), "a rank takes memory for its share alone"

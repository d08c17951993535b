"""Sharded checkpoints on real ranks: what each writes, and what any number of ranks reads back."""

from __future__ import annotations

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


class Net(nn.Module):
    """Rows that no number of ranks divides, a buffer, and a parameter without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 17)
        self.norm = nn.BatchNorm1d(17)
        self.second = nn.Linear(17, 5)
        self.few = nn.Parameter(torch.randn(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu()) * self.few.sum()


def net(kind: str) -> nn.Module:
    torch.manual_seed(3)
    model = Net()
    world = dist.get_world_size() if dist.is_initialized() else 1
    if kind == "ddp" and world > 1:
        return DistributedDataParallel(model)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
        for part in (model.first, model.second):
            fully_shard(part, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        return fully_shard(model, mesh=mesh)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    torch.manual_seed(5)
    for _ in range(steps):
        model(torch.randn(8, 10)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def told(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """All tensors, whole, in a form that a pipe takes."""
    names = {key.removeprefix("module."): one for key, one in model.state_dict().items()}
    found = {f"model.{key}": whole(one) for key, one in names.items()}
    for key, one in model.named_parameters():
        for name, value in optimizer.state.get(one, {}).items():
            found[f"optim.state.{key.removeprefix('module.')}.{name}"] = whole(value)
    return {key: one.numpy() for key, one in found.items()}


def save(rank: int, out: str, kind: str) -> dict[str, np.ndarray]:
    model = net(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    with distckpt.Checkpointer(out, {"model": model, "optim": optimizer}, format="sharded", sync_buffers=False) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)
    return told(model, optimizer)


def restore(rank: int, out: str, kind: str) -> dict[str, np.ndarray]:
    model = net(kind)
    with torch.no_grad():
        for one in model.parameters():
            one.zero_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    with distckpt.Checkpointer(out, {"model": model, "optim": optimizer}, save_last=False) as ckpt:
        assert ckpt.resume() == 1
    assert optimizer.param_groups[0]["lr"] == 0.01
    return told(model, optimizer)


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert np.array_equal(tensor, other[key]), key


@pytest.mark.parametrize("kind, ranks", [("plain", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 3), ("hsdp", 4)])
def test_what_was_saved_on_some_ranks_is_restored_on_others(run_ranks, tmp_path, kind, ranks):
    out = str(tmp_path / "run")
    saved = run_ranks(ranks, save, out, kind)
    for other, readers in (("plain", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)):
        for restored in run_ranks(readers, restore, out, other):
            same(saved[0], restored)

"""Small programs whose state is spread over ranks in every usual way, and what they hold, whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

import distckpt


class Net(nn.Module):
    """Rows that no number of ranks divides, fewer of them than ranks, buffers of whole numbers, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 17)
        self.norm = nn.BatchNorm1d(17)
        self.second = nn.Linear(17, 5)
        self.few = nn.Parameter(torch.randn(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu()) * self.few.sum()


class Wide(nn.Module):
    """Layers that tensor parallelism cuts by rows, and by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 16)
        self.down = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def mesh_of(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def plain(make: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(3)
    return make()


def ddp() -> nn.Module:
    return DistributedDataParallel(plain())


def fsdp(make: type[nn.Module] = Net) -> nn.Module:
    model = plain(make)
    mesh = mesh_of(dist.get_world_size())
    for part in model.children():
        if not isinstance(part, nn.BatchNorm1d):
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def hsdp() -> nn.Module:
    return fully_shard(plain(), mesh=mesh_of(2, dist.get_world_size() // 2, names=("replicate", "shard")))


def fsdp_and_tensor_parallel() -> nn.Module:
    """The rows of ``up`` are cut by both, that of ``down`` by one each."""
    model = plain(Wide)
    mesh = mesh_of(dist.get_world_size() // 2, 2, names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["data"])


class Fused(nn.Module):
    """A weight of which each rank has rows that are no range: `_StridedShard` alone, over a mesh of all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.randn(24, 3))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x


def strided() -> nn.Module:
    model = plain(Fused)
    mesh = mesh_of(dist.get_world_size())
    mine = model.fused.detach().view(2, mesh.size(), -1, 3)[:, dist.get_rank()].reshape(-1, 3)
    cut = DTensor.from_local(mine, mesh, [_StridedShard(0, split_factor=2)], shape=(24, 3), stride=(3, 1))
    model.fused = nn.Parameter(cut)
    model.bias = nn.Parameter(distribute_tensor(model.bias.detach(), mesh, [Shard(0)]))
    return model


def fused() -> nn.Module:
    return plain(Fused)


def wide() -> nn.Module:
    return plain(Wide)


def wide_fsdp() -> nn.Module:
    return fsdp(Wide)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    torch.manual_seed(5)
    for _ in range(steps):
        if any(isinstance(one, Fused) for one in model.modules()):
            for one in model.parameters():
                one.grad = torch.full_like(one, 0.5) * one.detach()
        else:
            wide = any(isinstance(one, Wide) for one in model.modules())
            model(torch.randn(8, 6 if wide else 10)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def whole(tensor: Tensor) -> np.ndarray:
    """All elements, in a form that a pipe takes. Collective, where it is spread."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor.clone().numpy()
    if isinstance(tensor.placements[0], _StridedShard) and len(tensor.placements) == 1:
        local = tensor.to_local().contiguous()
        halves = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(halves, local)
        return torch.stack([one.view(2, -1, 3) for one in halves], dim=1).reshape(24, 3).numpy()
    return tensor.full_tensor().clone().numpy()


def told(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """All tensors, whole, as a checkpoint calls them."""
    found = {f"model.{key.removeprefix('module.')}": whole(one) for key, one in model.state_dict().items()}
    for key, one in model.named_parameters():
        for name, value in optimizer.state.get(one, {}).items():
            found[f"optim.state.{key.removeprefix('module.')}.{name}"] = whole(value)
    return found


def spoilt(make: Callable[[], nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A program that has nothing of what is to be restored."""
    model = make()
    with torch.no_grad():
        for one in (*model.parameters(), *model.buffers()):
            one.fill_(7)
    return model, adamw(model, lr=0.5)


class Holder:
    """A part that holds a tree of whatever."""

    def __init__(self, tensors: Any) -> None:
        self.tensors = tensors

    def state_dict(self) -> Any:
        return self.tensors

    def load_state_dict(self, state: Any) -> None:
        self.tensors = state


@contextmanager
def running(out: str, state: dict[str, Any], **words: Any) -> Iterator[distckpt.Checkpointer]:
    """A checkpointer that saves what it is told to."""
    usual = {"format": "sharded", "sync_buffers": False, "save_last": False}
    with distckpt.Checkpointer(out, state, **usual | words) as ckpt:
        yield ckpt


def saved(out: str, make: Callable[[], nn.Module], **words: Any) -> dict[str, np.ndarray]:
    """What was saved, after two steps."""
    model = make()
    optimizer = adamw(model)
    train(model, optimizer)
    with running(out, {"model": model, "optim": optimizer}, **words) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)
    return told(model, optimizer)


def restored(out: str, make: Callable[[], nn.Module], **words: Any) -> dict[str, np.ndarray]:
    """What was restored from the first step."""
    model, optimizer = spoilt(make)
    with running(out, {"model": model, "optim": optimizer}, **words) as ckpt:
        assert ckpt.resume() == 1
    assert optimizer.param_groups[0]["lr"] == 0.01
    return told(model, optimizer)


def differing(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    """The keys of what is not the same, bit for bit."""
    return sorted(
        key
        for key in {*one, *other}
        if key not in one or key not in other or one[key].dtype != other[key].dtype
        or one[key].tobytes() != other[key].tobytes() or one[key].shape != other[key].shape
    )  # fmt: skip

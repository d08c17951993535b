"""What a later save costs a rank to see that its state is the one that was planned, and to lay out its files.

One rank of 1,024 is there, with DTensors of a process group that only says that it has so many ranks, or with plain
tensors as the only rank. Nobody could be asked, so that nobody is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from distckpt.formats import Snapshot
from distckpt.formats.form import _likeness_of
from distckpt.formats.sharded import Sharded
from distckpt.formats.shards import boxes_at
from scaling.jobs import Job, Shape, trained

RANKS, RANK = 1024, 3
TIMES = 21
_FEW = 8  # elements in each dimension of a plain tensor, whose size does not matter


def seen(kind: str, tensors: int) -> dict[str, Any]:
    """The plan is made, and the same state comes again and again. ``kind``: "DTensors", or "plain tensors"."""
    ranks, rank = (RANKS, RANK) if kind == "DTensors" else (1, 0)
    mesh = _mesh() if ranks > 1 else None
    state = _training(tensors, mesh)
    format = Sharded()
    job = Job("fsdp", ranks, tensors)
    told = [job.told_by(one) for one in range(ranks)]
    digest = format.planner.look(Snapshot(state), rank)
    mine = format.planner.tell(is_first=True)
    assert not mesh or mine["rows"] == told[rank]["rows"], "the job is another"
    others = {"is_growing": False, "machine": "", "text": "", "outline": digest}
    told = [mine if one == rank else words | others for one, words in enumerate(told)]
    format.planner.take(rank, format.planner.plan(told))
    format.lay_out(Snapshot(state), rank)
    layouts = format._layouts
    again = layouts.see(Snapshot(state), rank)
    assert again.is_as_before, "it is"
    tensors_there = [*again.tensors.values()]
    likeness, other = (_likeness_of(tensors_there) for _ in range(2))
    return {
        "kind": kind,
        "tensors": len(tensors_there),
        "see_seconds": _median(lambda: layouts.see(Snapshot(state), rank)),
        "compare_seconds": _median(lambda: likeness == other),
        "lay_out_seconds": _median(lambda: format.lay_out(Snapshot(state), rank)),
    }


def _median(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(TIMES):
        begin = time.process_time()
        work()
        taken.append(time.process_time() - begin)
    return median(taken)


def _mesh() -> DeviceMesh:
    dist.init_process_group("fake", rank=RANK, world_size=RANKS, store=FakeStore())
    return init_device_mesh("cpu", (RANKS,))


def _training(tensors: int, mesh: DeviceMesh | None) -> dict[str, Any]:
    """A model and its optimizer, named as `trained` has them."""
    model: dict[str, Tensor] = {}
    state: dict[str, dict[str, Tensor]] = {}
    for key, shape, nth in trained(tensors):
        name = f"layers.{nth}.weight"
        tensor = torch.tensor(0.0) if not shape else _tensor(shape, mesh)
        if key.startswith("model."):
            model[name] = tensor
        else:
            state.setdefault(name, {})[key.rpartition(".")[2]] = tensor
    groups = [{"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "params": list(state)}]
    return {"model": model, "optim": {"state": state, "param_groups": groups}}


def _tensor(shape: Shape, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None:
        return torch.empty([min(extent, _FEW) for extent in shape])
    boxes = boxes_at(shape, (RANKS,), (RANK,), [Shard(0)])
    local = torch.empty(boxes[0].sizes if boxes else (0, *shape[1:]))
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=tuple(strides))

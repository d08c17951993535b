"""What it costs to plan a sharded save, and a restore from it, for far more ranks than there are machines here.

The code is what runs; the ranks are objects in one process, told and asked one after another, and no byte of a tensor
is there. What the leader does, from the text of what all ranks told to the text that all are answered, is measured
apart from what each rank does for itself. Beside it stock DCP plans the same, where that ends in time.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import proc
import torch
from command_line import counted, tell
from reporting import table
from torch.distributed.checkpoint import metadata, planner
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.default_planner import _validate_global_plan, create_default_global_save_plan
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from distckpt import layout, strict_json
from distckpt.formats.held import Holding, Kind, Told
from distckpt.formats.safetensors_file import DTYPES_BY_NAME, ITEM_BYTES
from distckpt.formats.sharded_plan import make_plan, parts_of
from distckpt.formats.sharded_reading import OpenedSharded
from distckpt.formats.shards import Box, boxes_at
from distckpt.manifest import FileEntry, Manifest, TensorGroup, digest
from distckpt.progress import Progress

Shape = tuple[int, ...]

# Of GPT-2, Llama of 8 and 70 B, an MoE whose experts are stacked, ResNet-50, ViT-B, BERT: 59, and 60 with the step.
SHAPES: tuple[Shape, ...] = (
    *((50257, 768), (1024, 768), (2304, 768), (768, 768), (3072, 768), (768, 3072), (768,), (2304,), (3072,)),
    *((128256, 4096), (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (4096,), (128256, 8192)),
    *((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672), (8192,)),
    *((64, 14336, 1024), (64, 1024, 14336), (64, 1024)),
    *((64, 3, 7, 7), (64, 64, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1), (64, 256, 1, 1), (128, 256, 1, 1)),
    *((128, 128, 3, 3), (512, 128, 1, 1), (128, 512, 1, 1), (256, 512, 1, 1), (256, 256, 3, 3), (1024, 256, 1, 1)),
    *((256, 1024, 1, 1), (512, 256, 1, 1), (1024, 512, 1, 1), (512, 1024, 1, 1), (2048, 512, 1, 1)),
    *((512, 2048, 1, 1), (512, 512, 3, 3), (2048, 1024, 1, 1), (1000, 2048), (64,), (128,), (256,), (512,), (1024,)),
    *(
        (2048,),
        (1000,),
        (768, 3, 16, 16),
        (1, 1, 768),
        (1, 197, 768),
        (30522, 1024),
        (4096, 1024),
        (1024, 1024),
        (2, 1024),
    ),
)
# What a training has of each parameter. The step, a number, is the same on all ranks.
NAMES = ("model.layers.{}.weight", *(f"optim.state.layers.{{}}.weight.{one}" for one in ("exp_avg", "exp_avg_sq")))
STEP = "optim.state.layers.{}.weight.step"
# More of them take stock DCP longer than anybody waits for.
STOCK_ITEMS = 100_000
LEAST_BALANCED_BYTES = 2_000_000


@dataclass(frozen=True)
class Mesh:
    """How ranks are arranged, and how tensors lie on them, each as the next of ``placements``."""

    shape: Shape
    placements: Sequence[Sequence[Placement]]


def sharded(ranks: int) -> Mesh:
    return Mesh((ranks,), [[Shard(0)]])


def replicated(ranks: int) -> Mesh:
    return Mesh((ranks,), [[Replicate()]])


def hybrid(ranks: int) -> Mesh:
    replicas = min(ranks, 16)
    return Mesh((replicas, ranks // replicas), [[Replicate(), Shard(0)]])


def two_dimensional(ranks: int) -> Mesh:
    """FSDP2 over tensor-parallel ranks, which have rows of one weight and columns of the next."""
    few = min(ranks, 8)
    return Mesh((ranks // few, few), [[_StridedShard(0, split_factor=few), Shard(0)], [Shard(0), Shard(1)]])


STATES: Mapping[str, tuple[str, Callable[[int], Mesh]]] = {
    "fsdp": ("FSDP2, 60 shapes of real models in random order", sharded),
    "ddp": ("DDP, the same shapes", replicated),
    "hsdp": ("HSDP with 16 replicas, the same shapes", hybrid),
    "2d": ("FSDP2 over 8 tensor-parallel ranks, the same shapes", two_dimensional),
    "different": ("FSDP2, each tensor of another shape", sharded),
}
SERIES = (
    *product(["fsdp"], [8, 64, 256, 1024, 4096, 16384], [10_000]),
    *product(["fsdp"], [8, 64, 1024], [1_000]),
    ("fsdp", 1024, 50_000),
    *product(["ddp", "hsdp", "2d"], [64, 1024, 4096, 16384], [10_000]),
    *product(["different"], [8, 64, 256, 1024], [10_000]),
)


class Job:
    """A state, and the ranks it is spread over, each of which knows all its tensors.

    Attributes:
        kinds: its tensors.
        layouts: how many shapes there are, each as often as it is cut in another way.
    """

    def __init__(self, state: str, ranks: int, tensors: int) -> None:
        self.mesh = STATES[state][1](ranks)
        made = _different(tensors) if state == "different" else _trained(tensors)
        cuts: dict[tuple[Shape, tuple[Placement, ...]], int] = {}
        told = []
        for key, shape, nth in made:
            placed = tuple(_fitting(one, len(shape)) for one in self.mesh.placements[nth % len(self.mesh.placements)])
            told.append((Kind(key, 0, "F32", shape), cuts.setdefault((shape, placed), len(cuts))))
        told.sort()
        self.kinds = [kind for kind, _ in told]
        self.layouts = len(cuts)
        self._cut_of = [cut for _, cut in told]
        self._cuts = list(cuts)

    def held_by(self, rank: int) -> Holding:
        """What that rank has: of each tensor one box, or none."""
        coordinate = tuple(map(int, np.unravel_index(rank, self.mesh.shape)))
        boxes = [boxes_at(shape, self.mesh.shape, coordinate, placed) for shape, placed in self._cuts]
        assert max(map(len, boxes)) == 1, "no state here is cut into several"
        mine: list[Box | None] = [one[0] if one else None for one in boxes]
        return Holding(self.kinds, [mine[cut] for cut in self._cut_of])


def _different(tensors: int) -> Iterator[tuple[str, Shape, int]]:
    for nth in range(tensors):
        yield NAMES[0].format(nth), (1024 + 13 * nth, 64 + nth % 449), nth


def _trained(tensors: int) -> Iterator[tuple[str, Shape, int]]:
    """Of each parameter the name of each of its tensors, the shape of that, and the how-manieth it is."""
    chosen = random.Random(0)
    for nth in range(-(-tensors // 4)):
        shape = chosen.choice(SHAPES)
        for name in NAMES:
            yield name.format(nth), shape, nth
        yield STEP.format(nth), (), nth


def _fitting(placement: Placement, dims: int) -> Placement:
    """That, for a tensor with so many dimensions: a vector is not cut into columns, nor a number at all."""
    return placement if not isinstance(placement, Replicate) and placement.dim < dims else Replicate()


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """How much CPU time that took stands in ``seconds``."""
    begin = time.process_time()
    yield
    seconds[what] = time.process_time() - begin


def measured(state: str, ranks: int, tensors: int) -> dict[str, Any]:
    """One save planned, and its restore on half as many ranks."""
    job = Job(state, ranks, tensors)
    some = sorted({0, ranks // 2, ranks - 1})
    told, tellings = [], []
    for rank in range(ranks):
        holding = job.held_by(rank)
        seconds: dict[str, float] = {}
        with timed(seconds, "tell"):
            told.append(strict_json.dump(holding.tell(is_schema_told=rank == 0)))
        tellings.append(seconds["tell"])
    proc.forget_peak()
    leader: dict[str, float] = {}
    with timed(leader, "parse"):
        parsed = [Told.parse(json.loads(one)) for one in told]
    with timed(leader, "plan"):
        plan = make_plan(parsed)
    with timed(leader, "answer"):
        answer = strict_json.dump(plan.answer)
    peak = proc.peak_memory_bytes()
    del parsed
    asked = []
    for rank in some:
        holding, seconds = job.held_by(rank), {}
        with timed(seconds, "parts"):
            parts_of(holding, rank, json.loads(answer), digest(holding.schema()))
        asked.append(seconds["parts"])
    return {
        "state": state,
        "ranks": ranks,
        "tensors": len(job.kinds),
        "layouts": job.layouts,
        "leader_seconds": sum(leader.values()),
        "leader": leader,
        "tell_seconds": median(tellings),
        "parts_seconds": median(asked),
        "told_bytes": sum(map(len, told)),
        "answer_bytes": len(answer),
        "peak_memory_bytes": peak,
        "balance": balance(plan.groups, job.mesh) if state in ("ddp", "hsdp") else None,
        **restored(plan.groups, state, ranks, tensors),
    }


def balance(groups: Sequence[TensorGroup], mesh: Mesh) -> float | None:
    """The most that one of the ranks writes that hold the same, of their mean; ``None`` for shares that are small."""
    written = np.zeros(math.prod(mesh.shape))
    for group in groups:
        each = ITEM_BYTES[group.dtype] * len(group.keys)
        if group.chunks is None:
            written[layout.rank_of(group.file)] += math.prod(group.shape) * each
            continue
        volumes = np.array(group.chunks.sizes, dtype=np.int64).reshape(len(group.chunks.files), -1).prod(axis=1)
        np.add.at(written, [layout.rank_of(file) for file in group.chunks.files], volumes * each)
    by_replica = written.reshape(mesh.shape[0], -1)
    if by_replica.mean() < LEAST_BALANCED_BYTES:
        return None
    return float((by_replica.max(axis=0) / by_replica.mean(axis=0)).max())


class Nothing:
    """A store of a checkpoint in which nothing but tensors is."""

    data = b"{}"

    def read(self, path: str) -> bytes:
        return self.data


def files_of(rank: int) -> list[FileEntry]:
    shard, nothing = layout.shard_file(rank), (len(Nothing.data), digest(Nothing.data))
    others = [layout.rank_file(rank), layout.digests_file(shard), *([] if rank else [layout.STATE])]
    told = FileEntry(shard, 1 << 30, digest(shard.encode()), layout.digests_file(shard))
    return [told, *(FileEntry(name, *nothing) for name in others)]


def restored(groups: tuple[TensorGroup, ...], state: str, ranks: int, tensors: int) -> dict[str, Any]:
    """What the manifest costs, and what one of half as many ranks does to know what to read."""
    files = [file for rank in range(ranks) for file in files_of(rank)]
    words = {"created": "", "run": "", "format": "sharded", "world_size": ranks, "attempt": 1, "serial": 1}
    written = Manifest(progress=Progress(1, 0), reasons=(), files=tuple(files), tensors=groups, **words)
    seconds: dict[str, float] = {}
    with timed(seconds, "manifest_write_seconds"):
        data = written.to_json()
    with timed(seconds, "manifest_read_seconds"):
        manifest = Manifest.from_json(data, "the manifest")
    half = Job(state, max(ranks // 2, 1), tensors)
    count = math.prod(half.mesh.shape)
    plannings = []
    for rank in sorted({0, count // 2, count - 1}):
        holding, of_rank, reads = half.held_by(rank), {}, 0
        with timed(of_rank, "restore"):
            opened = OpenedSharded(Nothing(), "checkpoint", manifest, rank, None)  # type: ignore[arg-type]
            for kind, box in zip(holding.kinds, holding.boxes, strict=True):
                if box is not None:
                    reads += len(opened._layouts[kind.key].cut.chunks_in(box.offsets, box.sizes))  # as `fill` does
        plannings.append((of_rank["restore"], reads))
    return {
        **seconds,
        "manifest_bytes": len(data),
        "groups": len(groups),
        "restore_seconds": median(one for one, _ in plannings),
        "reads": max(reads for _, reads in plannings),
    }


def stock(state: str, ranks: int, tensors: int) -> dict[str, Any]:
    """The same by the planner of stock DCP: what its coordinator does between gathering and scattering."""
    job = Job(state, ranks, tensors)
    gathered = [pickle.dumps(planner.SavePlan(stock_items(job.held_by(rank)))) for rank in range(ranks)]
    seconds: dict[str, float] = {}
    with timed(seconds, "parse"):
        plans = [pickle.loads(one) for one in gathered]
    with timed(seconds, "plan"):
        plans, told = create_default_global_save_plan(dedup_save_plans(plans))
        assert not _validate_global_plan(plans, told), "it is whole"
    with timed(seconds, "answer"):
        answers = [pickle.dumps(one) for one in plans]
    return {
        "state": state,
        "ranks": ranks,
        "tensors": len(job.kinds),
        "leader_seconds": sum(seconds.values()),
        "leader": seconds,
        "told_bytes": sum(map(len, gathered)),
        "answer_bytes": sum(map(len, answers)),
        "manifest_bytes": len(pickle.dumps(told)),
    }


def stock_items(holding: Holding) -> list[planner.WriteItem]:
    items = []
    for kind, box in zip(holding.kinds, holding.boxes, strict=True):
        if box is None:
            continue
        chunk = metadata.ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
        properties = metadata.TensorProperties(DTYPES_BY_NAME[kind.dtype])
        is_whole = box.sizes == kind.shape
        items.append(
            planner.WriteItem(
                metadata.MetadataIndex(kind.key, chunk.offsets),
                planner.WriteItemType.TENSOR if is_whole else planner.WriteItemType.SHARD,
                tensor_data=planner.TensorWriteData(chunk, properties, torch.Size(kind.shape)),
            )
        )
    return items


def apart(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Done in a process of its own, so that its peak of memory is its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(work, args)


def growth(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """With which power of the ranks the leader's CPU time grows, from each number of ranks to the next."""
    found = []
    for state, tensors in dict.fromkeys((one["state"], one["tensors"]) for one in results):
        same = sorted(
            (one for one in results if (one["state"], one["tensors"]) == (state, tensors)), key=lambda one: one["ranks"]
        )
        for few, many in zip(same, same[1:], strict=False):
            exponent = math.log(many["leader_seconds"] / few["leader_seconds"], many["ranks"] / few["ranks"])
            between = {"from_ranks": few["ranks"], "to_ranks": many["ranks"]}
            found.append({"state": state, "tensors": tensors, **between, "exponent": exponent})
    return found


def text(result: Mapping[str, Any]) -> str:
    """The result as people read it."""
    head = (
        f"Real code; the ranks are objects in one process, asked one after another; no tensor has memory. What a rank "
        f"holds is made by `boxes_at`, not read off DTensors. CPU-seconds, one run each, torch {result['torch']}, "
        f"Python {result['python']}, {result['cores']} cores, load average {result['load_average'][0]:.2f} before, "
        f"{result['load_average'][1]:.2f} after."
    )
    columns = [
        *("state", "ranks", "tensors", "layouts", "leader s", "parse + plan + answer s", "gathered MB", "answer kB"),
        *("peak MB", "balance", "tell ms", "parts ms", "manifest MB", "written s", "read s", "restore ms", "reads"),
    ]
    rows = [
        [
            *(one["state"], f"{one['ranks']:,}", f"{one['tensors']:,}", f"{one['layouts']:,}"),
            *(f"{one['leader_seconds']:.3f}", " + ".join(f"{part:.3f}" for part in one["leader"].values())),
            *(f"{one['told_bytes'] / 1e6:.2f}", f"{one['answer_bytes'] / 1e3:.1f}"),
            *(f"{one['peak_memory_bytes'] / 1e6:.0f}", f"{one['balance']:.4f}" if one["balance"] else "-"),
            *(f"{one['tell_seconds'] * 1e3:.1f}", f"{one['parts_seconds'] * 1e3:.1f}"),
            *(f"{one['manifest_bytes'] / 1e6:.2f}", f"{one['manifest_write_seconds']:.3f}"),
            *(f"{one['manifest_read_seconds']:.3f}", f"{one['restore_seconds'] * 1e3:.1f}", f"{one['reads']:,}"),
        ]
        for one in result["ours"]
    ]
    rates = [
        f"- {one['state']}, {one['tensors']:,} tensors: from {one['from_ranks']:,} to {one['to_ranks']:,} ranks the "
        f"leader's CPU time grows as ranks^{one['exponent']:.2f}"
        for one in result["growth"]
    ]
    stock_rows = [
        [
            *(one["state"], f"{one['ranks']:,}", f"{one['tensors']:,}", f"{one['leader_seconds']:.3f}"),
            *(f"{one[key] / 1e6:.2f}" for key in ("told_bytes", "answer_bytes", "manifest_bytes")),
        ]
        for one in result["stock"]
    ]
    stock_columns = ["stock DCP", "ranks", "tensors", "leader s", "gathered MB", "scattered MB", ".metadata MB"]
    words = [f"- {name}: {about}" for name, (about, _) in STATES.items()]
    parts = [head, "\n".join(words), table(columns, rows), "\n".join(rates)]
    return "\n\n".join([*parts, table(stock_columns, stock_rows) if stock_rows else ""]).strip()


def main() -> int:
    """0 when all was measured, 2 when called wrongly."""
    called = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    called.add_argument("--states", nargs="+", choices=STATES, help="these, each with all --ranks and --tensors")
    called.add_argument("--ranks", nargs="+", type=counted, default=[8, 1024], help="with --states (8 1024)")
    called.add_argument("--tensors", nargs="+", type=counted, default=[10_000], help="with --states (10000)")
    called.add_argument("--json", type=Path, metavar="FILE", help="all figures as JSON")
    asked = called.parse_args()
    if asked.json and not asked.json.parent.is_dir():
        called.error(f"{asked.json.parent} is not a directory")
    series = list(product(asked.states, asked.ranks, asked.tensors) if asked.states else SERIES)
    load_before = os.getloadavg()[0]
    ours, by_stock = [], []
    for state, ranks, tensors in series:
        ours.append(apart(measured, state, ranks, tensors))
        tell(f"{state}, {ranks} ranks, {tensors} tensors: {ours[-1]['leader_seconds']:.3f} s of the leader")
        if ranks * tensors <= STOCK_ITEMS:
            by_stock.append(apart(stock, state, ranks, tensors))
    result = {
        "benchmark": "scale",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [load_before, os.getloadavg()[0]],
        "ours": ours,
        "growth": growth(ours),
        "stock": by_stock,
    }
    print(text(result))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

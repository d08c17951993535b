"""What it costs to plan a save, and a restore from it.

The ranks are objects in one process, told and asked one after another. What the leader does, from the text of what all
ranks told to the text that all are answered, is measured apart from what each rank does for itself.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import proc

from distckpt import layout, strict_json
from distckpt.formats.held import Told
from distckpt.formats.safetensors_file import ITEM_BYTES
from distckpt.formats.sharded_plan import make_plan, parts_of
from distckpt.formats.sharded_reading import OpenedSharded
from distckpt.manifest import FileEntry, Manifest, TensorGroup, digest
from distckpt.progress import Progress
from scaling.cost import timed, uncollected
from scaling.jobs import Job, Mesh

LEAST_BALANCED_BYTES = 2_000_000


def planned(state: str, ranks: int, tensors: int) -> dict[str, Any]:
    """One save planned, and its restore on half as many ranks."""
    job = Job(state, ranks, tensors)
    told = [strict_json.dump(job.told_by(rank)) for rank in range(ranks)]
    tellings = []
    for rank in sorted({0, ranks // 2, ranks - 1}, reverse=True):
        holding, seconds = job.held_by(rank), {}
        with timed(seconds, "tell"):
            words = strict_json.dump(holding.tell(is_schema_told=rank == 0))
        assert rank == 0 or words == told[rank], "what it takes no time to tell is not what is told"
        tellings.append(seconds["tell"])
    told[0] = words
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
    for rank in sorted({0, ranks // 2, ranks - 1}):
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
        sizes = group.chunks.sizes if group.chunks else group.shape
        parts = np.array(sizes, dtype=np.int64).reshape(-1, len(group.shape)) if sizes else np.ones((1, 1), np.int64)
        for files, keys in Counter(group.files_of_each).items():
            np.add.at(written, [*map(layout.rank_of, files)], parts.prod(axis=1) * ITEM_BYTES[group.dtype] * keys)
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
    """What a rank has written of a state in which nothing but tensors is."""
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
    with uncollected(), timed(seconds, "manifest_read_seconds"):
        manifest = Manifest.from_json(data, "the manifest")
    half = Job(state, max(ranks // 2, 1), tensors)
    count = math.prod(half.mesh.shape)
    plannings = []
    for rank in sorted({0, count // 2, count - 1}):
        holding, of_rank, reads = half.held_by(rank), {}, 0
        with uncollected(), timed(of_rank, "restore"):
            opened = OpenedSharded(Nothing(), "checkpoint", manifest, rank, None)  # type: ignore[arg-type]
            for kind, box in zip(holding.kinds, holding.boxes, strict=True):
                if box is not None:
                    reads += len(opened._lies[kind.key][0].chunks_in(box.offsets, box.sizes))  # as `fill` does
        plannings.append((of_rank["restore"], reads))
    return {
        **seconds,
        "manifest_bytes": len(data),
        "groups": len(groups),
        "restore_seconds": median(one for one, _ in plannings),
        "reads": max(reads for _, reads in plannings),
    }

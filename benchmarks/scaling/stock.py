"""What the planner of stock DCP pays for the same: its coordinator, between gathering and scattering."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import metadata, planner
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.default_planner import _validate_global_plan, create_default_global_save_plan

from distckpt.formats.held import Holding
from distckpt.formats.safetensors_file import DTYPES_BY_NAME
from scaling.cost import timed
from scaling.jobs import Job


def planned_by_stock(state: str, ranks: int, tensors: int) -> dict[str, Any]:
    """One save planned."""
    job = Job(state, ranks, tensors)
    gathered = [pickle.dumps(planner.SavePlan(_items(job.held_by(rank)))) for rank in range(ranks)]
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


def _items(holding: Holding) -> list[planner.WriteItem]:
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

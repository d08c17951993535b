"""The sharded format: each rank writes a part of the state, and any number of ranks reads it.

A rank's tensors lie in ``rank-00003.safetensors``, by part and parameter name; what several ranks hold alike they share
among them. ``dcp.load(tensors, storage_reader=HuggingFaceStorageReader(folder))`` of torch reads them, too. What is no
tensor lies in ``state.json`` and, of one rank alone, in ``rank-00003.json``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from distckpt import layout
from distckpt.formats import Image, Opened, Snapshot, Written
from distckpt.formats.boxes import fault
from distckpt.formats.held import Told
from distckpt.formats.sharded_layout import Seen, ShardedLayouts
from distckpt.formats.sharded_plan import make_plan
from distckpt.formats.sharded_reading import OpenedSharded
from distckpt.manifest import Chunks, Manifest, TensorGroup
from distckpt.stores import Store


class Sharded:
    """See the module, and `distckpt.formats.Format` for what each method promises."""

    name = "sharded"
    is_folder = True
    read_with = (
        "torch.distributed.checkpoint.load(tensors, "
        "storage_reader=torch.distributed.checkpoint.HuggingFaceStorageReader('.'))"
    )

    def __init__(self) -> None:
        self._layouts = ShardedLayouts()
        self._planned: tuple[TensorGroup, ...] = ()  # on the leader
        self.planner = _Planner(self._layouts, self._know)

    def lay_out(self, snapshot: Snapshot, rank: int) -> list[Image]:
        return self._layouts.lay_out(snapshot, rank)

    def tensors_of(self, written: Sequence[Written]) -> tuple[TensorGroup, ...]:
        others = {rank: one.tensors for rank, one in enumerate(written) if one.tensors is not None}
        return _amended(self._planned, others) if others else self._planned

    def open(self, store: Store, path: str, manifest: Manifest, rank: int, parts: Collection[str] | None) -> Opened:
        return OpenedSharded(store, path, manifest, rank, parts)

    def _know(self, groups: tuple[TensorGroup, ...]) -> None:
        self._planned = groups


class _Planner:
    """See `distckpt.formats.Planner`."""

    def __init__(self, layouts: ShardedLayouts, know: Any) -> None:
        self._layouts = layouts
        self._know = know
        self._seen: Seen | None = None
        self.is_due = True

    def look(self, snapshot: Snapshot) -> str:
        self._seen = self._layouts.see(snapshot)
        self._layouts.look(self._seen)
        return self._layouts.schema

    def tell(self, rank: int, digests: Sequence[str]) -> Any:
        self._layouts.is_first = digests.index(self._layouts.schema) == rank
        return self._layouts.holding.tell(is_schema_told=self._layouts.is_first)

    def plan(self, told: Sequence[Any]) -> Any:
        plan = make_plan([Told.parse(one) for one in told])
        self._know(plan.groups)
        return plan.answer

    def take(self, rank: int, answer: Any) -> None:
        assert self._seen is not None, "it looked before"
        self._layouts.plan(rank, answer, self._seen)
        self._seen = None
        self.is_due = False


def _amended(planned: Sequence[TensorGroup], others: dict[int, tuple[TensorGroup, ...]]) -> tuple[TensorGroup, ...]:
    """What was written, where some ranks wrote what they were not asked for: ``others``, by rank, is all they did."""
    ranks = set(others)
    chunks: defaultdict[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = defaultdict(list)
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for group in planned:
        for key in group.keys:
            kinds[key] = (group.dtype, group.shape)
            chunks[key] += [one for one in _chunks(group) if layout.rank_of(one[0]) not in ranks]
    for groups in others.values():
        for group in groups:
            for key in group.keys:
                if kinds.setdefault(key, (group.dtype, group.shape)) != (group.dtype, group.shape):
                    if chunks[key]:
                        raise ValueError(f"{ascii(key)[:120]} is not the same on all ranks")
                    kinds[key] = (group.dtype, group.shape)
                known = {one[1:] for one in chunks[key]}
                chunks[key] += [one for one in _chunks(group) if one[1:] not in known]
    return _grouped(chunks, kinds)


def _chunks(group: TensorGroup) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    if group.chunks is None:
        return [(group.file, (0,) * len(group.shape), group.shape)]
    dims = len(group.shape)
    return [
        (file, group.chunks.offsets[nth * dims : (nth + 1) * dims], group.chunks.sizes[nth * dims : (nth + 1) * dims])
        for nth, file in enumerate(group.chunks.files)
    ]


def _grouped(
    chunks: dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]],
    kinds: dict[str, tuple[str, tuple[int, ...]]],
) -> tuple[TensorGroup, ...]:
    alike: defaultdict[tuple[str, tuple[int, ...], Chunks], list[str]] = defaultdict(list)
    for key, told in chunks.items():
        if not told:
            continue  # nobody has it any more
        dtype, shape = kinds[key]
        rows = [np.array([one[at] for one in told], dtype=np.int64).reshape(len(told), -1) for at in (1, 2)]
        if why := fault(shape, *rows):
            raise ValueError(f"{ascii(key)[:120]} of shape {shape} was not written whole: {why}")
        joined = Chunks.joined([Chunks((file,), offsets, sizes) for file, offsets, sizes in told])
        alike[dtype, shape, joined].append(key)
    return tuple(TensorGroup.of(dtype, shape, lies, tuple(keys)) for (dtype, shape, lies), keys in alike.items())


FORMAT = Sharded()

"""The sharded format: each rank writes a part of the state, and any number of ranks reads it.

A rank's tensors lie in ``rank-00003.safetensors``, by part and parameter name; what several ranks hold alike they share
among them. ``dcp.load(tensors, storage_reader=HuggingFaceStorageReader(folder))`` of torch reads them, too. What is no
tensor lies in ``state.json`` and, of one rank alone, in ``rank-00003.json``.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Sequence
from typing import Any

from torch.distributed.checkpoint.planner import SavePlanner

from distckpt.formats import Image, Opened, Snapshot, Written
from distckpt.formats.amending import amended
from distckpt.formats.held import Told
from distckpt.formats.sharded_layout import Seen, ShardedLayouts
from distckpt.formats.sharded_plan import Plan, make_plan
from distckpt.formats.sharded_reading import OpenedSharded
from distckpt.formats.sharing import writers_of
from distckpt.manifest import Manifest, TensorGroup
from distckpt.stores import Store

# Plans that are made although an optimizer has no state yet.
_FEW = 2
# So much of a digest tells those of one job apart.
_OUTLINE = 16


class Sharded:
    """See the module, and `distckpt.formats.Format` for what each method promises."""

    name = "sharded"
    is_folder = True
    read_with = (
        "torch.distributed.checkpoint.load(tensors, "
        "storage_reader=torch.distributed.checkpoint.HuggingFaceStorageReader('.'))"
    )

    def __init__(self, planner: SavePlanner | None = None, *, writers_per_node: int | None = None) -> None:
        """``planner``: what decides what is saved of each tensor; see `distckpt.formats.dcp_planner`.
        ``writers_per_node``: how many ranks of a machine share what several hold; ``None``: all."""
        self._layouts = ShardedLayouts(planner)
        self.planner = _Planner(self._layouts, writers_per_node)

    def lay_out(self, snapshot: Snapshot, rank: int) -> list[Image]:
        return self._layouts.lay_out(snapshot, rank)

    def tensors_of(self, written: Sequence[Written]) -> tuple[TensorGroup, ...]:
        others = {rank: one.tensors for rank, one in enumerate(written) if one.tensors is not None}
        plan = self.planner.made
        if not others:
            return plan.groups
        groups = amended(plan.groups, plan.holders, others)
        self.planner.check_written(written)
        return groups

    def open(self, store: Store, path: str, manifest: Manifest, rank: int, parts: Collection[str] | None) -> Opened:
        return OpenedSharded(store, path, manifest, rank, parts)


class _Planner:
    """See `distckpt.formats.Planner`.

    Attributes:
        made: the plan, on the leader.
    """

    def __init__(self, layouts: ShardedLayouts, writers_per_node: int | None) -> None:
        self._layouts = layouts
        self._writers_per_node = writers_per_node
        self._seen: Seen | None = None
        self.made = Plan((), {}, {})
        self.is_due = True
        self._taken = 0
        self._outlines: Sequence[str] = ()

    def look(self, snapshot: Snapshot, rank: int) -> str:
        self._seen = self._layouts.see(snapshot, rank)
        self._layouts.look(self._seen)
        return self._layouts.outline

    def tell(self, *, is_first: bool) -> Any:
        assert self._seen is not None, "it looked before"
        self._layouts.is_first = is_first
        told = self._layouts.holding.tell(is_schema_told=is_first)
        outline = self._layouts.outline[:_OUTLINE]
        return {**told, "outline": outline, "is_growing": self._seen.is_growing, "machine": platform.node()}

    def plan(self, told: Sequence[Any]) -> Any:
        per_node = self._writers_per_node
        writers = None if per_node is None else writers_of([one["machine"] for one in told], per_node)
        self.made = make_plan([Told.parse(one) for one in told], writers)
        self._outlines = [one["outline"] for one in told]
        return {**self.made.answer, "is_growing": any(one["is_growing"] for one in told)}

    def take(self, rank: int, answer: Any) -> None:
        assert self._seen is not None, "it looked before"
        self._layouts.plan(rank, answer, self._seen)
        self._seen = None
        self._taken += 1
        self.is_due = answer["is_growing"] and self._taken < _FEW  # some optimizers never have any state

    def check_written(self, written: Sequence[Written]) -> None:
        """What is no tensor is written whole, which the first of those does that knew the same. On the leader.

        Raises:
            ValueError: naming what is not there any more on one that wrote it for others, and is on one of these.
        """
        writers: dict[str, int] = {}
        relying: dict[str, int] = {}
        for rank, (outline, one) in enumerate(zip(self._outlines, written, strict=False)):
            writers.setdefault(outline, rank)
            if one.tensors is None:
                relying.setdefault(outline, rank)
        for outline, rank in writers.items():
            if (gone := written[rank].gone) and outline in relying:
                raise ValueError(
                    f"{ascii(gone[0])[:120]} is not in the state of rank {rank} any more, which wrote it for all, and "
                    f"in that of rank {relying[outline]} it still is"
                )


FORMAT = Sharded()

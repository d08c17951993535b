"""Checkpoints of ours for ``torch.distributed.checkpoint.load``, whose planners say what is read, and where to."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from distckpt.candidates import candidates_of, damage_in
from distckpt.formats.export_dcp import as_torch_sees
from distckpt.formats.known import get_format
from distckpt.formats.placeholders import Placeholders
from distckpt.formats.shards import narrowed
from distckpt.formats.spread import Spread
from distckpt.optimizers import is_by_name
from distckpt.ranks import LEADER


class CheckpointReader(StorageReader):
    """A checkpoint as a ``StorageReader`` of torch, for programs that load it with a ``LoadPlanner`` of their own::

        dcp.load({"model": model.state_dict()}, storage_reader=CheckpointReader("runs/gpt/latest"), planner=Renaming())

    All that a planner can do there, it can do here: leave out, rename, put what is read somewhere else. Each rank reads
    the blocks that it needs, of any format and saved by any number of ranks, and each block is checked. Keys begin with
    the name of the part. In a sharded checkpoint, the state of an optimizer is called as by torch's
    ``get_optimizer_state_dict`` with ``flatten_optimizer_state_dict=True``. What each rank had of its own, such as its
    random number generators, is not there.

    `Checkpointer.resume` needs no planner: ``only=``, ``exclude=`` and ``rename=`` say what is meant.

    Args:
        checkpoint: a checkpoint (``runs/gpt/step-00012000``, ``runs/gpt/latest``), or a copy of one. A run's directory
            is none: ranks may find another newest there.

    Raises:
        NoCheckpoint: where there is none.
        DamagedCheckpoint: while it is read, naming the file that is not what was committed. Tensors that were to be
            read may have changed then.
    """

    def __init__(self, checkpoint: str | os.PathLike[str]) -> None:
        self.reset(checkpoint)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """From now on another checkpoint is read, if one is given."""
        if checkpoint_id is None:
            return
        (one, *_), is_choice = candidates_of(checkpoint_id)
        if is_choice:
            raise ValueError(f"{checkpoint_id} is the directory of a run: name a checkpoint in it, such as its latest")
        self._one = one

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """What is there, as torch calls it."""
        one = self._one
        placeholders = Placeholders()
        with damage_in(one.name):
            manifest = one.manifest()
            self._opened = get_format(manifest.format).open(one.store, one.name, manifest, LEADER, None)
        shared = {name: _flattened(state) for name, state in self._opened.snapshot.shared.items()}
        metadata, items = as_torch_sees(placeholders.replaced(shared))
        self._bytes = {item.index.fqn: value.getvalue() for item, value in items if isinstance(value, io.BytesIO)}
        self._standing = {
            item.index.fqn: placeholders.standing[id(value)] for item, value in items if isinstance(value, Tensor)
        }
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Nothing is to be set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """What the plan says is read, and given to the planner."""
        pairs: list[tuple[Tensor, Tensor]] = []
        read: list[tuple[ReadItem, Tensor, Tensor]] = []
        for item in plan.items:
            key = item.storage_index.fqn
            if item.type is LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(self._bytes[key]))
                continue
            standing, target = self._standing[key], planner.resolve_tensor(item).detach()
            if tuple(target.shape) != tuple(item.lengths):
                raise ValueError(f"the planner has {tuple(target.shape)} for {tuple(item.lengths)} elements of {key}")
            view = target if target.dtype is standing.dtype else torch.empty(target.shape, dtype=standing.dtype)
            read.append((item, target, view))
            if standing.is_meta:
                spread = Spread.made(standing.shape, view, [(_begin(item), tuple(item.lengths), view)], view.to)
                pairs.append((standing, spread))
        with damage_in(self._one.name):
            self._opened.fill(pairs)
        for item, target, view in read:
            standing = self._standing[item.storage_index.fqn]
            if not standing.is_meta:  # an array, which is read whole
                view.copy_(narrowed(standing, _begin(item), tuple(item.lengths)))
            if view is not target:
                target.copy_(view)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether something is there."""
        return Path(checkpoint_id).exists()


def _begin(item: ReadItem) -> tuple[int, ...]:
    """Where in the whole tensor it begins."""
    chunk = item.storage_index.offset or (0,) * len(item.storage_offsets)
    return tuple(map(sum, zip(chunk, item.storage_offsets, strict=True)))


def _flattened(state: Any) -> Any:
    """The state of an optimizer with the values of its groups for each parameter in them."""
    if not is_by_name(state):
        return state
    groups: dict[str, Mapping[str, Any]] = {}
    for group in state["param_groups"].values():
        values = {key: value for key, value in group.items() if key != "params"}
        groups |= dict.fromkeys(group["params"], values)
    return {"state": state["state"], "param_groups": groups}

"""Tensors without memory, which stand for those that are still to be read, and what takes their place."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from distckpt.formats import Opened, Snapshot
from distckpt.formats.shards import is_spread, is_without_memory, new_like

_LEAVES = frozenset({bool, int, float, str, type(None)})


def stand_in(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that stands for one of that shape and type."""
    return _prototype(shape, dtype).detach()


@lru_cache(maxsize=1024)
def _prototype(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Making another tensor of one costs a fifth of making one."""
    return torch.empty(shape, dtype=dtype, device="meta")


def is_stand_in(value: Any) -> bool:
    """Whether that is a tensor that is still to be read."""
    return isinstance(value, Tensor) and is_without_memory(value)


def replaced(value: Any, take: Callable[[Tensor], Tensor]) -> Any:
    """``value``, a tree as in a snapshot, with what ``take`` gives for each stand-in in its place."""
    if type(value) in _LEAVES:
        return value
    if isinstance(value, Tensor):
        return take(value) if value.is_meta else value
    if type(value) is dict:
        if _LEAVES.issuperset(map(type, value)):
            return {key: replaced(one, take) for key, one in value.items()}
        return {replaced(key, take): replaced(one, take) for key, one in value.items()}
    if isinstance(value, dict):
        same = copy.copy(value)  # with its attributes: that of a module has one for versions
        same.clear()
        same.update({replaced(key, take): replaced(one, take) for key, one in value.items()})
        return same
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(replaced(one, take) for one in value)
    if type(value) is deque:
        return deque((replaced(one, take) for one in value), value.maxlen)
    return value


class NewMemory:
    """New tensors, one for each stand-in: where that stands in two places, so does what takes its place.

    Attributes:
        targets: what `distckpt.formats.Opened.fill` is to fill.
    """

    def __init__(self) -> None:
        self.targets: list[tuple[Tensor, Tensor]] = []
        self._made: dict[int, Tensor] = {}

    def take(self, stand_in: Tensor, *, device: torch.device | str = "cpu", like: Tensor | None = None) -> Tensor:
        """The tensor that takes the place of ``stand_in``: the same in each call.

        Args:
            like: spread over ranks as it is to be, if it is of the same shape.
        """
        made = self._made.get(id(stand_in))
        if made is None:
            if like is not None and is_spread(like) and like.shape == stand_in.shape:
                made = new_like(like, stand_in.dtype)
            else:
                made = torch.empty(stand_in.shape, dtype=stand_in.dtype, device=device)
            self._made[id(stand_in)] = made
            self.targets.append((stand_in, made))
        return made

    def give(self, stand_in: Tensor, tensor: Tensor) -> None:
        """``tensor``, of its shape and dtype, takes the place of ``stand_in``, unless another does already."""
        if id(stand_in) not in self._made:
            self._made[id(stand_in)] = tensor
            self.targets.append((stand_in, tensor))

    def replaced(self, value: Any) -> Any:
        """``value``, a tree as in a snapshot, with tensors in the place of stand-ins."""
        return replaced(value, self.take)


class Whole:
    """A snapshot in new host memory, once its targets are filled; see `distckpt.restoring.Fitted`."""

    def __init__(self, snapshot: Snapshot) -> None:
        memory = NewMemory()
        self.snapshot = Snapshot(
            {name: memory.replaced(part) for name, part in snapshot.shared.items()},
            {name: memory.replaced(part) for name, part in snapshot.own.items()},
        )
        self.targets: Sequence[tuple[Tensor, Tensor]] = memory.targets
        self.unplaced: Sequence[str] = ()
        self.is_fit = True

    def judge(self, unplaced: Collection[str]) -> None:
        """It holds whatever there is."""

    def apply(self) -> None:
        """Nothing is left to be done."""


def read_whole(opened: Opened) -> Snapshot:
    """The state in ``opened``, in new host memory, each byte of it checked.

    Raises:
        DamagedCheckpoint, OSError: as `distckpt.formats.Opened.fill`.
    """
    whole = Whole(opened.snapshot)
    opened.fill(whole.targets)
    return whole.snapshot

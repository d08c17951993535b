"""Tensors that take no memory, and stand in the layout of a file for what will be written there."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Placeholders:
    """A placeholder for each tensor: where that stands in two places, so does its placeholder.

    Attributes:
        standing: what each placeholder is for, by its ``id``.
        arrays: what was an array of NumPy and is known as a tensor here.

    Args:
        dtype: what floating tensors will become, if that is another.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.standing: dict[int, Tensor] = {}
        self.arrays: list[Tensor] = []
        self._dtype = dtype
        self._made: dict[int, Tensor] = {}
        self._kept: list[Any] = []  # or another could get its id

    def take(self, tensor: Tensor) -> Tensor:
        """What stands for ``tensor``, which may itself be a stand-in: of its shape and its dtype to be."""
        made = self._made.get(id(tensor))
        if made is None:
            dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
            made = torch.empty((), dtype=dtype).expand(tensor.shape)
            self._made[id(tensor)] = made
            self._kept += made, tensor
            self.standing[id(made)] = tensor
        return made

    def replaced(self, value: Any) -> Any:
        """``value``, a tree as in a snapshot, with placeholders, in types that ``torch.load(weights_only=True)`` reads:
        arrays become tensors, a deque a list, a frozenset a set."""
        if isinstance(value, Tensor):
            return self.take(value)
        if isinstance(value, np.ndarray):
            return self._take_array(value)
        if isinstance(value, dict):
            same = copy.copy(value) if type(value) in (OrderedDict, Counter) else {}  # with what a module notes there
            same.clear()
            same.update({self.replaced(key): self.replaced(one) for key, one in value.items()})
            return same
        if type(value) in (list, tuple):
            return type(value)(map(self.replaced, value))
        if isinstance(value, (set, frozenset)):
            return set(map(self.replaced, value))
        if isinstance(value, deque):
            return [*map(self.replaced, value)]
        return value

    def _take_array(self, array: Any) -> Tensor:
        made = self._made.get(id(array))
        if made is None:
            tensor = torch.from_numpy(array)
            self.arrays.append(tensor)
            made = self._made[id(array)] = self.take(tensor)
            self._kept.append(array)
        return made


def flat(tree: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in ``tree``, as `Placeholders.replaced` returns it, by their places in it, with dots. A module's
    are the names of its parameters."""
    if isinstance(tree, Tensor):
        yield place or "value", tree
    for key, one in _inside(tree):
        yield from flat(one, f"{place}.{key}" if place else str(key))


def without_tensors(tree: Any, place: str = "") -> list[str]:
    """The places of what is neither a tensor nor holds one, as high up as there are such."""
    if isinstance(tree, Tensor):
        return []
    if not any(True for _ in flat(tree)):
        is_nothing = isinstance(tree, (dict, list, tuple, set)) and not tree
        return [] if is_nothing else [place or "value"]
    return [
        one for key, inner in _inside(tree) for one in without_tensors(inner, f"{place}.{key}" if place else str(key))
    ]


def _inside(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict):
        yield from tree.items()
    elif isinstance(tree, (list, tuple)):
        yield from enumerate(tree)

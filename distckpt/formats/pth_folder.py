"""A model in one or several files of ``torch.save``, as Hugging Face cut it before there was safetensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distckpt.errors import DamagedCheckpoint, NoCheckpoint
from distckpt.formats import Snapshot
from distckpt.formats.pth import open_pth
from distckpt.formats.pth_reading import PthFile
from distckpt.formats.shards import boxes_of, narrowed, view_of
from distckpt.formats.stand_ins import stand_in

_Pairs = Sequence[tuple[Tensor, Tensor]]


class PthFolder:
    """Files whose pickles were read, by the restricted reader of ``torch.load(weights_only=True)``.

    It takes no memory, but for a file that only reading it whole tells what it is (one of before torch 1.6, say): that
    is read once more when it is wanted, so that there is one of these at most in memory.

    Attributes:
        url: where they are.
        tensors: what their tensors are called.
        values: what all else in them is called.

    Args:
        files: each with the names that are wanted of it; ``None``: all.

    Raises:
        DamagedCheckpoint: naming the file that is missing, is none, holds what only unpickling could read, no weights
            by name, or not what is wanted of it.
    """

    def __init__(self, path: Path, files: Mapping[str, frozenset[str] | None]) -> None:
        self.url = str(path)
        self.tensors: list[str] = []
        self.values: list[str] = []
        self._held: dict[str, Any] = {}
        self._fills: dict[str, Callable[[_Pairs], None]] = {}
        self._lies_in: dict[int, str] = {}
        for name, wanted in files.items():
            self._open(path / name, wanted)

    def snapshot(self, names: Mapping[str, Mapping[str, str]]) -> Snapshot:
        """Parts of a state, by the names of their keys here; of each tensor what stands for it."""
        return Snapshot({part: {key: self._held[name] for key, name in keys.items()} for part, keys in names.items()})

    def fill(self, targets: _Pairs) -> None:
        """See `distckpt.formats.Opened.fill`. Of each file of which something is wanted all is read, as only that
        proves its bytes, by the checksums in it."""
        by_file: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for standing, target in targets:
            by_file[self._lies_in[id(standing)]].append((standing, target))
        for name in sorted(by_file):
            self._fills[name](by_file[name])

    def _open(self, place: Path, wanted: frozenset[str] | None) -> None:
        file, weights = _opened(place)
        if wanted is not None:
            if lost := wanted - weights.keys():
                raise DamagedCheckpoint(f"{place} does not hold {ascii(min(lost))[:80]}, and its index says so")
            weights = {key: weights[key] for key in weights if key in wanted}
        if twice := weights.keys() & self._held.keys():
            raise DamagedCheckpoint(f"{place} holds {ascii(min(twice))[:80]}, and so does another file of the model")
        if isinstance(file, PthFile):
            self._fills[place.name] = file.fill
        else:
            held = {key: one for key, one in weights.items() if isinstance(one, Tensor)}
            standing = {key: stand_in(tuple(one.shape), one.dtype) for key, one in held.items()}
            self._fills[place.name] = partial(_fill_anew, place, {id(one): key for key, one in standing.items()})
            weights |= standing
        self._held |= weights
        for key, one in weights.items():
            if isinstance(one, Tensor):
                self.tensors.append(key)
                self._lies_in[id(one)] = place.name
            else:
                self.values.append(key)


def _opened(place: Path) -> tuple[Any, dict[str, Any]]:
    """The file, and the weights in it: MMEngine and others keep them under ``state_dict``."""
    try:
        file = open_pth(place)
    except NoCheckpoint as error:
        raise DamagedCheckpoint(f"{place} is missing") from error
    value = file.value
    weights = value.get("state_dict", value) if isinstance(value, dict) else value
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise DamagedCheckpoint(f"{place} holds a {type(weights).__name__}, no weights by name")
    return file, dict(weights)


def _fill_anew(place: Path, keys: Mapping[int, str], targets: _Pairs) -> None:
    _, weights = _opened(place)
    with torch.no_grad():
        for standing, target in targets:
            held = weights.get(keys[id(standing)])
            if not isinstance(held, Tensor) or (held.shape, held.dtype) != (standing.shape, standing.dtype):
                raise DamagedCheckpoint(f"{place} changed while it was read")
            for box in boxes_of(target):
                view_of(target, box).copy_(narrowed(held, box.offsets, box.sizes))

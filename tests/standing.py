"""A state in memory, as a checkpoint that was opened and is still to be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distckpt.formats import Snapshot
from distckpt.formats.savable import identity
from distckpt.formats.stand_ins import stand_in
from distckpt.matching import Matched


class Standing:
    """See `distckpt.formats.Opened`. Tensors that are one in the state are one here, too."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._held: dict[int, Tensor] = {}
        self._standing: dict[Any, Tensor] = {}
        self.snapshot = Snapshot(self._stands(dict(snapshot.shared)), self._stands(dict(snapshot.own)))

    def fill(self, targets: Sequence[tuple[Tensor, Tensor]]) -> None:
        for standing, target in targets:
            held = self._held[id(standing)]
            assert (held.dtype, held.shape) == (target.dtype, target.shape)
            with torch.no_grad():
                target.copy_(held)

    def _stands(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            standing = self._standing.setdefault(identity(value), stand_in(value.shape, value.dtype))
            self._held[id(standing)] = value.detach()
            return standing
        if isinstance(value, dict):
            return {key: self._stands(one) for key, one in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self._stands, value))
        return value


def put_in(matched: Matched, opened: Standing) -> Matched:
    """As a restore does it."""
    matched.judge(matched.unplaced)
    opened.fill(matched.targets)
    matched.apply()
    return matched

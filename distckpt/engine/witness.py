"""What tells whether somebody changed a tensor while it was being copied."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_SAMPLE_BYTES = 256


@dataclass(frozen=True)
class Witness:
    """One tensor as it was when its copy was asked for: its version, and a few of its bytes.

    The version alone misses fused optimizers, BatchNorm and all that writes through ``.data``; bytes alone miss who
    changes only some rows. (No inference tensor is among what is copied late: those have no version.)
    """

    name: str
    offset: int
    tensor: Tensor
    version: int
    samples: Sequence[tuple[int, bytes]]

    @classmethod
    def of(cls, name: str, offset: int, tensor: Tensor) -> Witness:
        """The tensor lies contiguous, and goes to ``offset`` in the arena. Of one on an accelerator no bytes are
        looked at: there the order of streams keeps writers behind the copy."""
        samples: list[tuple[int, bytes]] = []
        if tensor.device.type == "cpu":
            address, count = tensor.data_ptr(), tensor.nbytes
            starts = {0, max(0, count // 2 - _SAMPLE_BYTES), max(0, count - _SAMPLE_BYTES)}
            samples = [(at, _bytes(address + at, min(_SAMPLE_BYTES, count))) for at in sorted(starts)]
        return cls(name, offset, tensor, tensor._version, samples)

    def was_changed(self, base: int) -> bool:
        """Whether its copy, in the arena at the address ``base``, is not what it was."""
        if self.tensor._version != self.version:
            return True
        return any(_bytes(base + self.offset + at, len(was)) != was for at, was in self.samples)

    def differs(self, base: int) -> bool:
        """Whether it is not, now, what its copy is, byte by byte."""
        if self.tensor.device.type != "cpu":
            return False
        return bool(_compare(self.tensor.data_ptr(), base + self.offset, self.tensor.nbytes))


_compare = ctypes.CDLL(None).memcmp
_compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def _bytes(address: int, count: int) -> bytes:
    return ctypes.string_at(address, count)

"""What tells whether somebody changed tensors while they were being copied."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence

from torch import Tensor

_SAMPLE_BYTES = 256

_compare = ctypes.CDLL(None).memcmp
_compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Witnesses:
    """Tensors as they were when their copy was asked for: the version of each, and a few of its bytes.

    The version alone misses fused optimizers, BatchNorm and all that writes through ``.data``; bytes alone miss who
    changes only some rows.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._offsets: list[int] = []
        self._versions: list[int] = []
        self._sizes: list[int] = []
        self._sampled: list[int] = []  # those whose bytes are looked at
        self._samples = b""

    def __len__(self) -> int:
        return len(self._tensors)

    def add(self, tensor: Tensor, offset: int) -> None:
        """It lies contiguous, is larger than two samples, and goes to ``offset`` in the arena."""
        self._tensors.append(tensor)
        self._offsets.append(offset)

    def look(self) -> None:
        """What they are now is what their copies are to be. Of one on an accelerator no bytes are looked at, as that
        would wait for it: a change that its version does not count is found there only where all bytes are compared."""
        self._sampled = [nth for nth, tensor in enumerate(self._tensors) if tensor.is_cpu]
        self._sizes = [tensor.nbytes for tensor in self._tensors]
        self._samples = self._samples_at([self._tensors[nth].data_ptr() for nth in self._sampled])
        self._versions = self._versions_now()

    def changed(self, base: int) -> list[int]:
        """Which of them, in the order in which they were added, have copies, in the arena at the address ``base``,
        that are not what they were."""
        versions = self._versions_now()
        samples = self._samples_at([base + self._offsets[nth] for nth in self._sampled])
        if versions == self._versions and samples == self._samples:
            return []
        found = {nth for nth, pair in enumerate(zip(versions, self._versions, strict=True)) if pair[0] != pair[1]}
        step = 2 * _SAMPLE_BYTES
        for at, nth in zip(range(0, len(samples), step), self._sampled, strict=True):
            if samples[at : at + step] != self._samples[at : at + step]:
                found.add(nth)
        return sorted(found)

    def different(self, base: int) -> list[int]:
        """Which of them are not, now, what their copies are, byte by byte."""
        return [nth for nth in range(len(self)) if self._differs(nth, base)]

    def _differs(self, nth: int, base: int) -> bool:
        tensor, size = self._tensors[nth], self._sizes[nth]
        if not is_there(tensor) or tensor.nbytes != size:
            return True
        return bool(_compare(tensor.detach().cpu().data_ptr(), base + self._offsets[nth], size))

    def _samples_at(self, addresses: Sequence[int]) -> bytes:
        return _samples(addresses, [self._sizes[nth] for nth in self._sampled])

    def _versions_now(self) -> list[int]:
        return [tensor._version for tensor in self._tensors]


def is_there(tensor: Tensor) -> bool:
    """Whether there is memory for all its elements, one behind the other. Who shards by hand takes it away at times."""
    begin = tensor.storage_offset() * tensor.element_size()
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() >= begin + tensor.nbytes


def _samples(addresses: Sequence[int], sizes: Sequence[int]) -> bytes:
    """The first bytes and the last bytes of the memory at each of ``addresses``."""
    if not addresses:
        return b""
    first, end = min(addresses), max(map(operator.add, addresses, sizes))
    # Slices of all that lies between: to make each costs a tenth of a call into C.
    memory = memoryview((ctypes.c_ubyte * (end - first)).from_address(first)).cast("B")
    pieces = []
    for address, size in zip(addresses, sizes, strict=True):
        begin = address - first
        pieces.append(memory[begin : begin + _SAMPLE_BYTES])
        pieces.append(memory[begin + size - _SAMPLE_BYTES : begin + size])
    return b"".join(pieces)

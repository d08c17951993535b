"""What tells whether somebody changed a tensor while it was being copied."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from torch import Tensor

from distckpt.manifest import TensorEntry

_SAMPLE_BYTES = 256

# They keep the GIL: to take it back costs more than a few bytes.
_read = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)

_compare = ctypes.CDLL(None).memcmp
_compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Witness(NamedTuple):
    """One tensor as it was when its copy was asked for: its version, and a few of its bytes.

    The version alone misses fused optimizers, BatchNorm and all that writes through ``.data``; bytes alone miss who
    changes only some rows.
    """

    entry: TensorEntry
    offset: int
    tensor: Tensor
    version: int
    first: bytes
    last: bytes

    @classmethod
    def of(cls, entry: TensorEntry, offset: int, tensor: Tensor, address: int, count: int) -> Witness:
        """The tensor lies contiguous at that address, is larger than a sample, and goes to ``offset`` in the arena. Of
        one on an accelerator no bytes are looked at, as that would wait for it: a change that its version does not
        count is found there by `differs` alone."""
        if not tensor.is_cpu:
            return cls(entry, offset, tensor, tensor._version, b"", b"")
        first, last = _read(address, _SAMPLE_BYTES), _read(address + count - _SAMPLE_BYTES, _SAMPLE_BYTES)
        return cls(entry, offset, tensor, tensor._version, first, last)

    def was_changed(self, base: int) -> bool:
        """Whether its copy, in the arena at the address ``base``, is not what it was."""
        if self.tensor._version != self.version:
            return True
        begin, end = base + self.offset, base + self.offset + self.tensor.nbytes
        return bool(
            _read(begin, len(self.first)) != self.first or _read(end - len(self.last), len(self.last)) != self.last
        )

    def differs(self, base: int) -> bool:
        """Whether it is not, now, what its copy is, byte by byte."""
        if not is_there(self.tensor):
            return True
        here = self.tensor.detach().cpu()
        return bool(_compare(here.data_ptr(), base + self.offset, here.nbytes))


def is_there(tensor: Tensor) -> bool:
    """Whether there is memory for all its elements, one behind the other. Who shards by hand takes it away at times."""
    begin = tensor.storage_offset() * tensor.element_size()
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() >= begin + tensor.nbytes

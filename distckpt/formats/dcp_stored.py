"""How ``torch.save`` says that a tensor lies in its file, read from its pickle without unpickling it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import torch

from distckpt.formats.dcp_pickle import Table, read_pickle


class _Storage(NamedTuple):
    """What a tensor's elements lie in: its record, and how much that holds; bytes, where there is no dtype."""

    key: str
    dtype: torch.dtype | None
    held: int


class Stored(NamedTuple):
    """How the elements of a tensor lie in its record."""

    key: str
    dtype: torch.dtype
    held: int  # how many elements are in the record
    first: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    is_conj: bool
    is_neg: bool

    @property
    def is_plain(self) -> bool:
        """Whether they are all that lies there, in order."""
        dense = [*accumulate(reversed(self.sizes), mul, initial=1)]
        in_order = all(
            size == 1 or stride == one
            for size, stride, one in zip(self.sizes, self.strides, reversed(dense[:-1]), strict=True)
        )
        return in_order and self.first == 0 and self.held == dense[-1] and not (self.is_conj or self.is_neg)


def read_stored(data: bytes) -> tuple[Stored, int]:
    """The tensor that the pickle at the start of ``data`` describes, and where that ends.

    Raises:
        ValueError: where it describes none, or one that only code could make.
    """
    stored, end = read_pickle(data, _TABLE)
    if type(stored) is not Stored:
        raise ValueError("it holds no tensor")
    return stored, end


# What is told of each tensor behind its storage: first, sizes, strides, needs_gradient, hooks.
_OF_EACH = 5


def _storage(told: object) -> _Storage:
    """What is meant by a persistent id."""
    if type(told) is not tuple or len(told) != 5 or told[0] != "storage":
        raise ValueError("a persistent id is none of a storage")
    _, kind, key, _, count = told
    if not isinstance(kind, (torch.dtype, _Untyped)) or type(key) is not str or type(count) is not int or count < 0:
        raise ValueError("a storage is of no kind, or of no size")
    return _Storage(key, kind if isinstance(kind, torch.dtype) else None, count)


def _tensor(
    storage: object,
    first: object,
    sizes: object,
    strides: object,
    needs_gradient: object,
    hooks: object,
    noted: object = None,
) -> Stored:
    """In the place of ``torch._utils._rebuild_tensor_v2``."""
    if type(storage) is not _Storage or storage.dtype is None:
        raise ValueError("a tensor has no storage")
    if type(first) is not int or first < 0 or not _are_extents(sizes) or not _are_extents(strides):
        raise ValueError("a tensor has no shape")
    assert isinstance(sizes, tuple) and isinstance(strides, tuple), "they were looked at"
    if len(sizes) != len(strides):
        raise ValueError("a tensor has other numbers of extents and of strides")
    last = first + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if 0 not in sizes and last >= storage.held:
        raise ValueError(f"the last element of a tensor is {last} of {storage.held}")
    notes = noted if type(noted) is dict else {}
    if not set(notes) <= {"conj", "neg"}:
        raise ValueError("a tensor has notes that are not known here")
    is_conj, is_neg = bool(notes.get("conj")), bool(notes.get("neg"))
    return Stored(storage.key, storage.dtype, storage.held, first, sizes, strides, is_conj, is_neg)


def _tensor_of(storage: object, *told: object) -> Stored:
    """In the place of ``torch._utils._rebuild_tensor_v3``: of bytes, and with their dtype before what is noted."""
    lies, dtype, noted = told[:_OF_EACH], told[_OF_EACH], told[_OF_EACH + 1 :]
    if type(storage) is not _Storage or storage.dtype is not None or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no storage")
    if storage.held % dtype.itemsize:
        raise ValueError(f"{storage.held} bytes are none of {dtype}")
    return _tensor(_Storage(storage.key, dtype, storage.held // dtype.itemsize), *lies, *noted)


def _parameter(tensor: object, needs_gradient: object, hooks: object) -> object:
    """In the place of ``torch._utils._rebuild_parameter``."""
    return tensor


def _are_extents(values: object) -> bool:
    return (
        type(values) is tuple
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < 1 << 59 for value in values)
    )


class _Untyped:
    """Stands for a storage of bytes."""


def _no_hooks() -> dict[str, object]:
    """In the place of the empty ``OrderedDict`` behind each tensor."""
    return {}


_STORAGES: Mapping[str, torch.dtype] = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}

_TABLE = Table(
    makers={
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_of,
        "torch._utils._rebuild_parameter": _parameter,
        "collections.OrderedDict": _no_hooks,
    },
    constants={
        **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
        **{f"torch.{name}": one for name, one in vars(torch).items() if isinstance(one, torch.dtype)},
        "torch.storage.UntypedStorage": _Untyped(),
    },
    of_id=_storage,
)

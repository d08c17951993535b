"""The pickle in a file of ``torch.save``: any value, with its tensors in records of their own."""

from __future__ import annotations

import copyreg
import io
import math
import operator
import pickle
import secrets
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from distckpt.formats.savable import check_savable, identity, is_savable

_PROTOCOL = 2  # of torch.save

# torch.save has its pickler ask for each object, down to the last number, whether it is a storage, to write the opcode
# BINPERSID behind the tuple that stands for one. Here that tuple is followed by a number that occurs nowhere else, and
# the opcode takes its place afterwards: the same bytes, for a fraction of the time.
_NUMBER = 1 << 62 | secrets.randbits(62)
_NUMBER_PICKLED = pickle.dumps(_NUMBER, _PROTOCOL)[2:-1]

# The dtypes that have a kind of storage of their own in a file: those of before torch 1.12.
_STORAGES: Mapping[torch.dtype, type] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
    torch.complex128: torch.ComplexDoubleStorage,
    torch.complex64: torch.ComplexFloatStorage,
}


@dataclass(frozen=True)
class Pickled:
    """What the record ``data.pkl`` holds, and the tensors for the records ``data/0``, ``data/1`` ..., with their sizes
    in bytes."""

    data: bytes
    tensors: Sequence[Tensor]
    sizes: Sequence[int]


class TensorPickler:
    """Pickles as ``torch.save`` does, byte for byte, had it been given the tensors contiguous and on the host.

    It remembers what it said of each tensor, but none of the tensors: the same state is pickled faster the next time.
    """

    def __init__(self) -> None:
        self._said: Sequence[_Said] = ()

    def pickle(self, value: object) -> Pickled:
        """``value``, which may change on return; its tensors are those that were given.

        Tensors that are tied, which read the same memory the same way, have one record. A view has one that holds only
        what it shows. Attributes of a tensor, and what it is a subclass of, are not saved.

        Raises:
            TypeError: naming the place of a value that cannot be pickled, or of a tensor that cannot be saved whole.
        """
        one_pass = _Pass(self._said)
        try:
            pickled = one_pass.pickle(value)
        except Exception as error:  # whatever objects in the state raise when they are asked
            _blame(value, error)
        self._said = one_pass.said
        return pickled


class _Said(NamedTuple):
    """What was said of a tensor, and all that it depends on.

    It is said once in a pickle, at its turn: what stands there twice would be one object when it is read.
    """

    dtype: torch.dtype
    shape: torch.Size
    needs_gradient: bool
    record: int
    name: str
    size_bytes: int
    told: tuple[Any, ...]


class _NoHooks:
    """The empty ``OrderedDict`` that stands behind every tensor, a new one for each."""

    __slots__ = ()
    told = (OrderedDict, ())


class _Inside:
    """The tensor inside of a parameter."""

    __slots__ = ("parameter",)

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter


class _Table(dict[type, Any]):
    """By what objects are taken apart, by their type."""

    def __missing__(self, kind: type) -> Any:
        if issubclass(kind, Tensor):
            return self[nn.Parameter if issubclass(kind, nn.Parameter) else Tensor]
        if issubclass(kind, (torch.storage.TypedStorage, torch.UntypedStorage)):
            return _refuse_storage
        return copyreg.dispatch_table[kind]


class _Pass:
    def __init__(self, said: Sequence[_Said]) -> None:
        self.said: list[_Said] = []
        self._said_before = iter(said)
        self._tensors: list[Tensor] = []  # by record
        self._firsts: list[_Said] = []  # what was said of them
        self._records: dict[int, int] = {}  # by the address that a tensor begins at, that of the first there
        self._views: dict[tuple[Any, ...], int] = {}  # where there are several, each one's

    def pickle(self, value: object) -> Pickled:
        stream = io.BytesIO()
        pickler = pickle.Pickler(stream, _PROTOCOL)
        pickler.dispatch_table = _Table(
            {
                Tensor: self._say,
                nn.Parameter: self._say_parameter,
                _Inside: self._say_inside,
                _NoHooks: operator.attrgetter("told"),
            }
        )
        pickler.dump(value)
        data = stream.getvalue().replace(_NUMBER_PICKLED, pickle.BINPERSID)
        return Pickled(data, self._tensors, [said.size_bytes for said in self._firsts])

    def _say(self, tensor: Tensor) -> tuple[Any, ...]:
        before = next(self._said_before, None)
        address = tensor.data_ptr()  # raises where there can be no memory
        # This is the hot path. Memory somewhere, and a shape and dtype that were found to be savable: so it is.
        if before is not None and address and address not in self._records:
            dtype, shape, needs_gradient, record, _, _, told = before
            is_same = tensor.dtype is dtype and tensor.shape == shape and tensor.requires_grad is needs_gradient
            if is_same and record == len(self._tensors):
                self._records[address] = record
                self._tensors.append(tensor)
                self._firsts.append(before)
                self.said.append(before)
                return told
        return self._say_anew(tensor, tensor.requires_grad)

    def _say_parameter(self, parameter: nn.Parameter) -> tuple[Any, ...]:
        return torch._utils._rebuild_parameter, (_Inside(parameter), parameter.requires_grad, _NoHooks())

    def _say_inside(self, inside: _Inside) -> tuple[Any, ...]:
        next(self._said_before, None)
        return self._say_anew(inside.parameter, False)

    def _say_anew(self, tensor: Tensor, needs_gradient: bool) -> tuple[Any, ...]:
        if not is_savable(tensor):
            raise TypeError("a tensor inside of it cannot be held whole")
        record = self._record_of(tensor)
        is_new = record == len(self._tensors)
        name = str(record) if is_new else self._firsts[record].name  # one object, which is spelled once
        told = _told(tensor.dtype, tensor.shape, needs_gradient, name)
        said = _Said(tensor.dtype, tensor.shape, needs_gradient, record, name, tensor.nbytes, told)
        if is_new:
            self._tensors.append(tensor)
            self._firsts.append(said)
        self.said.append(said)
        return told

    def _record_of(self, tensor: Tensor) -> int:
        """The number of the record that holds ``tensor``: of a new one, if there is none yet."""
        new = len(self._tensors)
        if not tensor.numel():
            return new
        first = self._records.setdefault(tensor.data_ptr(), new)
        if first == new:
            return new
        self._views.setdefault(identity(self._tensors[first]), first)
        return self._views.setdefault(identity(tensor), new)


def _told(dtype: torch.dtype, shape: torch.Size, needs_gradient: bool, name: str) -> tuple[Any, ...]:
    """By what a contiguous tensor of the record ``name`` is put together again."""
    elements = math.prod(shape)
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.append(strides[-1] * max(extent, 1))
    view = (_NUMBER, 0, tuple(shape), tuple(reversed(strides)) if shape else (), needs_gradient, _NoHooks())
    if dtype in _STORAGES:
        storage = ("storage", _STORAGES[dtype], name, "cpu", elements)
        return torch._utils._rebuild_tensor_v2, (storage, *view)
    storage = ("storage", torch.UntypedStorage, name, "cpu", elements * dtype.itemsize)
    return torch._utils._rebuild_tensor_v3, (storage, *view, dtype)


def _refuse_storage(storage: Any) -> NoReturn:
    raise TypeError(f"it is a {type(storage).__name__}, which is no tensor: save a tensor that has it")


def _blame(value: object, error: Exception) -> NoReturn:
    """The error that says which value in ``value`` cannot be pickled."""
    for path, one in _leaves(value):
        path = path or "this value"
        if isinstance(one, Tensor):
            check_savable(one, path)
        try:
            _Pass(()).pickle(one)
        except Exception as reason:  # as above
            raise TypeError(f"{path} cannot be saved: {reason}") from reason
    raise TypeError(f"this state cannot be saved: {error}") from error


def _leaves(value: object) -> Iterator[tuple[str, object]]:
    """What is in ``value`` and no container, each with its place."""
    left: list[tuple[str, object]] = [("", value)]
    seen: set[int] = set()
    while left:
        path, one = left.pop()
        inner: Iterable[tuple[object, object]]
        if isinstance(one, dict):
            inner = one.items()
        elif isinstance(one, (list, tuple, set, frozenset, deque)):
            inner = enumerate(one)
        else:
            yield path, one
            continue
        if id(one) not in seen:
            seen.add(id(one))
            left += reversed([(f"{path}.{key}" if path else str(key), each) for key, each in inner])

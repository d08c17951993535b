"""The form of a state: what stays the same from one save to the next, so that it need not be worked out again."""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distckpt import strict_json
from distckpt.formats import tree
from distckpt.formats.safetensors_file import DTYPES
from distckpt.formats.savable import identity
from distckpt.formats.shards import local_of, spread_of
from distckpt.formats.spread import Range

_TENSORS = (Tensor, nn.Parameter, DTensor, Range)
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)


@dataclass(frozen=True)
class Form:
    """The containers, keys, shapes and dtypes of a state that `distckpt.formats.tree.encode` took apart, and its JSON
    around the values that may change."""

    _compare: _Compare
    _kinds: list[type]
    _likeness: tuple[list[Any], ...]
    _ties: Mapping[int, int]
    _texts: tuple[str, ...]
    keys: Mapping[str, int]  # where each tensor of the file stands among those that `match` finds

    @classmethod
    def of(cls, state: Any, tensors: Mapping[str, Tensor], path: str, *, may_be_spread: bool = False) -> Form | None:
        """The form of ``state``, whose ``tensors`` have these keys; ``None`` where it has values that are not
        remembered: arrays, tensors of rare kinds."""
        compare = _compiled(state)
        found = _Found()
        if compare is None or not compare(state, found):
            return None
        places: dict[int, int] = {}
        for nth, tensor in enumerate(found.tensors):
            places.setdefault(id(tensor), nth)
        ties = _ties_in(found.tensors)
        if ties is None or not all(id(tensor) in places for tensor in tensors.values()):
            return None
        mark = f"mark {secrets.token_hex(8)}"
        value, _, _ = tree.encode(state, path, told=lambda _: mark, may_be_spread=may_be_spread)
        texts = tuple(re.split(json.dumps(mark), strict_json.dump(value).decode()))
        kinds, keys = [*map(type, found.tensors)], {key: places[id(tensor)] for key, tensor in tensors.items()}
        return cls(compare, kinds, _likeness_of(found.tensors), ties, texts, keys)

    def match(self, state: Any) -> tuple[list[Tensor], str] | None:
        """The tensors of ``state``, and its JSON; ``None`` where it has another form."""
        found = _Found()
        if not self._compare(state, found) or [*map(type, found.tensors)] != self._kinds:
            return None
        if _likeness_of(found.tensors) != self._likeness or _ties_in(found.tensors) != self._ties:
            return None
        if len(found.values) != len(self._texts) - 1:
            return None
        return found.tensors, "".join(chain.from_iterable(zip_longest(self._texts, found.values, fillvalue="")))


class _Found:
    """What was met on the way through a state in the places of tensors, and the JSON of the other values."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self.values: list[str] = []


def _likeness_of(tensors: list[Tensor]) -> tuple[list[Any], ...]:
    """What is to stay the same of them. All in one go: they are thousands, and asking one of them takes as long as all
    that is asked."""
    return [one.dtype for one in tensors], [one.shape for one in tensors], [*map(spread_of, tensors)]


# Whether a value has the form that was compiled, but for its tensors; what is found on the way goes to the second.
_Compare = Callable[[Any, _Found], bool]


def _compiled(value: Any) -> _Compare | None:
    if isinstance(value, Tensor):
        return _tensor if type(value) in _TENSORS and value.dtype in DTYPES else None
    if type(value) in _MAPPINGS:
        return _mapping(value)
    if type(value) is list or type(value) in tree.CONTAINERS:
        return _sequence(value)
    return _value


def _tensor(other: Any, found: _Found) -> bool:
    found.tensors.append(other)
    return True


def _tensors(others: Any, found: _Found) -> bool:
    found.tensors += others
    return True


def _mapping(value: dict[Any, Any]) -> _Compare | None:
    kind, keys, kinds = type(value), list(value), [type(key) for key in value]
    inner = [_compiled(one) for one in value.values()]
    if None in inner or not all(one in (str, int) for one in kinds):
        return None
    are_words = all(one is str for one in kinds)
    compare_values = _each(inner)  # type: ignore[arg-type]  # none is None

    def compare(other: Any, found: _Found) -> bool:
        if type(other) is not kind or list(other) != keys or not (are_words or [type(key) for key in other] == kinds):
            return False
        return compare_values(other.values(), found)

    return compare


def _each(inner: list[_Compare]) -> _Compare:
    if inner and all(one is _tensor for one in inner):
        return _tensors

    def compare(others: Any, found: _Found) -> bool:
        return all(one(other, found) for one, other in zip(inner, others, strict=True))

    return compare


def _sequence(value: Any) -> _Compare | None:
    kind = type(value)
    take_apart = list if kind is list else tree.CONTAINERS[kind][1]
    inner = [_compiled(one) for one in take_apart(value)]
    if None in inner:
        return None
    compare_items = _each(inner)  # type: ignore[arg-type]  # none is None

    def compare(other: Any, found: _Found) -> bool:
        if type(other) is not kind or len(items := take_apart(other)) != len(inner):
            return False
        return compare_items(items, found)

    return compare


def _value(other: Any, found: _Found) -> bool:
    kind = type(other)
    if kind is int or kind is str:
        found.values.append(json.dumps(other))
        return True
    if isinstance(other, (Tensor, dict, list)) or kind in tree.CONTAINERS:
        return False
    try:
        told, tensors, _ = tree.encode(other, "")
    except TypeError:  # whoever takes the state apart says where it stands
        return False
    found.values.append(strict_json.dump(told).decode())
    return not tensors


def _ties_in(tensors: list[Tensor]) -> dict[int, int] | None:
    """Which tensors are an earlier one; ``None`` where some lie in the same memory and read it otherwise, or have
    none."""
    ties: dict[int, int] = {}
    known: dict[int, int] = {}
    here = [*map(local_of, tensors)]
    try:
        addresses = [tensor.data_ptr() for tensor in here]
    except RuntimeError:  # one has no memory of its own
        return None
    held = [*filter(None, addresses)]
    if len(set(held)) == len(held) == sum(map(bool, map(Tensor.numel, here))):
        return ties
    for nth, (tensor, address) in enumerate(zip(here, addresses, strict=True)):
        first = known.setdefault(address, nth)
        if first != nth and tensor.numel():
            if identity(here[first]) != identity(tensor):
                return None
            ties[nth] = first
        elif not address and tensor.numel():
            return None
    return ties

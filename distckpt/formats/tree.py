"""State as JSON and tensors: what a ``state_dict`` returns, taken apart and put together again without a pickle.

JSON holds what JSON can hold. A value that it cannot hold becomes an object with one key that begins with ``$``, and
a tensor becomes a reference to a tensor in a file.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distckpt.formats.safetensors_file import DTYPES
from distckpt.formats.savable import check_savable, identity, is_savable
from distckpt.formats.shards import bytes_of, local_of, unwrapped, views_of

_TENSOR = "$tensor"
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_ARRAYS = frozenset(map(np.dtype, "?bBhHiIlLefdFD"))  # the numbers that torch has too, in this machine's byte order


def encode(
    value: Any, path: str, *, told: Callable[[Any], Any] | None = None, may_be_spread: bool = False
) -> tuple[Any, dict[str, Tensor], dict[str, str]]:
    """``value`` as JSON; the tensors that it refers to, by key; and for keys that are no tensor's because another
    tensor has the same memory, that one's key. No tensor is copied, and nothing else refers to ``value``.

    A tensor's key is its place in ``value``, with dots: for the flat dict of a module these are the parameter names.

    Args:
        told: what stands there for the JSON of each value that is no tensor, container, or key.
        may_be_spread: whether tensors may lie on several ranks.

    Raises:
        TypeError: naming the place, below ``path``, of a value that cannot be stored without a pickle, or of a tensor
            that cannot be stored whole.
    """
    found = _Found(path, told or _as_it_is, may_be_spread=may_be_spread)
    return _encode(value, "", found), found.tensors, found.aliases


def without(value: Any, keys: Collection[str], path: str) -> Any:
    """``value``, as `encode` returns it, without the tensors of these ``keys``.

    Raises:
        TypeError: naming one, below ``path``, that is the element of a list, which would become shorter.
    """
    if type(value) is list:
        for one in value:
            if _refers_to(one, keys):
                raise TypeError(f"{path}.{_key_in(one)} is in a list, and cannot be left out of it")
        return [without(one, keys, path) for one in value if not _is_pair_of(one, keys)]
    if type(value) is dict:
        return {key: without(one, keys, path) for key, one in value.items() if not _refers_to(one, keys)}
    return value


def _is_pair_of(value: Any, keys: Collection[str]) -> bool:
    """Whether it is the item of a dict that JSON cannot hold as one, and one of ``keys`` its value."""
    return type(value) is list and len(value) == 2 and _refers_to(value[1], keys)


def _refers_to(value: Any, keys: Collection[str]) -> bool:
    return type(value) is dict and _TENSOR in value and _key_in(value) in keys


def _key_in(value: dict[str, Any]) -> str:
    told = value[_TENSOR]
    return told if type(told) is str else told[0]


class Reference(NamedTuple):
    """What JSON says of a tensor in a file.

    Attributes:
        dtype, shape: what its bytes are where the file has no word for that; ``None`` where the file says it itself.
        is_array: whether it was an array of NumPy, and is to be one again.
    """

    key: str
    dtype: torch.dtype | None = None
    shape: torch.Size = torch.Size()
    is_array: bool = False


def decode(value: Any, find: Callable[[Reference], Any]) -> Any:
    """The inverse of `encode`, where ``find`` returns what takes the place of a reference. Types and the order of keys
    are what they were, but that a defaultdict comes back as a dict, a bytearray as bytes, and a number of NumPy as
    Python's.

    Raises:
        ValueError: where ``value`` is not what `encode` returns, or ``find`` knows no such tensor.
    """
    try:
        return _decode(value, find)
    except (LookupError, TypeError, AttributeError, OverflowError, RuntimeError) as error:  # torch's among them
        raise ValueError(f"this is no state of ours ({type(error).__name__}: {error})") from error


class _Found:
    """The tensors that were met so far."""

    def __init__(self, path: str, told: Callable[[Any], Any], *, may_be_spread: bool) -> None:
        self.path = path
        self.told = told
        self._may_be_spread = may_be_spread
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self._known: dict[int, dict[str, Tensor]] = {}  # by their address

    def refer(self, tensor: Tensor, place: str) -> Any:
        """What stands for ``tensor`` at ``place``."""
        key = place or "value"
        tensor = unwrapped(tensor) if self._may_be_spread else tensor
        mine = local_of(tensor) if self._may_be_spread else tensor
        for one in views_of(tensor) if self._may_be_spread else (tensor,):
            if not is_savable(one):
                check_savable(one, self.where(place))
        while key in self.tensors or key in self.aliases or key == "__metadata__":  # {"a": {"b": t}, "a.b": t}
            key += "'"
        known = self._tied(mine, key)
        dtype = tensor.dtype
        if known is not key:
            self.aliases[key] = known
        elif dtype in DTYPES:
            self.tensors[key] = tensor
        else:  # what safetensors has no word for lies there as plain bytes, and its type here
            self.tensors[key] = bytes_of(tensor)
        return known if dtype in DTYPES else [known, str(dtype), list(tensor.shape)]

    def _tied(self, tensor: Tensor, key: str) -> str:
        """The key of a tensor that is this one; ``key``, if there is none yet."""
        there = self._known.setdefault(tensor.data_ptr(), {})
        if there and tensor.numel():
            mine = identity(tensor)
            for other, known in there.items():
                if identity(known) == mine:
                    return other
        there[key] = tensor
        return key

    def where(self, place: str) -> str:
        """The name of ``place``, for people."""
        return f"{self.path}.{place}" if place else self.path


def _encode(value: Any, place: str, found: _Found) -> Any:
    if isinstance(value, Tensor):
        return {_TENSOR: found.refer(value, place)}
    if value is None or type(value) in (bool, int, str):
        return found.told(value)
    if type(value) is float:
        return found.told(value if math.isfinite(value) else {"$float": repr(value)})
    if has_plain_keys(value):
        inside = f"{place}." if place else ""
        return {key: _encode(one, inside + key, found) for key, one in value.items()}
    if type(value) is list:
        return [_encode(one, _within(place, nth), found) for nth, one in enumerate(value)]
    if type(value) in CONTAINERS:
        name, take_apart, _ = CONTAINERS[type(value)]
        return {name: [_encode(one, _within(place, nth), found) for nth, one in enumerate(take_apart(value))]}
    if isinstance(value, dict) and type(value) in (dict, OrderedDict, defaultdict, Counter):
        kind = {OrderedDict: "$ordered", Counter: "$counter"}.get(type(value), "$dict")
        pairs = value.items()
        return {
            kind: [
                [_encode_key(key, _within(place, "key"), found), _encode(one, _within(place, key), found)]
                for key, one in pairs
            ]
        }
    return _encode_rarely(value, place, found)


def has_plain_keys(value: Any) -> bool:
    """Whether it is a dict that JSON can hold as one."""
    return type(value) is dict and all(type(key) is str and not key.startswith("$") for key in value)


def _encode_key(key: Any, place: str, found: _Found) -> Any:
    if type(key) in (str, int):
        return key
    told, found.told = found.told, _as_it_is
    try:
        return _encode(key, place, found)
    finally:
        found.told = told


def _as_it_is(value: Any) -> Any:
    return value


def _within(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def _encode_rarely(value: Any, place: str, found: _Found) -> Any:
    if isinstance(value, (bytes, bytearray)):
        return found.told({"$bytes": base64.b64encode(value).decode()})
    if isinstance(value, np.generic) and value.dtype.kind in "biufU" and type(value.item()) in (bool, int, float, str):
        return _encode(value.item(), place, found)
    if isinstance(value, np.ndarray) and value.dtype in _ARRAYS and not isinstance(value, np.ma.MaskedArray):
        return {"$numpy": found.refer(torch.from_numpy(np.array(value, order="C")), place)}
    if isinstance(value, torch.dtype):
        return found.told({"$dtype": str(value)})
    if isinstance(value, torch.device):
        return found.told({"$device": str(value)})
    raise TypeError(
        f"{found.where(place)} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be stored "
        "without a pickle: return numbers, strings, tensors, lists and dicts from state_dict()"
    )


def _decode(value: Any, find: Callable[[Reference], Any]) -> Any:
    if type(value) is not dict:
        return [_decode(one, find) for one in value] if type(value) is list else value
    if len(value) == 1 and type(key := value.get(_TENSOR)) is str:  # most of all
        return find(Reference(key))
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: _decode(one, find) for key, one in value.items()}
    ((kind, inner),) = value.items()
    if kind in (_TENSOR, "$numpy"):
        return find(_reference(inner, is_array=kind == "$numpy"))
    for name, _, put_together in CONTAINERS.values():
        if kind == name:
            return put_together([_decode(one, find) for one in _listed(inner)])
    return _PUT_TOGETHER[kind](_decode(inner, find))


def _reference(told: Any, *, is_array: bool) -> Reference:
    if type(told) is str:
        return Reference(told, is_array=is_array)
    key, dtype, shape = told
    if type(key) is not str:
        raise TypeError(f"{ascii(key)[:80]} is no key of a tensor")
    return Reference(key, _DTYPES[dtype], _size(shape), is_array)


def _listed(value: Any) -> list[Any]:
    if type(value) is not list:
        raise TypeError(f"{ascii(value)[:80]} is no list")
    return value


def _paired(value: Any) -> list[tuple[Any, Any]]:
    return [(key, one) for key, one in map(_listed, _listed(value))]


def _size(extents: list[Any]) -> torch.Size:
    if not all(type(one) is int and 0 <= one < 1 << 63 for one in extents):
        raise TypeError(f"{ascii(extents)[:80]} is no size")
    return torch.Size(extents)


# type: (name, to a list, from a list)
CONTAINERS: dict[type, tuple[str, Callable[[Any], Any], Callable[[list[Any]], Any]]] = {
    tuple: ("$tuple", list, tuple),
    torch.Size: ("$size", list, _size),
    set: ("$set", lambda value: sorted(value, key=repr), set),
    frozenset: ("$frozenset", lambda value: sorted(value, key=repr), frozenset),
    deque: ("$deque", lambda value: [value.maxlen, list(value)], lambda told: deque(told[1], told[0])),
}

_PUT_TOGETHER: dict[str, Callable[[Any], Any]] = {
    "$float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}.__getitem__,
    "$bytes": lambda text: base64.b64decode(text, validate=True),
    "$dtype": _DTYPES.__getitem__,
    "$device": torch.device,
    "$dict": lambda pairs: dict(_paired(pairs)),
    "$ordered": lambda pairs: OrderedDict(_paired(pairs)),
    "$counter": lambda pairs: Counter(dict(_paired(pairs))),
}

"""JSON as distckpt writes it, read back without trusting it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

# What is read whole into memory is bounded, whatever the file claims to be.
LIMIT_BYTES = 256 * 1024 * 1024


def dump(value: object) -> bytes:
    """``value`` as ASCII JSON, one line, finite numbers only.

    Raises:
        TypeError, ValueError: for what JSON cannot hold, NaN and infinities included.
    """
    return json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def load(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in ``data``. It has no duplicate keys and no NaN, and parsing it was bounded.

    Raises:
        ValueError: naming ``what``, for everything else.
    """
    try:
        # Python would also guess at UTF-16 and take a byte order mark, which no other reader of ours does.
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object")
    return value


def take(fields: Mapping[str, Any], key: str, kind: type[T], what: str) -> T:
    """The value of ``key``, of exactly the type ``kind`` (``True`` is no integer here).

    Raises:
        ValueError: where it is missing or of another type.
    """
    value = fields.get(key)
    if type(value) is int and kind is float:
        value = _to_float(value)
    if type(value) is not kind:
        raise ValueError(f"{what}: {key!r} should be {kind.__name__}, is {ascii(value)[:80]}")
    return value


def exactly(fields: Any, kinds: Mapping[str, type], what: str) -> dict[str, Any]:
    """The values of these keys, of exactly these types.

    Raises:
        ValueError: where there are other keys, or one is missing or of another type.
    """
    if type(fields) is not dict or fields.keys() != kinds.keys():
        raise ValueError(f"{what}: {ascii(fields)[:80]} should have exactly {', '.join(kinds)}")
    return {key: take(fields, key, kind, what) for key, kind in kinds.items()}


def _to_float(value: int) -> float | int:
    try:
        return float(value)
    except OverflowError:
        return value  # refused, as no float


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0.0:
        raise ValueError(f"{text} is out of range")
    return value

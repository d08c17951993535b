"""What one rank holds of a job's tensors, told in few bytes, and read back by the leader."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from distckpt import strict_json
from distckpt.formats.boxes import Ints
from distckpt.formats.safetensors_file import DTYPES
from distckpt.formats.shards import Box, boxes_of
from distckpt.manifest import digest


class Kind(NamedTuple):
    """What is the same on all ranks that know a tensor."""

    key: str
    nth: int  # of the boxes that a rank has of it, as a rule there is one
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Holding:
    """What one rank holds.

    Attributes:
        kinds: sorted.
        boxes: its box of each; ``None`` where it has no element of it.
    """

    kinds: Sequence[Kind]
    boxes: Sequence[Box | None]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Holding:
        """What this rank has of these tensors, of dtypes in `DTYPES`."""
        found: list[tuple[Kind, Box | None]] = []
        for key, tensor in tensors.items():
            dtype, shape = DTYPES[tensor.dtype], tuple(tensor.shape)
            boxes: Sequence[Box | None] = boxes_of(tensor) or (None,)
            found += [(Kind(key, nth, dtype, shape), box) for nth, box in enumerate(boxes)]
        found.sort(key=lambda one: one[0])
        return cls([kind for kind, _ in found], [box for _, box in found])

    def schema(self) -> bytes:
        """Its kinds as JSON."""
        return strict_json.dump([list(kind) for kind in self.kinds])

    def tell(self, *, is_schema_told: bool) -> dict[str, Any]:
        """It, for `Told.parse`. Of many ranks that know the same tensors one tells what they are."""
        rows: dict[Box | None, int] = {}
        ids = [rows.setdefault(box, len(rows)) for box in self.boxes]
        most = max((len(kind.shape) for kind in self.kinds), default=0)
        table = np.array([_row(box, most) for box in rows], dtype=np.int64).reshape(len(rows), 2 * most + 1)
        schema = self.schema()
        return {
            "schema": digest(schema),
            "text": _packed(schema) if is_schema_told else "",
            "rows": _packed(table.tobytes()),
            "ids": pack_numbers(np.array(ids)),
            "most": most,
        }


@dataclass(frozen=True)
class Told:
    """What a rank told of what it holds.

    Attributes:
        rows: the boxes that occur: whether there is one, its offsets, its sizes.
        ids: of each tensor, which row.
    """

    schema: str
    kinds: Sequence[Kind] | None
    rows: Ints
    ids: Ints
    most: int

    @classmethod
    def parse(cls, told: Mapping[str, Any]) -> Told:
        most = told["most"]
        rows = np.frombuffer(_unpacked(told["rows"]), dtype=np.int64).reshape(-1, 2 * most + 1)
        kinds = _kinds(told["text"]) if told["text"] else None
        return cls(told["schema"], kinds, rows, unpack_numbers(told["ids"]), most)


def pack_numbers(numbers: Ints) -> str:
    """Small numbers as text."""
    return _packed(numbers.astype(np.uint32).tobytes())


def unpack_numbers(text: str) -> Ints:
    """The inverse of `pack_numbers`."""
    return np.frombuffer(_unpacked(text), dtype=np.uint32).astype(np.int64)


def _kinds(text: str) -> list[Kind]:
    told = strict_json.load(b'{"kinds":' + _unpacked(text) + b"}", "what a rank holds")["kinds"]
    return [Kind(key, nth, dtype, tuple(shape)) for key, nth, dtype, shape in told]


def _row(box: Box | None, most: int) -> list[int]:
    if box is None:
        return [0] * (2 * most + 1)
    rest = [0] * (most - len(box.offsets))
    return [1, *box.offsets, *rest, *box.sizes, *rest]


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 1)).decode()


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))

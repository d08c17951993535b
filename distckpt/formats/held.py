"""What one rank holds of a job's tensors, told in few bytes, and read back by the leader."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from distckpt import strict_json
from distckpt.formats.boxes import Ints
from distckpt.formats.safetensors_file import DTYPES
from distckpt.formats.shards import boxes_of
from distckpt.formats.spread import Box
from distckpt.manifest import digest

Shape = tuple[int, ...]


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
        """What this rank has of these tensors, of dtypes in `DTYPES`.

        Raises:
            TypeError: naming one of which it cannot be said.
        """
        found: list[tuple[Kind, Box | None]] = []
        for key, tensor in tensors.items():
            try:
                boxes: Sequence[Box | None] = boxes_of(tensor) or (None,)
            except TypeError as error:
                raise TypeError(f"{ascii(key)[1:-1][:120]} cannot be saved: {error}") from error
            dtype, shape = DTYPES[tensor.dtype], tuple(tensor.shape)
            found += [(Kind(key, nth, dtype, shape), box) for nth, box in enumerate(boxes)]
        found.sort(key=lambda one: one[0])
        return cls([kind for kind, _ in found], [box for _, box in found])

    def schema(self) -> bytes:
        """Its kinds, in few bytes."""
        return self._schema

    def tell(self, *, is_schema_told: bool) -> dict[str, Any]:
        """It, for `Told.parse`, as JSON. Of many ranks that know the same tensors one tells what they are.

        The boxes that it has of tensors of one shape are told once each. As a rule there is one, whatever the rank: so
        which one it has of each tensor is a row of zeros, and what a rank tells grows with the shapes that there are.
        """
        rows: dict[Shape, dict[Box | None, int]] = {}
        which = []
        for kind, box in zip(self.kinds, self.boxes, strict=True):
            if (known := rows.get(kind.shape)) is None:
                known = rows[kind.shape] = {}
            which.append(known.setdefault(box, len(known)))
        tables: dict[int, list[Sequence[int]]] = {}
        for shape in sorted(rows, key=len):
            tables.setdefault(len(shape), []).extend(_row(box, len(shape)) for box in rows[shape])
        return {
            "schema": digest(self._schema),
            "text": _packed(self._schema) if is_schema_told else "",
            "which": pack_numbers(np.array(which, dtype=np.int64)) if any(which) else "",
            "rows": [[dims, _packed_by_column(table)] for dims, table in tables.items()],
        }

    @cached_property
    def _schema(self) -> bytes:
        shapes: dict[tuple[str, Shape], int] = {}
        of = [shapes.setdefault((kind.dtype, kind.shape), len(shapes)) for kind in self.kinds]
        several = {nth: kind.nth for nth, kind in enumerate(self.kinds) if kind.nth}
        told = {"keys": [kind.key for kind in self.kinds], "of": of, "shapes": [*shapes], "several": [*several.items()]}
        return strict_json.dump(told)


@dataclass(frozen=True)
class Told:
    """What a rank told of what it holds.

    Attributes:
        schema: the digest of its kinds.
        kinds: where it told them.
        which: as text, of each of its tensors the how-manieth of the boxes that this rank has of that shape it has.
            Nothing, where that is the first one of each.
        rows: the boxes of each shape, one after another: whether it has it, its offsets, its sizes. `Rows` tells where.
    """

    schema: str
    kinds: Sequence[Kind] | None
    which: str
    rows: Ints

    @classmethod
    def parse(cls, told: Mapping[str, Any]) -> Told:
        """What was told."""
        kinds = _kinds(_unpacked(told["text"])) if told["text"] else None
        rows = [_unpacked_by_column(packed, 1 + 2 * dims) for dims, packed in told["rows"]]
        return cls(told["schema"], kinds, told["which"], np.concatenate(rows) if rows else np.empty(0, np.int64))


class Rows:
    """Where ranks that know the same tensors tell of them.

    Attributes:
        shapes: of the tensors, each once, those of few dimensions first, as they are told.
        shape_of: of each tensor, which it is.
    """

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self.shapes = sorted(dict.fromkeys(kind.shape for kind in kinds), key=len)
        numbers = {shape: number for number, shape in enumerate(self.shapes)}
        self.shape_of = np.array([numbers[kind.shape] for kind in kinds], dtype=np.int64)
        self._widths = np.array([1 + 2 * len(shape) for shape in self.shapes], dtype=np.int64)

    def begins(self, which: str) -> Ints:
        """Of each tensor where its box begins among the rows of a rank that told that."""
        nth = unpack_numbers(which).astype(np.int64) if which else np.zeros(len(self.shape_of), dtype=np.int64)
        counts = np.zeros(len(self.shapes), dtype=np.int64)
        np.maximum.at(counts, self.shape_of, nth + 1)
        sizes = counts * self._widths
        begins: Ints = (np.cumsum(sizes) - sizes)[self.shape_of] + nth * self._widths[self.shape_of]
        return begins


def pack_numbers(numbers: np.ndarray) -> str:
    """Numbers as text: whole ones that are not below zero, in as few bytes as the largest of them needs, or others."""
    if numbers.dtype.kind != "f":
        numbers = numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))
    # The first bytes of all, then the second ones: numbers that are near each other differ in few of these.
    together = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, numbers.itemsize).T
    return f"{numbers.dtype.str[1:]}:{_packed(together.tobytes())}"


def unpack_numbers(text: str) -> np.ndarray:
    """The inverse of `pack_numbers`, in one dimension."""
    name, _, packed = text.partition(":")
    dtype = np.dtype(name)
    together = np.frombuffer(_unpacked(packed), dtype=np.uint8).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(together.T).view(dtype).ravel()


def _kinds(schema: bytes) -> list[Kind]:
    told = strict_json.load(schema, "what a rank holds")
    shapes = [(dtype, tuple(shape)) for dtype, shape in told["shapes"]]
    nths = dict(told["several"])
    kinds = zip(told["keys"], told["of"], strict=True)
    return [Kind(key, nths.get(number, 0), *shapes[of]) for number, (key, of) in enumerate(kinds)]


def _row(box: Box | None, dims: int) -> Sequence[int]:
    return (0,) * (1 + 2 * dims) if box is None else (1, *box.offsets, *box.sizes)


def _packed_by_column(table: Sequence[Sequence[int]]) -> str:
    """Rows of numbers as text. What is in one column is alike, so that it takes a third of the room together."""
    return pack_numbers(np.array(table, dtype=np.int64).T)


def _unpacked_by_column(text: str, columns: int) -> np.ndarray:
    """The numbers of the rows, one row after another."""
    return unpack_numbers(text).reshape(columns, -1).T.ravel()


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 1)).decode()


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))

"""Which chunks of a tensor a box of it consists of, by how the manifest says that it is cut."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple, Protocol

import numpy as np

from distckpt.chunks import Chunks, Grid
from distckpt.formats.boxes import Ints, fault, overlaps

Extents = tuple[int, ...]


class Overlap(NamedTuple):
    """The how-manieth of the chunks it is, its sizes, and what of it is in a box: from where on in the chunk, from
    where on in the box, how much."""

    nth: int
    sizes: Extents
    low: Extents
    begins: Extents
    shared: Extents


class Tiling(Protocol):
    """A tensor, each element of which is in one chunk."""

    def overlaps(self, offsets: Extents, sizes: Extents) -> list[Overlap]:
        """What that box of it consists of, none of which is empty."""
        ...


def tiling_of(shape: Extents, chunks: Chunks | Grid | None) -> Tiling:
    """A tensor of that shape, cut into chunks, or whole. What a `Grid` promises is taken as read.

    Raises:
        ValueError: where some element is in no chunk, or in several.
    """
    if isinstance(chunks, Grid):
        if chunks.shape != shape:
            raise ValueError(f"its parts are those of one of shape {chunks.shape}")
        return _Cells(shape, chunks.starts)
    return _Any(shape, chunks) if chunks else _Cells(shape, (range(1),) * len(shape))


class _Cells:
    def __init__(self, shape: Extents, starts: Sequence[Sequence[int]]) -> None:
        self._shape, self._starts = shape, starts
        counts = [len(of) for of in starts]
        self._steps = [math.prod(counts[dim + 1 :]) for dim in range(len(counts))]

    def overlaps(self, offsets: Extents, sizes: Extents) -> list[Overlap]:
        if not math.prod(sizes):
            return []
        if not sizes:
            return [Overlap(0, (), (), (), ())]
        found = []
        for cell in product(*map(_span, self._starts, self._shape, self._steps, offsets, sizes)):
            numbers, extents, low, begins, shared = zip(*cell, strict=True)
            found.append(Overlap(sum(numbers), extents, low, begins, shared))
        return found


def _span(starts: Sequence[int], extent: int, step: int, begin: int, size: int) -> list[tuple[int, int, int, int, int]]:
    """The parts of a dimension that a range of it is in: what each adds to the number of a cell, its size, and from
    where on in it, from where on in the range, and how much of it that is."""
    if len(starts) == 1:
        return [(0, extent, begin, 0, size)]
    end = begin + size
    found = []
    for nth in range(bisect_right(starts, begin) - 1, bisect_left(starts, end)):
        start = starts[nth]
        stop = starts[nth + 1] if nth + 1 < len(starts) else extent
        low, high = max(start, begin), min(stop, end)
        found.append((nth * step, stop - start, low - start, low - begin, high - low))
    return found


class _Any:
    def __init__(self, shape: Extents, chunks: Chunks) -> None:
        try:
            self._offsets, self._sizes = (
                np.array(numbers, dtype=np.int64).reshape(len(chunks.files), len(shape))
                for numbers in (chunks.offsets, chunks.sizes)
            )
        except OverflowError as error:
            raise ValueError(f"a part of it lies outside of it: {error}") from error
        if told := fault(shape, self._offsets, self._sizes):
            raise ValueError(told)

    def overlaps(self, offsets: Extents, sizes: Extents) -> list[Overlap]:
        if not math.prod(sizes):
            return []
        found, low, high = overlaps(offsets, sizes, self._offsets, self._sizes)
        begins: Ints = low - np.array(offsets, dtype=np.int64)
        columns = (self._sizes[found], low - self._offsets[found], begins, high - low)
        return [
            Overlap(number, *(tuple(row) for row in rows))
            for number, *rows in zip(found.tolist(), *(column.tolist() for column in columns), strict=True)
        ]

"""Which chunks of a tensor a box of it consists of, by how the manifest says that it is cut."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
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
    return _Any(shape, chunks) if chunks else _Cells(shape, ())


class _Cells:
    def __init__(self, shape: Extents, starts: Sequence[Sequence[int]]) -> None:
        self._shape = shape
        self._cuts: list[tuple[int, Sequence[int], int]] = []  # each dimension that is cut, where, and between cells
        step = 1
        for dim in reversed(range(len(starts))):
            if len(starts[dim]) > 1:
                self._cuts.insert(0, (dim, starts[dim], step))
                step *= len(starts[dim])

    def overlaps(self, offsets: Extents, sizes: Extents) -> list[Overlap]:
        if 0 in sizes:
            return []
        found = [Overlap(0, self._shape, offsets, (0,) * len(sizes), sizes)]
        for dim, starts, step in self._cuts:
            spans = _spans(starts, self._shape[dim], offsets[dim], sizes[dim])
            found = [_within(one, dim, step, span) for one in found for span in spans]
        return found


# The how-manieth part of a dimension it is, its size, and what of it is in a range, as in `Overlap`.
_Span = tuple[int, int, int, int, int]


def _spans(starts: Sequence[int], extent: int, begin: int, size: int) -> list[_Span]:
    """The parts of a dimension that a range of it is in."""
    end = begin + size
    first, last = bisect_right(starts, begin) - 1, bisect_left(starts, end)
    edges = (*starts[first:last], starts[last] if last < len(starts) else extent)
    found = []
    for nth, (start, stop) in enumerate(pairwise(edges), first):
        low, high = max(start, begin), min(stop, end)
        found.append((nth, stop - start, low - start, low - begin, high - low))
    return found


def _within(one: Overlap, dim: int, step: int, span: _Span) -> Overlap:
    """What of it is in that part of a dimension."""
    nth, size, low, begin, shared = span
    rest = dim + 1
    return Overlap(
        one.nth + nth * step,
        one.sizes[:dim] + (size,) + one.sizes[rest:],
        one.low[:dim] + (low,) + one.low[rest:],
        one.begins[:dim] + (begin,) + one.begins[rest:],
        one.shared[:dim] + (shared,) + one.shared[rest:],
    )


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

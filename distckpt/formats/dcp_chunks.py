"""A tensor that lies in parts, in files that other libraries wrote: that they are all of it, and which of them are in a
box of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from distckpt.formats.boxes import Ints, fault, overlaps
from distckpt.formats.dcp_metadata import Place
from distckpt.formats.safetensors_file import DTYPES

_MOST_DIMENSIONS = 64
_DTYPES = frozenset({*DTYPES, torch.complex128, torch.complex32})


class Piece(NamedTuple):
    """A part of a tensor, and what of it is in a box: from where to where, in the part and in the box."""

    place: Place
    sizes: tuple[int, ...]
    low: tuple[int, ...]
    begins: tuple[int, ...]
    shared: tuple[int, ...]


class Chunked:
    """A tensor of which all elements are there, each once.

    Args:
        chunks: of each part its offsets and sizes, and its place. Those that are empty are passed over: a rank that has
            no rows of a tensor may have written none.

    Raises:
        ValueError: where that is not so, or where there can be no such tensor here.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        chunks: Sequence[tuple[tuple[int, ...], tuple[int, ...], Place]],
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"it is of {str(dtype).removeprefix('torch.')}, which cannot be read here")
        if len(shape) > _MOST_DIMENSIONS or math.prod(filter(None, shape)) * dtype.itemsize >= 1 << 59:
            raise ValueError(f"it has the shape {shape}, as no tensor has")
        self.dtype = dtype
        self.shape = shape
        held = [one for one in chunks if 0 not in one[1]]
        self._places = [place for _, _, place in held]
        self._offsets = _rows([offsets for offsets, _, _ in held], shape)
        self._sizes = _rows([sizes for _, sizes, _ in held], shape)
        if 0 in shape:
            if held:
                raise ValueError("it has no elements, and a part of it has some")
        elif told := fault(shape, self._offsets, self._sizes):
            raise ValueError(f"it is not whole: {told}")

    @property
    def places(self) -> Iterator[tuple[Place, tuple[int, ...]]]:
        """Where its parts lie, and how large each is."""
        return zip(self._places, map(tuple, self._sizes.tolist()), strict=True)

    def pieces_in(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[Piece]:
        """What that box consists of."""
        if 0 in sizes:
            return
        found, low, high = overlaps(offsets, sizes, self._offsets, self._sizes)
        columns = (self._sizes[found], low - self._offsets[found], low - np.array(offsets, np.int64), high - low)
        for number, *rows in zip(found.tolist(), *(column.tolist() for column in columns), strict=True):
            yield Piece(self._places[number], *map(tuple, rows))


def _rows(numbers: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> Ints:
    return np.array(numbers, dtype=np.int64).reshape(len(numbers), len(shape))

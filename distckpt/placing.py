"""Images written into new files from pieces of tensors, in whatever order these come."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distckpt.formats import Image, Piece, Sum
from distckpt.formats.streaming import PIECE_BYTES, runs
from distckpt.stores.new_file import NewFile, new_file

try:
    from isal.isal_zlib import crc32
except ImportError:  # slower, and nothing else
    from zlib import crc32

_SUM_BYTES = 4


def place(root: Path, images: Sequence[Image], pieces: Iterable[Piece], standing: Mapping[int, Tensor]) -> None:
    """The images are files below the folder ``root``, or the file ``root``, and durable. Takes as much memory as a
    piece, and once more where the tensors of an image are of another dtype than the pieces.

    Args:
        pieces: all elements of all tensors.
        standing: for each tensor of an image, by its ``id``, what the pieces say that they are of.

    Raises:
        OSError: where a file is there already, or cannot be written.
        What the pieces do.
    """
    spots: defaultdict[int, list[_Spot]] = defaultdict(list)
    sums: list[_RunningSum] = []
    with ExitStack() as stack:
        for image in images:
            file = stack.enter_context(new_file(root / image.path if image.path else root, image.size_bytes))
            for at, text in image.texts:
                file.write_at(at, text)
            begun = {one.begin: _RunningSum(file, one) for one in image.sums}
            sums += begun.values()
            for tensor, offset in zip(image.tensors, image.offsets, strict=True):
                spots[id(standing[id(tensor)])].append(_Spot(file, offset, tensor.dtype, begun.get(offset)))
        for piece in pieces:
            for spot in spots[id(piece.chunk.standing)]:
                spot.take(piece)
        for one in sums:
            one.fill_in()


class _RunningSum:
    """A checksum, worked out while what it is of is written: mostly from its begin to its end."""

    def __init__(self, file: NewFile, told: Sum) -> None:
        self._file = file
        self._told = told
        self._at = told.begin
        self._value = 0

    def take(self, offset: int, data: memoryview) -> None:
        """``data`` was written there."""
        if offset == self._at:
            self._value = crc32(data, self._value)
            self._at += len(data)

    def fill_in(self) -> None:
        """It stands in the file, once everything was written. What did not come in order is read again for it."""
        while (left := self._told.end - self._at) > 0:
            data = memoryview(bytearray(min(left, PIECE_BYTES)))
            self._file.read_at(self._at, data)
            self.take(self._at, data)
        for offset in self._told.places:
            self._file.write_at(offset, self._value.to_bytes(_SUM_BYTES, "little"))


@dataclass(frozen=True)
class _Spot:
    """Where a tensor goes."""

    file: NewFile
    offset: int
    dtype: torch.dtype
    sum: _RunningSum | None

    def take(self, piece: Piece) -> None:
        elements = piece.elements.to(self.dtype)
        data = elements.view(torch.uint8).numpy().data
        width = self.dtype.itemsize
        for at, begin, count in runs(piece):
            part = data[begin * width : (begin + count) * width]
            self.file.write_at(self.offset + at * width, part)
            if self.sum is not None:
                self.sum.take(self.offset + at * width, part)

"""A file of ``torch.save`` that is read whole, into memory, since nothing less tells what it is: one of before torch
1.6, or with tensors of other kinds than strided ones, or a damaged one."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, cast

import torch
import xxhash
from torch import Tensor

from distckpt.errors import DamagedCheckpoint
from distckpt.formats import Piece
from distckpt.formats.hashing import Hash
from distckpt.formats.pth_unpickling import load
from distckpt.formats.streaming import whole
from distckpt.manifest import FileEntry
from distckpt.stores import Source, Store

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PIECE_BYTES = 16 * 1024 * 1024


class PthInMemory:
    """As `distckpt.formats.pth_reading.PthFile`, with the tensors themselves as what stands for them.

    Raises:
        DamagedCheckpoint: where it is not what was meant, no file of ``torch.save``, or holds what only unpickling
            could read.
        OSError, EOFError: where it cannot be read.
    """

    def __init__(self, store: Store, path: str, entry: FileEntry | None) -> None:
        place = f"{store.url}/{path}"
        with store.open(path) as source:
            data = _verified(source, entry, place) if entry else _whole(source, place)
        if entry is None:
            _check_sums(data, place)
        self.value = load(cast(IO[bytes], _Memory(data)), place)

    def fill(self, targets: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See `distckpt.formats.Opened.fill`."""
        with torch.no_grad():
            for held, target in targets:
                target.copy_(held)

    def pieces(self, standing: Sequence[Tensor]) -> Iterator[Piece]:
        """See `distckpt.formats.Opened.pieces`."""
        return (whole(held, held) for held in standing if held.numel())


def _verified(source: Source, entry: FileEntry, path: str) -> memoryview:
    if source.size_bytes != entry.size_bytes:
        raise DamagedCheckpoint(f"{path} has {source.size_bytes} bytes, {entry.size_bytes} were committed")
    digest = xxhash.xxh3_128()
    data = _whole(source, path, digest)
    if digest.hexdigest() != entry.xxh3_128:
        raise DamagedCheckpoint(f"{path}: its bytes changed after the commit (the size is right, the xxh3-128 is not)")
    return data


def _whole(source: Source, path: str, digest: Hash | None = None) -> memoryview:
    if source.size_bytes == 0:
        raise DamagedCheckpoint(f"{path} is empty")
    data = memoryview(bytearray(source.size_bytes))
    for start in range(0, len(data), _PIECE_BYTES):
        piece = data[start : start + _PIECE_BYTES]
        source.read_into(piece)
        if digest is not None:
            digest.update(piece)
    return data


def _check_sums(data: memoryview, path: str) -> None:
    """``torch.load`` does not look at the checksums that are in a zip file."""
    stream = _Memory(data)
    if not zipfile.is_zipfile(stream):
        return  # the format before torch 1.6 has none; and if it is cut off, its reader will say so
    try:
        with zipfile.ZipFile(stream) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
        raise DamagedCheckpoint(f"{path} is no whole file of torch.save: {error}") from error
    if broken is not None:
        raise DamagedCheckpoint(f"{path}: its bytes changed; the checksum of {ascii(broken)} in it does not match")


class _Memory(io.RawIOBase):
    """Memory as a file to read, without a copy of it."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._data)}[whence]
        if start + offset < 0:
            raise ValueError(f"{offset} lies before the start")
        self._at = start + offset
        return self._at

    def readinto(self, target: Buffer) -> int:
        view = memoryview(target).cast("B")
        piece = self._data[self._at : self._at + len(view)]
        view[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

"""A file of a directory that is read from its start to its end."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distckpt.stores.direct import Direct
from distckpt.stores.naming import naming
from distckpt.stores.read_ahead import ReadAhead, read_ahead

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MOST_BYTES = 1024 * 1024 * 1024  # of one read; the kernel's own limit is twice as much

_LEAST_AHEAD_BYTES = 8 * 1024 * 1024
# Whoever wants only the header of a file shall not pay for three blocks of it.
_FIRST_BYTES = 1024 * 1024

_WINDOW_BYTES = 16 * 1024 * 1024
_WINDOWS = 4

_PROBES = 64
_MOST_ABSENT = 6

_libc = ctypes.CDLL(None)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


class FileSource:
    """Reads from ``fd``; see `distckpt.stores.Source`.

    A file that the page cache holds is read from there. Else a large one is read ahead, past it: that is two to three
    times as fast, and drives nothing else out of the page cache. But where several processes read the same, the disk
    does so once, into the page cache.
    """

    def __init__(self, fd: int, place: Path, size_bytes: int, direct: Direct, *, neighbours: int = 1) -> None:
        self.size_bytes = size_bytes
        self._fd = fd
        self._place = place
        self._direct = direct
        self._position = 0
        self._ranges: Sequence[tuple[int, int]] = [(0, size_bytes)]
        self._is_undecided = size_bytes >= _LEAST_AHEAD_BYTES
        self._ahead: ReadAhead | None = None
        self._neighbours = neighbours
        self._announced: int | None = None  # up to where the page cache was told what will be read

    def read_into(self, target: Buffer) -> None:
        rest = memoryview(target).cast("B")
        while rest:
            if self._announced is not None:
                self._announce()
            with naming(self._place):
                count = self._read_ahead(rest) or os.preadv(self._fd, [rest[:_MOST_BYTES]], self._position)
            if count == 0:
                raise EOFError(f"{self._place} ends {len(rest)} bytes too early")
            self._position += count
            rest = rest[count:]

    def skip(self, count: int) -> None:
        self._position += count
        if self._ahead is not None:
            self._ahead.skip(count)

    def expect(self, ranges: Sequence[tuple[int, int]], *, by_all: bool = False) -> None:
        self.close()
        self._ranges = ranges
        is_shared = by_all and self._neighbours > 1
        self._is_undecided = not is_shared and sum(end - begin for begin, end in ranges) >= _LEAST_AHEAD_BYTES
        self._announced = self._position if is_shared else None

    def close(self) -> None:
        """Nothing is read ahead any more. Safe to call twice."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _announce(self) -> None:
        """The system reads some windows ahead: by itself it would read less than the disk can."""
        assert self._announced is not None, "else nothing is announced"
        self._announced = max(self._announced, self._position)
        while self._announced < min(self._position + _WINDOWS * _WINDOW_BYTES, self.size_bytes):
            os.posix_fadvise(self._fd, self._announced, _WINDOW_BYTES, os.POSIX_FADV_WILLNEED)
            self._announced += _WINDOW_BYTES

    def _read_ahead(self, rest: memoryview) -> int:
        """How many bytes of ``rest`` had been read ahead; none where that is not done, or is over."""
        if self._is_undecided and self._position + len(rest) > _FIRST_BYTES:
            self._is_undecided = False
            if not is_cached(self._fd, self.size_bytes):
                ranges = [(max(begin, self._position), end) for begin, end in self._ranges if end > self._position]
                self._ahead = read_ahead(self._fd, ranges, direct=self._direct)
        if self._ahead is None:
            return 0
        count = self._ahead.read_into(rest)
        if count == 0:
            self.close()
        return count


def is_cached(fd: int, size_bytes: int) -> bool:
    """Whether the page cache holds nine tenths of a file, by a sample; also where the system does not tell.

    It does not tell who may neither write the file nor owns it. To read with ``RWF_NOWAIT`` instead is no question: it
    brings the page there.
    """
    if not size_bytes:
        return True
    try:
        mapped = mmap.mmap(fd, size_bytes, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):
        return True
    with mapped:
        first = ctypes.c_char.from_buffer(mapped)
        base = ctypes.addressof(first)
        del first  # or it could not be unmapped
        pages = -(-size_bytes // mmap.PAGESIZE)
        absent = sum(not _is_there(base + pages * number // _PROBES * mmap.PAGESIZE) for number in range(_PROBES))
    return absent <= _MOST_ABSENT


def _is_there(address: int) -> bool:
    """Whether the page cache holds the page of a file that is mapped there."""
    told = ctypes.c_ubyte()
    return _libc.mincore(address, 1, ctypes.byref(told)) != 0 or bool(told.value & 1)

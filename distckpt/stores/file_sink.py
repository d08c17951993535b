"""A new file of a directory that is written from its start to its end."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from distckpt.stores.direct import ALIGNMENT, Direct, address_of
from distckpt.stores.naming import naming

if TYPE_CHECKING:
    from typing_extensions import Buffer

PIECE_BYTES = 16 * 1024 * 1024

# Less is not worth two more calls, and the page cache gathers it.
_LEAST_DIRECT_BYTES = 64 * 1024


class FileSink:
    """Writes to ``fd``; see `distckpt.stores.Sink`.

    What lies in memory and will lie in the file on pages of its own passes the page cache by, which costs a twentieth
    of the CPU. Like all else it is durable only after an fsync.

    Attributes:
        size_bytes: how much was written so far.

    Args:
        direct: how; refused where ``fd`` does not write from the start of its file.
    """

    def __init__(self, fd: int, place: Path, direct: Direct) -> None:
        self._fd = fd
        self._place = place
        self._direct = direct
        self._is_direct = False
        self.size_bytes = 0

    def write(self, data: Buffer) -> None:
        rest = memoryview(data).cast("B")
        is_large = len(rest) >= _LEAST_DIRECT_BYTES and not rest.readonly
        while rest:
            piece = rest[:PIECE_BYTES]
            pages = self._pages(piece) if is_large else 0
            with naming(self._place):
                written = self._write_direct(piece[:pages]) if pages else self._write_cached(piece)
            if written == 0:
                raise OSError(errno.EIO, "nothing was written", str(self._place))
            self.size_bytes += written
            rest = rest[written:]

    def _pages(self, piece: memoryview) -> int:
        """How many of its first bytes may pass the page cache by."""
        if (self.size_bytes | address_of(piece)) % ALIGNMENT:
            return 0
        return len(piece) - len(piece) % ALIGNMENT

    def _write_direct(self, piece: memoryview) -> int:
        self._is_direct = self._is_direct or self._direct.turn_on(self._fd)
        if self._is_direct:
            try:
                return os.write(self._fd, piece)
            except OSError as error:
                self._direct.refuse(error)
        return self._write_cached(piece)

    def _write_cached(self, piece: memoryview) -> int:
        if self._is_direct:
            self._direct.turn_off(self._fd)
            self._is_direct = False
        return os.write(self._fd, piece)

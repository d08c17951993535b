"""A new file of a known size that is written in any order."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distckpt.stores.naming import naming

if TYPE_CHECKING:
    from typing_extensions import Buffer

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class NewFile:
    """See the module. What nobody has written is zeros. Errors are ``OSError`` with the path in them."""

    def __init__(self, fd: int, place: Path) -> None:
        self._fd = fd
        self._place = place

    def write_at(self, offset: int, data: Buffer) -> None:
        """All of ``data`` stands at ``offset``."""
        rest = memoryview(data).cast("B")
        while rest:
            with naming(self._place):
                count = os.pwrite(self._fd, rest, offset)
            if count == 0:
                raise OSError(errno.EIO, "nothing was written", str(self._place))
            offset += count
            rest = rest[count:]

    def read_at(self, offset: int, target: Buffer) -> None:
        """``target`` holds what stands at ``offset``."""
        rest = memoryview(target).cast("B")
        while rest:
            with naming(self._place):
                count = os.preadv(self._fd, [rest], offset)
            if count == 0:
                raise OSError(errno.EIO, "what was just written is not there", str(self._place))
            offset += count
            rest = rest[count:]


@contextmanager
def new_file(place: Path, size_bytes: int) -> Iterator[NewFile]:
    """A file that was not there. When the context is left without an error its bytes are durable; its name is not.

    Raises:
        FileExistsError, OSError: naming it, where it cannot be made or written.
    """
    fd = os.open(place, _NEW, 0o666)
    with ExitStack() as stack:
        stack.callback(_close, fd, place)
        with naming(place):
            os.ftruncate(fd, size_bytes)
        yield NewFile(fd, place)
        with naming(place):
            os.fsync(fd)


def _close(fd: int, place: Path) -> None:
    with naming(place):  # some file systems tell only then what became of the bytes
        os.close(fd)

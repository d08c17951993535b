"""The way past the page cache (O_DIRECT): what it asks of memory and of a file system, and whether that lets us."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
from contextlib import suppress

_log = logging.getLogger("distckpt")

# Of an address, a place in a file and a length. Most disks ask for 512; 4096, a page, is the most that one asks for.
ALIGNMENT = 4096

_BLOCKS = 3
_BLOCK_BYTES = 8 * 1024 * 1024
_WIPEONFORK = 18  # MADV_WIPEONFORK, which mmap does not name
_REFUSALS = {errno.EINVAL, errno.ENOTSUP}


class Direct:
    """What a store knows of the way past the page cache: it is tried until the file system has refused it once.

    Args:
        store: how a message calls the store.
    """

    def __init__(self, store: str, *, is_refused: bool = False) -> None:
        self.is_refused = is_refused
        self._store = store
        self._spare: list[Ring] = []

    def turn_on(self, fd: int) -> bool:
        """What is read and written by ``fd`` from now on passes the page cache by; ``False`` where that is refused."""
        if not self.is_refused:
            try:
                fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
            except OSError as error:
                self.refuse(error)
        return not self.is_refused

    def turn_off(self, fd: int) -> None:
        """What is read and written by ``fd`` from now on goes through the page cache."""
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)

    def refuse(self, error: OSError) -> None:
        """It is not tried again. Some file systems say so only when they are to read or write.

        Raises:
            OSError: ``error``, where it says something else.
        """
        if error.errno not in _REFUSALS:
            raise error
        _log.debug("%s: files go through the page cache, as O_DIRECT says: %s", self._store, error)
        self.is_refused = True

    def take_ring(self) -> Ring:
        """Memory to read into, until `give_ring`. The next file is read into the same: fresh memory is slow."""
        try:
            return self._spare.pop()
        except IndexError:
            return Ring()

    def give_ring(self, ring: Ring) -> None:
        """Nothing reads into it any more."""
        if not self._spare:
            self._spare.append(ring)


class Ring:
    """A few blocks of memory, on huge pages: to read into small ones costs several times the CPU.

    A child of a fork finds zeros in it: if it shared the pages, what is being read could end up in its copy.

    Raises:
        OSError: where the system does not give that much.
    """

    def __init__(self) -> None:
        memory = mmap.mmap(-1, _BLOCKS * _BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in (mmap.MADV_HUGEPAGE, _WIPEONFORK):
            with suppress(OSError):  # a kernel without it reads as well, only slower
                memory.madvise(advice)
        whole = memoryview(memory)
        self.blocks = [whole[start : start + _BLOCK_BYTES] for start in range(0, len(whole), _BLOCK_BYTES)]


def address_of(view: memoryview) -> int:
    """Where in memory the bytes lie, which can be written, and are at least one."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))

"""Reading a file ahead, past the page cache, in a thread."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from queue import SimpleQueue

from distckpt.stores.direct import ALIGNMENT, Direct, Ring, address_of

# A large copy by slices would hold the GIL, and training for as long; to release it for a small one takes longer.
_SMALL_BYTES = 64 * 1024


def read_ahead(fd: int, ranges: Sequence[tuple[int, int]], *, direct: Direct) -> ReadAhead | None:
    """These bytes of an open file, from where to where; ``None`` where they cannot be read so."""
    if not direct.turn_on(fd):
        return None
    try:
        return ReadAhead(fd, ranges, direct=direct, ring=direct.take_ring())
    except (OSError, RuntimeError):  # no memory is left, which the file itself may need; or no thread
        direct.turn_off(fd)
        return None


class ReadAhead:
    """Some ranges of an open file, one after another: some blocks are being read while another is copied from.

    It ends behind the last, or before it without a word: where the file has become shorter, or refuses to be read so.

    Args:
        fd: for which ``direct`` was turned on; nothing else reads it until `close`.
        ring: of ``direct``.

    Raises:
        RuntimeError: where the system gives no thread.
    """

    def __init__(self, fd: int, ranges: Sequence[tuple[int, int]], *, direct: Direct, ring: Ring) -> None:
        self._fd = fd
        self._direct = direct
        self._ring = ring
        self._empty: SimpleQueue[memoryview] = SimpleQueue()
        for block in ring.blocks:
            self._empty.put(block)
        self._full: SimpleQueue[tuple[memoryview, int, int] | BaseException | None] = SimpleQueue()
        self._block: memoryview | None = None
        self._rest = memoryview(b"")
        self._position = ranges[0][0] if ranges else 0
        self._thread = threading.Thread(target=self._run, args=(ranges,), name="distckpt-read-ahead", daemon=True)
        self._thread.start()

    def read_into(self, target: memoryview) -> int:
        """How many bytes of ``target``, from its start, hold the next ones of the file; none where it ended.

        Raises:
            OSError: where they could not be read.
        """
        if not self._rest:
            self._next_block()
        count = min(len(target), len(self._rest))
        if count < _SMALL_BYTES:
            target[:count] = self._rest[:count]
        else:
            ctypes.memmove(address_of(target), address_of(self._rest), count)
        self.skip(count)
        return count

    def skip(self, count: int) -> None:
        """Go on with what comes so many bytes later."""
        self._position += count
        self._rest = self._rest[count:]

    def close(self) -> None:
        """The thread has ended, the ring is given back, and ``fd`` is read through the page cache."""
        self._empty.put(memoryview(bytearray()))  # into which it reads nothing, and so ends
        self._thread.join()
        self._direct.give_ring(self._ring)
        self._direct.turn_off(self._fd)

    def _next_block(self) -> None:
        while not self._rest:
            if self._block is not None:
                self._empty.put(self._block)
                self._block = None
            read = self._full.get()
            if not isinstance(read, tuple):
                break
            self._block, begin, count = read
            assert begin <= self._position, "what nobody expected is not read ahead"
            self._rest = self._block[self._position - begin : count]
        else:
            return
        self._full.put(read)  # it is the last, however often somebody asks
        if isinstance(read, OSError):
            self._direct.refuse(read)
        elif read is not None:
            raise read

    def _run(self, ranges: Sequence[tuple[int, int]]) -> None:
        try:
            for begin, end in ranges:
                offset = begin - begin % ALIGNMENT
                # After a short read no page begins where the next one would: the rest is not for us.
                while offset < end and offset % ALIGNMENT == 0:
                    block = self._empty.get()
                    pages = -(-(end - offset) // ALIGNMENT)
                    count = os.preadv(self._fd, [block[: pages * ALIGNMENT]], offset)
                    if count == 0:
                        break
                    self._full.put((block, offset, count))
                    offset += count
                if offset < end:
                    break
            self._full.put(None)
        except BaseException as error:  # raised where somebody waits for the bytes
            self._full.put(error)

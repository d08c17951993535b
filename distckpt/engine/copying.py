"""Copies of memory that several threads do together, block by block, as a writer needs them."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import NamedTuple

from torch import Tensor

from distckpt.errors import DistckptError

BLOCK_BYTES = 16 * 1024 * 1024

# A call that releases the GIL may wait for 5 ms to get it back: worth it for large pieces only.
SMALL_BYTES = 64 * 1024
_move = ctypes.CDLL(None).memmove
_move_small = ctypes.PyDLL(None).memmove
for _function in (_move, _move_small):
    _function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    _function.restype = ctypes.c_void_p


class Piece(NamedTuple):
    """So many bytes that are copied to ``offset``, and how the address is found that they are copied from."""

    offset: int
    size: int
    source: Callable[[], int]
    skipped: int = 0  # of what lies at that address


def cut(piece: Piece) -> list[Piece]:
    """The same bytes, as one piece for each block that they go to."""
    offset, size, source, skipped = piece
    if offset % BLOCK_BYTES + size <= BLOCK_BYTES:
        return [piece]
    parts = []
    while size:
        part = min(size, BLOCK_BYTES - offset % BLOCK_BYTES)
        parts.append(Piece(offset, part, source, skipped))
        offset, size, skipped = offset + part, size - part, skipped + part
    return parts


def move(target: int, source: int | bytes, count: int) -> None:
    """``count`` bytes are copied; the GIL is released where that is worth it."""
    (_move if count >= SMALL_BYTES else _move_small)(target, source, count)


_offset = itemgetter(0)


class Copy:
    """A copy into ``memory``, by all threads that call `work`, from its start to its end.

    Args:
        window_bytes: how much of it there is, a multiple of the block's size. Where that is less than what is
            copied, a block is copied once the one whose memory it takes was freed.
    """

    def __init__(self, memory: Tensor, window_bytes: int, pieces: Iterable[Piece]) -> None:
        self._memory: Tensor | None = memory  # which is there for as long as somebody may copy into it
        self._base = memory.data_ptr()
        self._window_bytes = window_bytes
        self._whole = deque(sorted(pieces, key=_offset))
        self._parts: deque[Piece] = deque()  # of the piece before those
        self._copying: list[int] = []  # the offsets of parts that threads have taken
        self._freed = 0
        self._working = 0
        self._failure: Exception | None = None
        self._changed = threading.Condition()

    @property
    def is_done(self) -> bool:
        """Whether all is copied."""
        return not (self._copying or self._parts or self._whole)

    def start(self, threads: int) -> None:
        """So many threads work on it in the background."""
        for _ in range(min(threads, len(self._whole))):
            threading.Thread(target=self.work, name="distckpt-copy", daemon=True).start()

    def work(self) -> None:
        """Nothing of it is left to begin with; what other threads began may still be under way. What goes wrong is
        raised where the copy is waited for; an interrupt of this thread here, too."""
        with self._changed:
            self._working += 1
        try:
            while (piece := self._next()) is not None:
                self._copy(piece)
        except Exception as error:
            self.fail(error)
        except BaseException as error:
            self.fail(DistckptError(f"the copy was interrupted ({type(error).__name__})"))
            raise
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Whoever waits for this copy gets that error, and nothing more is copied."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def end(self, error: Exception) -> None:
        """As `fail`; and no thread touches the memory any more, which is let go."""
        self.fail(error)
        with self._changed:
            self._changed.wait_for(lambda: not self._working)
            self._whole.clear()
            self._parts.clear()
            self._memory = None

    def free(self, blocks: int) -> None:
        """The first so many blocks are not needed any more."""
        with self._changed:
            self._freed = blocks
            self._changed.notify_all()

    def wait(self) -> None:
        """All is copied.

        Raises:
            what was told to `fail`.
        """
        self._wait(lambda: self.is_done)

    def wait_for(self, block: int) -> None:
        """That block, and all before it, are filled.

        Raises:
            what was told to `fail`.
        """
        self._wait(lambda: self._block() > block)

    def _next(self) -> Piece | None:
        with self._changed:
            if self._failure is not None:
                return None
            if not self._parts and self._whole:
                self._parts.extend(cut(self._whole.popleft()))
            if not self._parts:
                return None
            self._copying.append(self._parts[0].offset)
            return self._parts.popleft()

    def _copy(self, piece: Piece) -> None:
        block = piece.offset // BLOCK_BYTES
        windows = self._window_bytes // BLOCK_BYTES
        if block >= self._freed + windows:
            self._wait(lambda: block < self._freed + windows)
        move(self._base + piece.offset % self._window_bytes, piece.source() + piece.skipped, piece.size)
        with self._changed:
            before = self._block()
            self._copying.remove(piece.offset)
            if self._block() != before:
                self._changed.notify_all()

    def _block(self) -> int:
        """The first block that is not filled yet."""
        ahead = [pieces[0].offset for pieces in (self._parts, self._whole) if pieces]
        return min([*self._copying, *ahead], default=sys.maxsize) // BLOCK_BYTES

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or condition())
            if self._failure is not None:
                raise self._failure

"""The process of the floor: what copying, writing and reading so many bytes costs when nothing else is done.

It answers like a contender does, to one command: ``measure``.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from time import perf_counter

import proc
from files import fsync

# Small enough to stand beside the contenders, and too large for the caches.
MEMORY_BYTES = 1 << 28
PIECE_BYTES = 1 << 24
BLOCK_BYTES = 4096


class Memory:
    """Some memory on huge pages, from which writes are faster, filled with what does not compress."""

    def __init__(self) -> None:
        self._mapped = mmap.mmap(-1, MEMORY_BYTES)
        self._mapped.madvise(mmap.MADV_HUGEPAGE)
        random = os.urandom(1 << 20)
        for begin in range(0, MEMORY_BYTES, len(random)):
            self._mapped[begin : begin + len(random)] = random
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapped))
        self.pieces = [memoryview(self._mapped)[at : at + PIECE_BYTES] for at in range(0, MEMORY_BYTES, PIECE_BYTES)]


class Floor:
    """Does with ``size_bytes`` what every save and restore has to do with them at least."""

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self._path, self._size_bytes = directory / "floor", size_bytes
        self._source, self._target = Memory(), Memory()

    def measure(self) -> dict[str, float]:
        """Seconds of each. The file is a new one, and is removed again."""
        start = proc.used()
        told = {
            "memcpy": timed(lambda: self._copy(1)),
            "memcpy_2_threads": timed(lambda: self._copy(2)),
            "direct_write": timed(self.write),
            "direct_read": timed(self.read),
        }
        self._path.unlink()
        fsync(self._path.parent)
        return told | {"foreign_share": proc.used().since(start).foreign_share}

    def _copy(self, threads: int) -> None:
        running = [Thread(target=self._copy_part, args=(index, threads)) for index in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()

    def _copy_part(self, index: int, threads: int) -> None:
        part, left = MEMORY_BYTES // threads, self._size_bytes // threads
        source, target = self._source.address + index * part, self._target.address + index * part
        while left > 0:
            ctypes.memmove(target, source, min(part, left))
            left -= part

    def write(self) -> None:
        """The file holds so many bytes, durable."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
        try:
            for piece in self._pieces(self._source):
                if os.write(descriptor, piece) != len(piece):
                    raise OSError("a direct write was cut short")
            os.ftruncate(descriptor, self._size_bytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self) -> None:
        """They were read."""
        descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        try:
            for piece in self._pieces(self._target):
                os.readv(descriptor, [piece])
        finally:
            os.close(descriptor)

    def _pieces(self, memory: Memory) -> list[memoryview]:
        """So many bytes of it, again and again the same ones, up to whole blocks."""
        left, pieces = -(-self._size_bytes // BLOCK_BYTES) * BLOCK_BYTES, []
        while left > 0:
            piece = memory.pieces[len(pieces) % len(memory.pieces)][:left]
            pieces.append(piece)
            left -= len(piece)
        return pieces


def timed(work: Callable[[], None]) -> float:
    """How long it takes."""
    start = perf_counter()
    work()
    return perf_counter() - start


def main() -> None:
    """``floor.py DIRECTORY SIZE_BYTES``: see the module."""
    directory, size_bytes = sys.argv[1:]
    try:
        floor = Floor(Path(directory), int(size_bytes))
        print(json.dumps({"about": "the floor"}), flush=True)
        for _ in sys.stdin:
            print(json.dumps(floor.measure()), flush=True)
    except Exception as error:
        print(json.dumps({"failed": f"{type(error).__name__}: {error}"}), flush=True)
        raise


if __name__ == "__main__":
    main()

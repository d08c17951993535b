"""Digests: of the blocks of a file, and one that a thread of its own works out, behind whoever reads the bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

import xxhash

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LEAST_BLOCK_BYTES = 256 * 1024
_MOST_BLOCK_BYTES = 1 << 30
_MOST_BLOCKS = 8192


class Hash(Protocol):
    """What is told all bytes of a file, such as ``xxhash.xxh3_128()``."""

    def update(self, data: Buffer) -> object: ...


def block_bytes_of(size_bytes: int) -> int:
    """The size of the blocks of a file that is read in parts, each of which has a digest. Whoever wants a part reads
    the blocks that it lies in: small ones, as long as they do not become too many."""
    block = _LEAST_BLOCK_BYTES
    while block * _MOST_BLOCKS < size_bytes:
        block *= 2
    return block


def is_block_size(block_bytes: int) -> bool:
    """Whether blocks may have that size."""
    return block_bytes.bit_count() == 1 and 4096 <= block_bytes <= _MOST_BLOCK_BYTES


class BlockDigests:
    """The xxh3-128 of each block of what it is told, from the start of a file; as a digest, that of these."""

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self._done: list[bytes] = []
        self._block = xxhash.xxh3_128()
        self._left = block_bytes

    def update(self, data: Buffer) -> None:
        """``data`` comes next."""
        rest = memoryview(data).cast("B")
        while rest:
            piece, rest = rest[: self._left], rest[self._left :]
            self._block.update(piece)
            self._left -= len(piece)
            if not self._left:
                self._end_block()

    def blocks(self) -> list[str]:
        """All of them, once everything was told."""
        if self._left < self.block_bytes:
            self._end_block()
        return [one.hex() for one in self._done]

    def hexdigest(self) -> str:
        """The xxh3-128 of theirs."""
        return digest_of_blocks(self.blocks())

    def _end_block(self) -> None:
        self._done.append(self._block.digest())
        self._block = xxhash.xxh3_128()
        self._left = self.block_bytes


def digest_of_blocks(blocks: Sequence[str]) -> str:
    """The digest of a file of which the digests of all blocks are known."""
    return xxhash.xxh3_128_hexdigest(b"".join(map(bytes.fromhex, blocks)))


class CheckedBlocks:
    """A digest that is told whole blocks, and raises where one is not what it was.

    Args:
        size_bytes, block_bytes: of the file, and of each but the last of its blocks.
        blocks: their digests.
        error: what is raised.
    """

    def __init__(self, size_bytes: int, block_bytes: int, blocks: Sequence[str], error: Exception) -> None:
        self._size_bytes = size_bytes
        self._block_bytes = block_bytes
        self._blocks = blocks
        self._error = error
        self._at = 0
        self._block = xxhash.xxh3_128()

    def update(self, data: Buffer) -> None:
        """``data`` comes next."""
        rest = memoryview(data).cast("B")
        while rest:
            number = self._at // self._block_bytes
            end = min((number + 1) * self._block_bytes, self._size_bytes)
            piece, rest = rest[: end - self._at], rest[end - self._at :]
            self._block.update(piece)
            self._at += len(piece)
            if self._at == end:
                if self._block.hexdigest() != self._blocks[number]:
                    raise self._error
                self._block = xxhash.xxh3_128()

    def skip(self, count: int) -> None:
        """Blocks that nobody reads come next."""
        self._at += count


class Behind:
    """What it is told is in the digest once it is drained, and must not change before.

    A thread of its own works on it; where the system gives none, whoever waits for it does.
    """

    def __init__(self, digest: Hash) -> None:
        self._digest = digest
        self._thread: threading.Thread | None = None
        self._told: SimpleQueue[Buffer | threading.Event | None] = SimpleQueue()
        self._error: BaseException | None = None

    def update(self, data: Buffer) -> None:
        """``data`` comes next."""
        self._told.put(data)

    def skip(self, count: int) -> None:
        """So many bytes are not for the digest, which knows how to pass over them."""
        self.drain()
        self._digest.skip(count)  # type: ignore[attr-defined]  # none but such are told to

    def drain(self) -> None:
        """All that it was told is in the digest.

        Raises:
            what the digest did.
        """
        is_done = threading.Event()
        self._told.put(is_done)
        if self._thread is None:
            self._told.put(None)
            self._run()
        is_done.wait()
        if self._error is not None:
            raise self._error

    def start(self) -> None:
        """Its thread works, if the system gives one."""
        thread = threading.Thread(target=self._run, name="distckpt-hash", daemon=True)
        with suppress(RuntimeError):
            thread.start()
            self._thread = thread

    def end(self) -> None:
        """Nothing more comes, and nothing of what came is read any more."""
        if self._thread is not None:
            self._told.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (told := self._told.get()) is not None:
            if isinstance(told, threading.Event):
                told.set()
            elif self._error is None:
                try:
                    self._digest.update(told)
                except BaseException as error:  # raised where the digest is waited for
                    self._error = error


@contextmanager
def behind(digest: Hash) -> Iterator[Behind]:
    """A digest that whoever reads tells without waiting. It is whole when the context is left without an error; with
    one, nobody reads the memory any more."""
    one = Behind(digest)
    one.start()
    try:
        yield one
        one.drain()
    finally:
        one.end()

"""A digest that a thread of its own works out, behind whoever reads the bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Hash(Protocol):
    """What is told all bytes of a file, such as ``xxhash.xxh3_128()``."""

    def update(self, data: Buffer) -> object: ...


class Behind:
    """What it is told is in the digest once it is drained, and must not change before."""

    def __init__(self, digest: Hash) -> None:
        self._digest = digest
        self._told: SimpleQueue[Buffer | threading.Event | None] = SimpleQueue()
        self._error: BaseException | None = None

    def update(self, data: Buffer) -> None:
        """``data`` comes next."""
        self._told.put(data)

    def drain(self) -> None:
        """All that it was told is in the digest.

        Raises:
            what the digest did.
        """
        is_done = threading.Event()
        self._told.put(is_done)
        is_done.wait()
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        """Works until it was told `end`."""
        while (told := self._told.get()) is not None:
            if isinstance(told, threading.Event):
                told.set()
            elif self._error is None:
                try:
                    self._digest.update(told)
                except BaseException as error:  # raised where the digest is waited for
                    self._error = error

    def end(self) -> None:
        """Nothing more comes."""
        self._told.put(None)


@contextmanager
def behind(digest: Hash) -> Iterator[Behind]:
    """A digest that whoever reads tells without waiting. It is whole when the context is left without an error; with
    one, nobody reads the memory any more."""
    one = Behind(digest)
    thread = threading.Thread(target=one.run, name="distckpt-hash", daemon=True)
    thread.start()
    try:
        yield one
        one.drain()
    finally:
        one.end()
        thread.join()

"""Pieces that are made one ahead of whoever takes them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


@contextmanager
def ahead(pieces: Iterable[T]) -> Iterator[Iterable[T]]:
    """The same pieces, each made by a thread of its own while the one before is being used: not before that was asked
    for, so that there are two at most. What making one raises is raised where it is asked for.

    Leaving the context waits for the piece that is being made.
    """
    maker = _Maker(pieces)
    try:
        maker.thread.start()
    except RuntimeError:  # the interpreter is about to end, and starts no more of them
        yield pieces
        return
    try:
        yield maker.made()
    finally:
        maker.end()


class _Maker(Generic[T]):
    def __init__(self, pieces: Iterable[T]) -> None:
        self.thread = threading.Thread(target=self._run, name="distckpt-ahead", daemon=True)
        self._pieces = iter(pieces)
        self._is_asked: SimpleQueue[bool] = SimpleQueue()
        self._made: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()

    def made(self) -> Iterator[T]:
        self._is_asked.put(True)
        while (made := self._made.get()) is not None:
            if isinstance(made, BaseException):
                raise made
            self._is_asked.put(True)
            yield made[0]

    def end(self) -> None:
        self._is_asked.put(False)
        self.thread.join()

    def _run(self) -> None:
        try:
            while self._is_asked.get():
                for piece in self._pieces:
                    self._made.put((piece,))
                    break
                else:
                    self._made.put(None)
                    return
        except BaseException as error:  # raised where a piece is asked for
            self._made.put(error)

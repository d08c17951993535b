"""Ranks and stores for tests, yours too: they keep the contracts of the real ones, and fail when told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from distckpt.ranks import Ranks, Solo
from distckpt.ranks.board import BoardRanks
from distckpt.stores import Store

T = TypeVar("T")


class MemoryBoard:
    """A board for ranks that are threads of one process; see `distckpt.ranks.board.Board`."""

    def __init__(self) -> None:
        self._posts: dict[str, str] = {}

    def post(self, key: str, value: str) -> None:
        self._posts[key] = value

    def look(self, keys: Sequence[str]) -> Sequence[str] | None:
        found = [self._posts.get(key) for key in keys]
        return None if None in found else [one for one in found if one is not None]

    def remove(self, key: str) -> None:
        self._posts.pop(key, None)


def thread_ranks(world_size: int, *, timeout: timedelta = timedelta(seconds=5)) -> list[Ranks]:
    """The ranks of a job whose processes are threads of this one, by rank: the real protocol, without processes."""
    if world_size == 1:
        return [Solo()]
    board = MemoryBoard()
    return [BoardRanks(board, rank, world_size, name="test", timeout=timeout) for rank in range(world_size)]


def on_threads(ranks: list[Ranks], work: Callable[[Ranks], T], *, seconds: float = 60.0) -> list[T | BaseException]:
    """What ``work`` returned, or raised, on each rank, each in a thread of its own.

    Raises:
        TimeoutError: naming the ranks that are still at it after so many seconds.
    """
    results: dict[int, T | BaseException] = {}

    def run(mine: Ranks) -> None:
        try:
            results[mine.rank] = work(mine)
        except BaseException as error:  # a result like any other
            results[mine.rank] = error

    threads = [threading.Thread(target=run, args=(mine,), daemon=True) for mine in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    late = [mine.rank for mine in ranks if mine.rank not in results]
    if late:
        raise TimeoutError(f"ranks {late} have not ended within {seconds} seconds")
    return [results[mine.rank] for mine in ranks]


class FaultyStore:
    """A store whose ``fail_at``-th operation that changes something raises ``error``, before it changes anything.

    Attributes:
        operations: what was called so far, e.g. ``"put run.json"``. Enumerate faults with it: run once without, then
            once for each operation.
    """

    _CHANGING = frozenset(
        (
            "create",
            "put",
            "publish",
            "append",
            "make_folder",
            "settle",
            "move",
            "link",
            "point",
            "delete",
            "delete_folder",
            "recycle_folder",
            "drop_spares",
        )
    )

    def __init__(self, store: Store, *, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self._store = store
        self._error = error or OSError(28, "No space left on device")
        self.fail_at = fail_at
        self.operations: list[str] = []
        self._counting = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._store, name)
        if name not in self._CHANGING:
            return real

        def counted(*args: Any, **named: Any) -> Any:
            with self._counting:
                is_next = len(self.operations) == self.fail_at
                self.operations.append(f"{name} {args[0] if args else ''}".strip())
            if is_next:
                raise self._error
            return real(*args, **named)

        return counted

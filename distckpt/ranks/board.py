"""How ranks agree through a board: a key-value store that all of them can post to and read from.

No collective of a process group is used, so this works in any thread, knows who did not come, and never disturbs
training's own communication.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol, TypeVar

from distckpt.errors import RankFailure
from distckpt.ranks import LEADER, Json, Ranks, Summary, read_failures, tell_failures

_log = logging.getLogger("distckpt")

# Looking costs about 25 microseconds on a c10d store; a wait begins eager and becomes lazy. All wait for the leader at
# the same time: so many looks a second keep a board busy, and so few it hardly feels. A wait in the store itself would
# cost nothing, but prints a warning for each that ends in vain.
_FIRST_PAUSE_SECONDS = 0.0002
_LONGEST_PAUSE_SECONDS = 0.02
_EAGER_LOOKS_PER_SECOND = 100_000
_IDLE_LOOKS_PER_SECOND = 5000
# What several ranks posted costs a thirtieth of that in one look, which is as long as all other looks wait for it.
_KEYS_IN_ONE_LOOK = 512
_ROUNDS_BETWEEN_LOOKS = 64
_GRACE_SECONDS = 5.0
_PARTING_SECONDS = 5.0

T = TypeVar("T")


class Board(Protocol):
    """A key-value store that all ranks see, any thread of them. Errors are any exception; `BoardRanks` turns them into
    `RankFailure`."""

    def post(self, key: str, value: str) -> None:
        """The value is there for all."""
        ...

    def look(self, keys: Sequence[str]) -> Sequence[str] | None:
        """Their values; ``None`` while there is none of one of them. Never waits."""
        ...

    def remove(self, key: str) -> None:
        """The key is free again. It is fine if it was."""
        ...


class BoardRanks:
    """Ranks that agree through a board; see `distckpt.ranks.Ranks` for what each method promises.

    Args:
        name: keeps the words of these ranks apart from those of any others on the board; equal on all ranks.
        timeout: how long a rank waits for another before it gives it up.
    """

    def __init__(self, board: Board, rank: int, world_size: int, *, name: str, timeout: timedelta) -> None:
        self.rank = rank
        self.world_size = world_size
        self._board = board
        self._name = name
        self._timeout = timeout
        lookers = 1 if rank == LEADER else world_size
        self._first_pause = max(_FIRST_PAUSE_SECONDS, lookers / _EAGER_LOOKS_PER_SECOND)
        self._longest_pause = max(_LONGEST_PAUSE_SECONDS, lookers / _IDLE_LOOKS_PER_SECOND)
        self._round = 0
        self._told = 0
        self._forgotten = 0
        self._is_closed = False
        self._mine: list[tuple[int, str]] = []  # what this rank posted, by round, until all have read it
        # Those who came to the last round, as far as the leader knows.
        self._others: Sequence[int] = range(1, world_size)

    def exchange(self, during: str, value: Json, summary: Summary = list) -> Json:
        self._round += 1
        post = json.dumps({"during": during, "value": value, "heard": self._told}, allow_nan=False)
        self._post(self._key(self.rank), post if self.rank != LEADER else "", during)
        if self.rank == LEADER:
            answer = self._gather(during, post, summary)
            if "failures" not in answer:
                self._tidy(self._round - 1, during)
            self._post(self._key("all"), json.dumps(answer), during)
        else:
            answer = json.loads(self._await_leader(during))
            self._tidy(self._round - 1, during)
        self._mine.append((self._round, self._key(self.rank)))
        if self.rank == LEADER:
            self._mine.append((self._round, self._key("all")))
        if "failures" in answer:
            self.part(during)
        return self._read(answer, during)

    def broadcast(self, during: str, value: Json) -> Json:
        self._round += 1
        self._others = range(1, self.world_size)
        if self.rank == LEADER:
            self._post(self._key("all"), json.dumps({"during": during, "value": value}, allow_nan=False), during)
            self._mine.append((self._round, self._key("all")))
            if self._round % _ROUNDS_BETWEEN_LOOKS == 0:
                self._tidy(self._read_by_all(during), during)
            return value
        answer = json.loads(self._await_word(self._key("all"), during, self._seconds))
        if self._round % _ROUNDS_BETWEEN_LOOKS == 0:
            self._post(f"{self._name}/read/{self.rank}", str(self._round), during)
        return self._read(answer, during)

    def listen(self, patience_seconds: float, hurried: threading.Event | None = None) -> Json | None:
        keys = [f"{self._name}/told/{self._told + 1}"]
        hurried = hurried or threading.Event()
        pause = max(0.05, self.world_size / _IDLE_LOOKS_PER_SECOND)
        deadline = time.monotonic() + patience_seconds
        found: Sequence[str | None] | None
        while (found := self._look(keys, "listen")) is None and (left := deadline - time.monotonic()) > 0:
            if hurried.wait(min(pause, left)):
                found = self._await(keys, "listen", patience_seconds)
                break
        if found is None or found[0] is None:
            return None
        self._told += 1
        return json.loads(found[0])

    def announce(self, value: Json) -> None:
        self._told += 1
        self._post(f"{self._name}/told/{self._told}", json.dumps(value, allow_nan=False), "announce")

    def fork(self, name: str) -> Ranks:
        return BoardRanks(self._board, self.rank, self.world_size, name=f"{self._name}/{name}", timeout=self._timeout)

    def part(self, during: str) -> None:
        key = f"{self._name}/{self._round}/parted"
        try:
            if self.rank != LEADER:
                self._post(f"{key}/{self.rank}", "", during)
                self._mine.append((self._round, f"{key}/{self.rank}"))
            else:
                self._linger([f"{key}/{rank}" for rank in self._others], during)
        except RankFailure as failure:
            _log.debug("%s: %s", during, failure)  # what is about to be raised says more

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        # Where the leader's process holds the board, its end is that of the board: the others read to the end first.
        if self.rank != LEADER:
            self._post(f"{self._name}/left/{self.rank}", "", "close")
            return
        self._linger([f"{self._name}/left/{rank}" for rank in range(1, self.world_size)], "close")

    @property
    def _seconds(self) -> float:
        return self._timeout.total_seconds()

    @property
    def _absence(self) -> str:
        return f"did not come within {self._timeout} (it died, hangs, or was not called)"

    def _key(self, who: int | str) -> str:
        return f"{self._name}/{self._round}/{who}"

    def _gather(self, during: str, own: str, summary: Summary) -> Json:
        others = range(1, self.world_size)
        posts = self._await([self._key(rank) for rank in others], during, self._seconds)
        self._others = [rank for rank, post in zip(others, posts, strict=True) if post is not None]
        failures = {rank: self._absence for rank, post in zip(others, posts, strict=True) if post is None}
        found = {LEADER: json.loads(own)} | {rank: json.loads(posts[rank - 1] or "") for rank in self._others}
        failures |= _elsewhere(during, {rank: post["during"] for rank, post in found.items()})
        if failures:
            return {"during": during, "failures": tell_failures(failures)}
        self._forget(min(post["heard"] for post in found.values()), during)
        return {"during": during, "value": summary([post["value"] for post in found.values()])}

    def _read(self, answer: Json, during: str) -> Json:
        if "failures" in answer:
            raise RankFailure(answer["during"], read_failures(answer["failures"]))
        if answer["during"] != during:
            raise RankFailure(during, _elsewhere("", {LEADER: answer["during"]}))
        return answer["value"]

    def _await_leader(self, during: str) -> str:
        # The leader waits from its own arrival on, so its arrival and its answer are two waits.
        self._await_word(self._key(LEADER), during, self._seconds)
        return self._await_word(self._key("all"), during, self._seconds + _GRACE_SECONDS)

    def _await_word(self, key: str, during: str, seconds: float) -> str:
        """What the leader posts there."""
        (text,) = self._await([key], during, seconds)
        if text is None:
            raise RankFailure(during, {LEADER: self._absence})
        return text

    def _await(self, keys: Sequence[str], during: str, seconds: float) -> list[str | None]:
        """What was posted under each of them, or was not within that time."""
        deadline = time.monotonic() + seconds
        found: list[str | None] = []
        for begin in range(0, len(keys), _KEYS_IN_ONE_LOOK):
            some = keys[begin : begin + _KEYS_IN_ONE_LOOK]
            pause = self._first_pause
            while (texts := self._look(some, during)) is None and (left := deadline - time.monotonic()) > 0:
                time.sleep(min(pause, left))
                pause = min(pause * 1.5, self._longest_pause)
            found += self._look_one_by_one(some, during) if texts is None else texts
        return found

    def _look_one_by_one(self, keys: Sequence[str], during: str) -> list[str | None]:
        looks = [self._look([key], during) for key in keys]
        return [None if look is None else look[0] for look in looks]

    def _linger(self, keys: list[str], during: str) -> None:
        self._await(keys, during, min(_PARTING_SECONDS, self._seconds))

    def _tidy(self, read: int, during: str) -> None:
        """What this rank said until the round ``read`` is gone: everybody has come further, so all have read it."""
        for _, key in [(number, key) for number, key in self._mine if number <= read]:
            self._remove(key, during)
        self._mine = [(number, key) for number, key in self._mine if number > read]

    def _read_by_all(self, during: str) -> int:
        keys = [f"{self._name}/read/{rank}" for rank in range(1, self.world_size)]
        return min(int(text or 0) for text in self._await(keys, during, seconds=0))

    def _forget(self, heard: int, during: str) -> None:
        for number in range(self._forgotten + 1, heard + 1):
            self._remove(f"{self._name}/told/{number}", during)
        self._forgotten = max(self._forgotten, heard)

    def _post(self, key: str, value: str, during: str) -> None:
        self._guarded(during, lambda: self._board.post(key, value))

    def _look(self, keys: Sequence[str], during: str) -> Sequence[str] | None:
        return self._guarded(during, lambda: self._board.look(keys))

    def _remove(self, key: str, during: str) -> None:
        self._guarded(during, lambda: self._board.remove(key))

    def _guarded(self, during: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as error:
            raise RankFailure(during, {LEADER: f"its store is gone ({type(error).__name__}: {error})"}) from error


def _elsewhere(during: str, places: dict[int, str]) -> dict[int, str]:
    """The ranks that are doing something else than the leader: all would wait for ever for what none does."""
    return {rank: f"was in {place!r} instead" for rank, place in places.items() if place != during}

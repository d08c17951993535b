"""The contract between ranks, and the one room in which they agree: `together` and `from_leader`.

Nothing else in distckpt communicates. What ranks tell one another is small JSON (names, sizes, digests,
errors), never a tensor and never a pickle.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

from distckpt import errors
from distckpt.errors import DistckptError, RankFailure

# What JSON holds; a recursive alias would say so, but nothing here looks inside.
Json = Any

_log = logging.getLogger("distckpt")

LEADER = 0

# Errors that say by their type what to do; ranks that failed so, and only so, all raise that type.
_TYPED = (
    errors.DirectoryInUse,
    errors.Superseded,
    errors.NoCheckpoint,
    errors.DamagedCheckpoint,
    errors.NewerVersion,
    errors.StateMismatch,
)


class Ranks(Protocol):
    """The processes of a job, seen from one of them. Each method says who must call it.

    A method that waits for another rank has a deadline, and raises `RankFailure`, on every rank, with the
    ranks that did not come. It is not bound to a thread, but two threads must not share one object: `fork` it.
    """

    rank: int
    world_size: int

    def exchange(self, during: str, value: Json) -> list[Json]:
        """Everybody's ``value``, in the order of ranks. Collective."""
        ...

    def gather(self, during: str, value: Json) -> list[Json] | None:
        """Everybody's ``value``, in the order of ranks, on the leader; ``None`` on the others, once it has them.
        Collective."""
        ...

    def broadcast(self, during: str, value: Json) -> Json:
        """The leader's ``value``. Collective; the leader does not wait for the others."""
        ...

    def listen(self, patience_seconds: float) -> Json | None:
        """What the leader announced next, or ``None`` if it was nothing for so long. Not for the leader."""
        ...

    def announce(self, value: Json) -> None:
        """Tell it to whoever listens, now or later; announcements keep their order. Leader only."""
        ...

    def fork(self, name: str) -> Ranks:
        """The same ranks for another thread, whose words never mix with these. Collective, without waiting."""
        ...

    def part(self, during: str) -> None:
        """What was said last has been read by all who came within a moment: a failure, after which the leader's
        process may end, and with it the store that they agree through. Collective; raises nothing."""
        ...

    def close(self) -> None:
        """Nothing more is said. Collective: the leader gives the others a moment to come, as the store that they
        agree through may end with its process. Safe to call twice."""
        ...


class Solo:
    """The only process of a job: every agreement is with itself."""

    rank = 0
    world_size = 1

    def exchange(self, during: str, value: Json) -> list[Json]:
        return [value]

    def gather(self, during: str, value: Json) -> list[Json] | None:
        return [value]

    def broadcast(self, during: str, value: Json) -> Json:
        return value

    def listen(self, patience_seconds: float) -> Json | None:
        return None

    def announce(self, value: Json) -> None:
        return None

    def fork(self, name: str) -> Ranks:
        return self

    def part(self, during: str) -> None:
        return None

    def close(self) -> None:
        return None


def is_leader(ranks: Ranks) -> bool:
    """Whether this rank is the one that decides."""
    return ranks.rank == LEADER


def ends_program(error: BaseException) -> bool:
    """Whether it was raised to end the program, and no work is to hold it up: ``KeyboardInterrupt`` and ``SystemExit``
    on the main thread. On any other they end nothing, and are errors like all others."""
    return not isinstance(error, Exception) and threading.current_thread() is threading.main_thread()


def together(ranks: Ranks, during: str, work: Callable[[], Json]) -> list[Json]:
    """Everybody's result of ``work``, in the order of ranks; or the same error on all. Collective.

    ``work`` runs alone: it is given no ranks to wait for, so a bad disk on one rank strands nobody.

    Raises:
        RankFailure: where ``work`` raised on any rank, with each failing rank's words, and for ranks that did not come
            in time. Where all that failed raised one type of `distckpt.errors` that says what to do, such as
            `StateMismatch`, that type. Its ``__cause__`` is this rank's own exception, if it had one.
        What `ends_program` is raised as it is, at once and on this rank alone.
    """
    result, error = _attempt(work)
    told = ranks.exchange(during, _failed(error) if error else {"result": result})
    _raise_failures(ranks, during, told, error)
    return [one["result"] for one in told]


def to_leader(ranks: Ranks, during: str, work: Callable[[], Json]) -> list[Json]:
    """As `together`, but the results are told to the leader alone, and on other ranks there are none. Collective.

    Raises:
        RankFailure: as in `together`.
    """
    result, error = _attempt(work)
    told = ranks.gather(during, _failed(error) if error else {"result": result})
    failed = {} if told is None else {str(rank): one for rank, one in enumerate(told) if "failed" in one}
    failures = ranks.broadcast(during, failed)
    _raise_failures(ranks, during, [failures.get(str(rank), {}) for rank in range(ranks.world_size)], error)
    return [] if told is None else [one["result"] for one in told]


def from_leader(ranks: Ranks, during: str, work: Callable[[], Json]) -> Json:
    """The leader's result of ``work`` on every rank; or its failure on every rank. Collective.

    Raises:
        RankFailure: as in `together`, for the leader alone.
    """
    error: BaseException | None = None
    told: Json = None
    if is_leader(ranks):
        result, error = _attempt(work)
        told = _failed(error) if error else {"result": result}
    told = ranks.broadcast(during, told)
    if "failed" in told:
        ranks.part(during)
        raise _failure(ranks, during, {LEADER: told}) from error
    return told["result"]


def _raise_failures(ranks: Ranks, during: str, told: list[Json], error: BaseException | None) -> None:
    failures = {rank: one for rank, one in enumerate(told) if "failed" in one}
    if failures:
        ranks.part(during)
        raise _failure(ranks, during, failures) from error


def _attempt(work: Callable[[], Json]) -> tuple[Json, BaseException | None]:
    try:
        return work(), None
    except BaseException as error:  # told to every rank, and raised there
        if ends_program(error):
            raise
        _log.debug("failed on this rank", exc_info=True)
        return None, error


def _failed(error: BaseException) -> Json:
    text = str(error)
    words = text if isinstance(error, DistckptError) and text else f"{type(error).__name__}: {text}"
    return {"failed": words, "type": type(error).__name__}


def _failure(ranks: Ranks, during: str, told: dict[int, Json]) -> DistckptError:
    words = {rank: one["failed"] for rank, one in told.items()}
    failure = RankFailure(during, words)
    types = {one["type"] for one in told.values()}
    for typed in _TYPED:
        if types == {typed.__name__}:
            return typed(words[ranks.rank] if ranks.world_size == 1 else str(failure))
    return failure

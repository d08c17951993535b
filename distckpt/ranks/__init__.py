"""The contract between ranks, and the one room in which they agree: `together` and `from_leader`.

Nothing else in distckpt communicates. What ranks tell one another is small JSON (names, sizes, digests,
errors), never a tensor and never a pickle.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from distckpt import errors, progressions
from distckpt.errors import DistckptError, RankFailure

# What JSON holds; a recursive alias would say so, but nothing here looks inside.
Json = Any

# What the leader makes of everybody's words, for all to know.
Summary = Callable[[list[Json]], Json]

_log = logging.getLogger("distckpt")

LEADER = 0

# Each of thousands of ranks is told what went wrong on any of them: so many different words, and which others failed.
_MOST_WORDS = 100
_MORE_WORDS = "failed as well, with words of its own"
_MOST_RANKS = 1 << 30

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

    def exchange(self, during: str, value: Json, summary: Summary = list) -> Json:
        """What ``summary`` makes of everybody's ``value``, in the order of ranks: it is called on the leader, and told
        to all. By default that is all of it, which is for few ranks: each of N is told N values. Collective."""
        ...

    def broadcast(self, during: str, value: Json) -> Json:
        """The leader's ``value``. Collective; the leader does not wait for the others."""
        ...

    def listen(self, patience_seconds: float, hurried: threading.Event | None = None) -> Json | None:
        """What the leader announced next, or ``None`` if it was nothing for so long. From when ``hurried`` is set, it
        is heard as soon as any other word, for so long again. Not for the leader."""
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

    def exchange(self, during: str, value: Json, summary: Summary = list) -> Json:
        return summary([value])

    def broadcast(self, during: str, value: Json) -> Json:
        return value

    def listen(self, patience_seconds: float, hurried: threading.Event | None = None) -> Json | None:
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


def together(ranks: Ranks, during: str, work: Callable[[], Json], summary: Summary = list) -> Json:
    """Everybody's result of ``work``, in the order of ranks, or what ``summary`` makes of that, as in
    `Ranks.exchange`; or the same error on all. Collective.

    ``work`` runs alone: it is given no ranks to wait for, so a bad disk on one rank strands nobody.

    Raises:
        RankFailure: where ``work`` raised on any rank, with each failing rank's words, and for ranks that did not come
            in time. Where all that failed raised one type of `distckpt.errors` that says what to do, such as
            `StateMismatch`, that type. Its ``__cause__`` is this rank's own exception, if it had one.
        What `ends_program` is raised as it is, at once and on this rank alone.
    """
    result, error = _attempt(work)
    told = ranks.exchange(during, _failed(error) if error else {"result": result}, partial(_sum_up, summary))
    if "failures" in told:
        ranks.part(during)
        raise _failure(ranks, during, read_failures(told["failures"]), told["type"]) from error
    return told["result"]


def first_of_each(told: Sequence[Hashable]) -> Json:
    """The first rank of all that said the same, for each thing that was said: `is_among` knows whether a rank is one.

    Args:
        told: what each rank said, in the order of ranks.
    """
    firsts: dict[Hashable, int] = {}
    for rank, said in enumerate(told):
        firsts.setdefault(said, rank)
    return progressions.told([*firsts.values()])


def is_among(rank: int, told: Json) -> bool:
    """Whether it is one of those that were told, as `progressions.told` does, in few words."""
    return rank in progressions.read(told, _MOST_RANKS, "some ranks")


def to_leader(ranks: Ranks, during: str, work: Callable[[], Json]) -> list[Json]:
    """As `together`, but the results are told to the leader alone, and on other ranks there are none. Collective.

    Raises:
        RankFailure: as in `together`.
    """
    results: list[Json] = []
    together(ranks, during, work, results.extend)
    return results


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
        raise _failure(ranks, during, {LEADER: told["failed"]}, told["type"]) from error
    return told["result"]


def tell_failures(failures: Mapping[int, str]) -> Json:
    """What went wrong on each rank, as JSON that stays short where thousands fail: `read_failures` reads it."""
    ranks_of: dict[str, list[int]] = {}
    for rank, words in sorted(failures.items()):
        is_told = words in ranks_of or len(ranks_of) < _MOST_WORDS
        ranks_of.setdefault(words if is_told else _MORE_WORDS, []).append(rank)
    return [[words, progressions.told(ranks)] for words, ranks in ranks_of.items()]


def read_failures(told: Json) -> dict[int, str]:
    """The inverse of `tell_failures`."""
    return {
        rank: words for words, ranks in told for rank in progressions.read(ranks, _MOST_RANKS, "the ranks that failed")
    }


def _sum_up(summary: Summary, told: list[Json]) -> Json:
    """What ``summary`` makes of all results, or what failed."""
    failed = {rank: one for rank, one in enumerate(told) if "failed" in one}
    if not failed:
        result, error = _attempt(lambda: summary([one["result"] for one in told]))
        if error is None:
            return {"result": result}
        failed = {LEADER: _failed(error)}
    types = {one["type"] for one in failed.values()}
    words = tell_failures({rank: one["failed"] for rank, one in failed.items()})
    return {"failures": words, "type": types.pop() if len(types) == 1 else ""}


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


def _failure(ranks: Ranks, during: str, words: dict[int, str], kind: str) -> DistckptError:
    """``kind``: what all that failed raised, if it was one type."""
    failure = RankFailure(during, words)
    for typed in _TYPED:
        if kind == typed.__name__:
            return typed(words[ranks.rank] if ranks.world_size == 1 else str(failure))
    return failure

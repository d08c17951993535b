"""At which step all ranks act on what the leader alone knows: a clock ran out, a save failed, somebody asked.

In the steady state it costs a training step one look at a flag. When the leader asks for something, the listener
thread of each rank names the next step boundary that its training thread has not yet begun to pass, and all act at
the latest one named. Training threads say nothing themselves, so a rank that waits in a collective of its own step
holds nobody up.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from datetime import timedelta

from distckpt.errors import RankFailure
from distckpt.ranks import Json, Ranks, is_leader

_log = logging.getLogger("distckpt")

_PATIENCE_SECONDS = 0.5

# What the leader announces last.
_END = "end"


@dataclass(frozen=True)
class Request:
    """Something that all ranks do at the same step: ``what`` it is, and why, in words."""

    what: str
    why: str


class Requests:
    """What the leader asks of all ranks, acted on by all at the same step boundary.

    A boundary is a number that every rank passes in the same order, once: here, the count of training steps done.

    It is closed at the end of the process, if nobody did: a thread that is in a store of torch then, in C++, would
    abort the process as Python ends.
    """

    def __init__(self, ranks: Ranks, timeout: timedelta) -> None:
        self._ranks = ranks
        self._timeout = timeout
        self._changed = threading.Condition()
        self._asked: deque[Request] = deque()
        self._named: deque[tuple[Request, int, int | None]] = deque()  # request, boundary named here, agreed
        self._boundary = 0
        self._closing = threading.Event()
        self._failure: RankFailure | None = None
        self._thread = threading.Thread(target=self._listen, name="distckpt-requests", daemon=True)
        mine = weakref.WeakMethod(self.close)

        def at_exit() -> None:
            if (close := mine()) is not None:
                close()

        self._at_exit = at_exit
        if ranks.world_size > 1:
            self._thread.start()
            atexit.register(self._at_exit)

    def ask(self, request: Request) -> None:
        """All ranks will do it at one of their next boundaries. Leader only, from any thread; returns at once."""
        with self._changed:
            if self._ranks.world_size == 1:
                self._named.append((request, 0, 0))
            else:
                self._asked.append(request)
            self._changed.notify_all()

    def due(self, boundary: int) -> list[Request]:
        """What all ranks do at this boundary. Every rank must call it at each of its boundaries.

        A look at a flag, unless something was asked: then it may wait until all ranks have named their boundary.

        Raises:
            RankFailure: where a rank did not name its boundary in time: what was asked is then forgotten on all. It is
                raised at a boundary at which nothing is due, as others may act on that here.
        """
        due: list[Request] = []
        with self._changed:
            self._boundary = boundary
            while self._named:
                request, named, agreed = self._named[0]
                if agreed is None and boundary >= named and self._wait_for_agreement():
                    continue
                if agreed is None or boundary < agreed:
                    break
                self._named.popleft()
                due.append(request)
            if self._failure is None or due:
                return due
            failure, self._failure = self._failure, None
        raise failure

    def close(self) -> None:
        """Nothing is asked any more. Safe to call twice.

        Other ranks wait a moment for the word that the leader says last: it may have asked for something just before,
        and waits until all have answered.
        """
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        atexit.unregister(self._at_exit)
        if self._thread.is_alive():
            self._thread.join(2 * _PATIENCE_SECONDS + 1)

    def _wait_for_agreement(self) -> bool:
        """Whether the first that was asked is agreed on, or forgotten, as not all could be heard."""
        first = self._named[0]
        # The exchange in the listener has a deadline of its own; this one only guards against its death.
        self._changed.wait_for(
            lambda: self._closing.is_set() or not self._named or self._named[0] is not first,
            3 * self._timeout.total_seconds() + 10,
        )
        return not self._named or self._named[0] is not first

    def _listen(self) -> None:
        try:
            while (told := self._next()) is not None:
                self._agree(Request(told["what"], told["why"]))
        except RankFailure as failure:  # the leader is gone, or what all agree through
            with self._changed:
                self._fail(failure)

    def _next(self) -> Json | None:
        return self._next_asked() if is_leader(self._ranks) else self._next_heard()

    def _next_asked(self) -> Json | None:
        with self._changed:
            self._changed.wait_for(lambda: self._asked or self._closing.is_set())
            request = None if self._closing.is_set() else self._asked.popleft()
        told = None if request is None else {"what": request.what, "why": request.why}
        self._ranks.announce(_END if told is None else told)
        return told

    def _next_heard(self) -> Json | None:
        while (told := self._ranks.listen(_PATIENCE_SECONDS, self._closing)) is None:
            if self._closing.is_set():
                return None
        if told != _END:
            return told
        while not self._closing.wait(_PATIENCE_SECONDS):
            self._ranks.listen(0)  # raises where the leader's process has ended, while this one goes on
        return None

    def _agree(self, request: Request) -> None:
        with self._changed:
            named = self._boundary + 1
            self._named.append((request, named, None))
        try:
            agreed = self._ranks.exchange(f"choice of a step for {request.what!r}", named, max)
        except RankFailure as failure:
            with self._changed:
                self._named.pop()  # what was agreed before still is
                self._fail(failure)
            return
        with self._changed:
            self._named[-1] = (request, named, agreed)
            self._changed.notify_all()

    def _fail(self, failure: RankFailure) -> None:
        if not self._closing.is_set():
            self._failure = self._failure or failure
        self._changed.notify_all()


class Stopwatch:
    """Whether a period has passed since it was last started. Leader only: clocks of ranks differ."""

    def __init__(self, period: timedelta) -> None:
        self._period_seconds = period.total_seconds()
        self.restart()

    def restart(self) -> None:
        """The period begins now."""
        self._start = time.monotonic()

    @property
    def is_over(self) -> bool:
        return time.monotonic() - self._start >= self._period_seconds

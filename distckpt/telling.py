"""What happens in a run, told: to its log of events, to ``on_event``, and to the log of the program."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from distckpt import layout, strict_json
from distckpt.errors import DistckptError
from distckpt.manifest import Record
from distckpt.ranks import ends_program
from distckpt.stores import Store

_log = logging.getLogger("distckpt")

_EXPECTED = (OSError, EOFError, DistckptError, ValueError)


class Teller:
    """Tells what happens in a run, and what of it went wrong. Nothing that is told here can fail a save.

    Args:
        on_event: called with one record for each event, from the thread that tells it.
    """

    def __init__(self, store: Store, on_event: Callable[[Mapping[str, object]], None] | None = None) -> None:
        self._store = store
        self._on_event = on_event

    def tell(self, event: str, **fields: object) -> None:
        """One record of what happened, to the log of events and to ``on_event``. Leader only."""
        told = {"event": event, "time": round(time.time(), 3), **fields}
        self.guard("events", lambda: self._store.append(layout.EVENTS, strict_json.dump(told) + b"\n"))
        if self._on_event is None:
            return
        try:
            self._on_event(told)
        except BaseException as error:  # the user's own, which must not cost what was saved
            if ends_program(error):
                raise
            _log.warning("%s: on_event raised for %r: %s: %s", self._store.url, event, type(error).__name__, error)

    def tell_saved(
        self,
        record: Record,
        seconds: Mapping[str, float],
        measures: Mapping[str, float],
        *,
        blocked: float,
        durable: float,
    ) -> None:
        """A save is committed, and this is what it cost; one line of the log, too. Leader only.

        Args:
            seconds, measures: see `distckpt.saving.AfterCommit`.
            blocked: the seconds for which training stopped.
            durable: the seconds after which it was committed.
        """
        self.tell(
            "saved",
            name=record.name,
            step=record.progress.step,
            reasons=list(record.reasons),
            metrics=dict(record.metrics),
            total_bytes=record.total_bytes,
            blocked_seconds=round(blocked, 4),
            durable_seconds=round(durable, 4),
            gb_per_second=round(record.total_bytes / durable / 1e9, 3),
            phases=dict(seconds),
            engine=dict(measures),
        )
        metrics = "".join(f"  {name} {value:.6g}" for name, value in record.metrics.items())
        _log.info(
            "saved %s (%s)  blocked %.3f s  durable %.2f s  %.1f MB%s",
            record.name,
            ", ".join(record.reasons),
            blocked,
            durable,
            record.total_bytes / 1e6,
            metrics,
        )

    def guard(self, what: str, work: Callable[[], None]) -> None:
        """``work`` is done, or a warning says why not: what was committed stays committed, and the next save tries
        again.
        What is no error of a disk is told with its traceback. Only what `ends_program` is raised."""
        try:
            work()
        except BaseException as error:
            if ends_program(error):
                raise
            words = "%s: %s of the run failed, and will be tried again: %s"
            _log.warning(words, self._store.url, what, error, exc_info=not isinstance(error, _EXPECTED))

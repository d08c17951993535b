"""Which files of a runner's run are copied to another place, and which copies may go."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from distckpt import layout
from distckpt.best import ranking
from distckpt.contest import Contest, is_link, links
from distckpt.errors import DistckptError
from distckpt.linked_keeping import is_periodic
from distckpt.manifest import Record
from distckpt.mirror import Mirror
from distckpt.retention import BEST
from distckpt.writer import Writer

_log = logging.getLogger("distckpt")


class Copies:
    """The copies of a run, which are as its files are. Leader only.

    Args:
        contest: knows which scores count.
        records: what of the run there is now; raises where the run may change nothing any more.
        pointed: the name of the file that a restart would read.
        max_keep_ckpts: how many periodic files are kept; all, where that is not positive.
        writer: makes them beside training. Files may come and go meanwhile: what it copies is what there is then.
    """

    def __init__(
        self,
        mirror: Mirror,
        contest: Contest,
        *,
        records: Callable[[], Sequence[Record]],
        pointed: Callable[[], str | None],
        max_keep_ckpts: int,
        writer: Writer | None = None,
    ) -> None:
        self._mirror = mirror
        self._contest = contest
        self._records = records
        self._pointed = pointed
        self._limit = max_keep_ckpts
        self._writer = writer

    def make(self) -> None:
        """The best is there, and what a restart reads, or may read one day. With a writer, it will be, or there is a
        warning.

        Raises:
            DistckptError: as `Mirror.copy`, where there is no writer.
        """
        if self._writer is None:
            self._make(self._records())
        else:
            self._writer.submit(lambda: _tried(lambda: self._make(self._records())))

    def follow(self, left: Sequence[Record]) -> None:
        """Copies of all but the files of ``left`` are gone, but for what would be left of a directory that is lost.
        With a writer, they will be."""
        if self._writer is None:
            self._let_go(left)
        else:
            self._writer.submit(lambda: None if self._mirror.is_behind else _tried(self._make_and_let_go))

    def settle(self, timeout_seconds: float) -> None:
        """What the writer was given has ended, and what is missing was tried once more.

        Raises:
            DistckptError: where something is not there all the same.
        """
        if self._writer is not None and not self._writer.wait(timeout_seconds):
            raise DistckptError(f"the copies at {self._mirror.root} are not made within {timeout_seconds:.0f} s")
        self._make_and_let_go()

    def close(self, timeout_seconds: float) -> None:
        """No more are made. Safe to call twice."""
        if self._writer is not None:
            self._writer.close(timeout_seconds)

    def _make_and_let_go(self) -> None:
        records = self._records()  # once: a copy may go only when all that its file went for is up
        self._make(records)
        self._let_go(records)

    def _make(self, records: Sequence[Record]) -> None:
        pointed = self._pointed()
        wanted = [
            record
            for record in records
            if is_link(record) or record.reasons != (BEST,) or record.name == pointed or self._mirror.is_up(record.name)
        ]
        self._mirror.copy(wanted, pointed)

    def _let_go(self, left: Sequence[Record]) -> None:
        inherited = self._mirror.inherited()
        kept = [*self._best_of(inherited, left), *self._periodic_of(inherited, left)] if inherited else []
        self._mirror.let_go({*(record.name for record in left), *kept})

    def _best_of(self, names: Sequence[str], left: Sequence[Record]) -> list[str]:
        best, linked = [name for name in names if layout.is_best_file(name)], links(left)
        for metric in self._contest.best_by.metrics:
            score = self._contest.elsewhere(metric)
            scores = [record.metrics[metric.name] for record in ranking(metric, linked)]
            # Of equals the older stays, which is the one that is not here.
            ahead = 0 if score is None else sum(metric.is_better(one, score) for one in scores)
            if ahead >= self._contest.best_by.keep:
                best = [name for name in best if not name.startswith(layout.best_prefix(metric.name))]
        return best

    def _periodic_of(self, names: Sequence[str], left: Sequence[Record]) -> list[str]:
        periodic = [name for name in names if not layout.is_best_file(name)]
        if self._limit <= 0:
            return periodic
        room = self._limit - sum(not is_link(record) and is_periodic(record.reasons) for record in left)
        return periodic[-room:] if room > 0 else []


def _tried(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:  # told again by `settle`, if it is so then
        _log.warning("%s", error)

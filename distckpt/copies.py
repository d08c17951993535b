"""Which files of a runner's run are copied to another place, and which copies may go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distckpt import layout
from distckpt.best import ranking
from distckpt.contest import Contest, is_link, links
from distckpt.linked_keeping import is_periodic
from distckpt.manifest import Record
from distckpt.mirror import Mirror
from distckpt.retention import BEST


class Copies:
    """The copies of a run that are as its files are; none are made where there is no ``mirror``. Leader only.

    Args:
        contest: knows which scores count.
        pointed: the name of the file that a restart would read.
        max_keep_ckpts: how many periodic files are kept; all, where that is not positive.
    """

    def __init__(
        self, mirror: Mirror | None, contest: Contest, *, pointed: Callable[[], str | None], max_keep_ckpts: int
    ) -> None:
        self._mirror = mirror
        self._contest = contest
        self._pointed = pointed
        self._limit = max_keep_ckpts

    def make(self, records: Callable[[], Sequence[Record]]) -> None:
        """Of what ``records`` tells, the best is there, and what a restart reads, or may read one day.

        Raises:
            DistckptError: as `Mirror.copy`.
        """
        if (mirror := self._mirror) is None:
            return
        pointed = self._pointed()
        wanted = [
            record
            for record in records()
            if is_link(record) or record.reasons != (BEST,) or record.name == pointed or mirror.is_up(record.name)
        ]
        mirror.copy(wanted, pointed)

    def follow(self, left: Sequence[Record]) -> None:
        """Copies of all but the files of ``left`` are gone, and of what would be left of a directory that is lost."""
        if (mirror := self._mirror) is None:
            return
        inherited = mirror.inherited()
        kept = [*self._best_of(inherited, left), *self._periodic_of(inherited, left)] if inherited else []
        mirror.let_go({*(record.name for record in left), *kept})

    def _best_of(self, names: Sequence[str], left: Sequence[Record]) -> list[str]:
        best, linked = [name for name in names if name.startswith("best_")], links(left)
        for metric in self._contest.best_by.metrics:
            score = self._contest.elsewhere(metric)
            scores = [record.metrics[metric.name] for record in ranking(metric, linked)]
            # Of equals the older stays, which is the one that is not here.
            ahead = 0 if score is None else sum(metric.is_better(one, score) for one in scores)
            if ahead >= self._contest.best_by.keep:
                best = [name for name in best if not name.startswith(layout.best_prefix(metric.name))]
        return best

    def _periodic_of(self, names: Sequence[str], left: Sequence[Record]) -> list[str]:
        periodic = [name for name in names if not name.startswith("best_")]
        if self._limit <= 0:
            return periodic
        room = self._limit - sum(not is_link(record) and is_periodic(record.reasons) for record in left)
        return periodic[-room:] if room > 0 else []

"""What becomes of older files of a run whose best files are links to others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from distckpt.best import BestBy
from distckpt.catalog import Catalog
from distckpt.contest import is_link, links
from distckpt.manifest import Record
from distckpt.progress import Progress
from distckpt.retention import BEST, KeepBest, Retention, parse_bytes

LAST = "last"

INTERVAL = "interval"
_OFF_INTERVAL = {BEST, LAST, "stop"}


class LinkedKeeping:
    """Keeps the last files that are periodic, the best links, and what is pointed to; see `distckpt.run.Keeping`.

    What was written off the interval goes when it is no longer the newest, and no link shares its bytes; unless there
    is no limit, when nothing goes but links.

    Args:
        words: those of `Retention.parse`, but for the metrics.
        best_by: these.
        by_epoch: whether ``keep_every`` counts epochs.
        pointed: the name of the file that a restart would read, which stays whatever the rules say.
        follow: does elsewhere what was done here: it is given the records that are left.
    """

    def __init__(
        self,
        words: Mapping[str, Any],
        best_by: BestBy,
        *,
        by_epoch: bool,
        pointed: Callable[[], str | None],
        follow: Callable[[Sequence[Record]], None] = lambda records: None,
    ) -> None:
        self._words = dict(words)
        self._best_by = best_by
        self._by_epoch = by_epoch
        self._pointed = pointed
        self._follow = follow
        budget = words.get("keep_bytes")
        self._budget_bytes = None if budget is None else parse_bytes(budget, "keep_bytes")

    def to_delete(self, records: Sequence[Record]) -> list[Record]:
        beaten = self._beaten(links(records))
        shared = {record.content_xxh3_128: record for record in links(records) if record not in beaten}
        written = [record for record in records if not is_link(record)]
        asked = [self._as_asked(record, shared) for record in written]
        kept = self._retention(shared).kept(asked, datetime.now(UTC))
        pointed = self._pointed()
        return beaten + [
            record
            for record in written
            if record.name not in kept and record.name != pointed and not self._lives_on(record, shared)
        ]

    def label(self, catalog: Catalog, records: Sequence[Record]) -> None:
        self._follow(records)  # the names are the labels

    def _beaten(self, linked: Sequence[Record]) -> list[Record]:
        """The links that are no longer among the best. Those by a metric that nobody asks for (any more, or yet) are
        not judged."""
        beaten = []
        for metric in self._best_by.metrics:
            mine = [record for record in linked if metric.name in record.metrics]
            kept = KeepBest(metric, self._best_by.keep).kept(mine)
            beaten += [record for record in mine if record.name not in kept]
        return beaten

    def _as_asked(self, record: Record, shared: Mapping[str, Record]) -> Record:
        """``record`` as the retention should see it: periodic or not, and with the bytes that it alone holds."""
        is_counted = self._is_unlimited or is_periodic(record.reasons)
        return replace(
            record,
            reasons=(INTERVAL,) if is_counted else (BEST,),
            metrics={},
            progress=Progress(record.progress.epoch) if self._by_epoch else record.progress,
            total_bytes=0 if record.content_xxh3_128 in shared else record.total_bytes,
        )

    def _retention(self, shared: Mapping[str, Record]) -> Retention:
        retention = Retention.parse(**self._words)
        if self._budget_bytes is None:
            return retention
        left = self._budget_bytes - sum(record.total_bytes for record in shared.values())
        return replace(retention, keep_bytes=max(0, left))

    def _lives_on(self, record: Record, shared: Mapping[str, Record]) -> bool:
        """Whether it was written for being the best alone, and still is: it costs no byte beside its link."""
        return record.reasons == (BEST,) and record.content_xxh3_128 in shared

    @property
    def _is_unlimited(self) -> bool:
        return int(self._words["max_keep_ckpts"]) <= 0


def is_periodic(reasons: Collection[str]) -> bool:
    """Whether what was saved for ``reasons`` counts for ``max_keep_ckpts``: the best and the last do not."""
    return not _OFF_INTERVAL.issuperset(reasons)

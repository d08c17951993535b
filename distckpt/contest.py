"""Which files are the best, by each metric on its own: links to the file that was written, each with its record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from distckpt.best import BestBy, Metric, ahead_of, ranking
from distckpt.manifest import Record
from distckpt.retention import BEST


@dataclass(frozen=True)
class Verdict:
    """What one report of metrics changes.

    Attributes:
        wins: the metrics by which the state is now among the best, and its values.
        tops: those of them by which it is the best of all.
    """

    wins: Mapping[str, float]
    tops: tuple[str, ...] = ()


class Contest:
    """Judges reports against the best files that are there, so that a restart changes nothing.

    Attributes:
        best_by: by which metrics.
        elsewhere: the best score by a metric that no record here tells of; None where there is none.
    """

    def __init__(self, best_by: BestBy) -> None:
        self.best_by = best_by
        self.elsewhere: Callable[[Metric], float | None] = lambda metric: None

    def judge(self, reported: Mapping[str, object], records: Iterable[Record]) -> Verdict:
        """What ``reported`` changes, where ``records`` are those of the run.

        Raises:
            KeyError, TypeError: where a metric is missing or no number, see `Metric.value_in`.
        """
        linked = links(records)
        values = {metric: metric.value_in(reported) for metric in self.best_by.metrics}  # all, before any counts
        wins: dict[str, float] = {}
        tops: list[str] = []
        for metric, value in values.items():
            if value is None:
                continue
            ahead = ahead_of(metric, value, self._rivals(metric, linked))
            if ahead < self.best_by.keep:
                wins[metric.name] = value
            if ahead == 0:
                tops.append(metric.name)
        return Verdict(wins, tuple(tops))

    def _rivals(self, metric: Metric, linked: Sequence[Record]) -> list[float]:
        scores = [record.metrics[metric.name] for record in ranking(metric, linked)]
        other = self.elsewhere(metric)
        return scores if other is None or other in scores else [*scores, other]


def is_link(record: Record) -> bool:
    """Whether ``record`` is of a best file, and not of the file that was written."""
    return record.reasons == (BEST,) and len(record.metrics) == 1


def links(records: Iterable[Record]) -> list[Record]:
    """Those of ``records`` that are of best files."""
    return [record for record in records if is_link(record)]

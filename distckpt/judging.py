"""Whether what training reports makes a checkpoint the best: rank 0's numbers decide, every rank learns it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from distckpt.best import AutoMetric, BestBy, Metric, as_number, improves
from distckpt.manifest import Record
from distckpt.ranks import Json, Ranks, from_leader


@dataclass(frozen=True)
class Verdict:
    """The finite numbers that rank 0 reported, and whether they make a new best."""

    metrics: Mapping[str, float]
    is_best: bool


class Judge:
    """Judges reports against the records on disk, so that a restart changes nothing.

    Args:
        best_by: by which metrics; the first report settles what ``"auto"`` is, on all ranks.
        records: those of this run, read on the leader.
    """

    def __init__(self, best_by: BestBy, *, ranks: Ranks, records: Callable[[], Sequence[Record]]) -> None:
        self._best_by = best_by
        self._ranks = ranks
        self._records = records

    def numbers(self, reported: Mapping[str, object]) -> dict[str, float | None]:
        """The numbers in ``reported``, ``None`` for what is not finite. Not collective: it raises on the rank at fault
        before others wait for it.

        Raises:
            KeyError: where a metric is missing; the message names the nearest.
            TypeError: where it is no number.
        """
        judged = {metric.name: metric.value_in(reported) for metric in self._best_by.metrics}
        others = {name: _finite(value, name) for name, value in reported.items() if name not in judged}
        return {name: judged.get(name, others.get(name)) for name in reported}

    def judge(self, numbers: Mapping[str, float | None]) -> Verdict:
        """What rank 0's ``numbers`` mean. Collective."""
        if isinstance(auto := self._best_by.asked, AutoMetric):
            name, rule = from_leader(self._ranks, "choice of a metric", lambda: _spell(auto.settle(numbers)))
            self._best_by.asked = (Metric(name, rule),)
        metrics, is_best = from_leader(self._ranks, "report of metrics", lambda: self._verdict(numbers))
        return Verdict(metrics, is_best)

    def _verdict(self, numbers: Mapping[str, float | None]) -> Json:
        finite = {name: number for name, number in numbers.items() if number is not None}
        records = self._records()
        keep = self._best_by.keep
        is_best = any(improves(one, finite.get(one.name), records, keep) for one in self._best_by.metrics)
        return [finite, is_best]


def _spell(metric: Metric) -> Json:
    return [metric.name, metric.rule]


def _finite(value: object, name: str) -> float | None:
    try:
        return as_number(value, name)
    except TypeError:
        return None  # what nobody asked to be judged need not be a number

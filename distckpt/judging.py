"""Whether what training reports makes a checkpoint the best: rank 0's numbers decide, every rank learns it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from distckpt.best import AutoMetric, Metric, as_number, improves
from distckpt.manifest import Record
from distckpt.ranks import Json, Ranks, from_leader


@dataclass(frozen=True)
class Verdict:
    """The finite numbers that rank 0 reported, and whether they make a new best."""

    metrics: Mapping[str, float]
    is_best: bool


class Judge:
    """Judges reports by the metrics of ``save_best``, against the records on disk, so that a restart changes nothing.

    Args:
        records: those of this run, read on the leader.

    Attributes:
        asked: the metrics; with ``"auto"`` the first report settles which one, on all ranks.
        keep: how many of the best are kept for each metric, so also how many count as best.
    """

    def __init__(
        self,
        asked: tuple[Metric, ...] | AutoMetric,
        keep: int,
        *,
        ranks: Ranks,
        records: Callable[[], Sequence[Record]],
    ) -> None:
        self.asked = asked
        self.keep = keep
        self._ranks = ranks
        self._records = records

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that are known by now."""
        return () if isinstance(self.asked, AutoMetric) else self.asked

    def numbers(self, reported: Mapping[str, object]) -> dict[str, float | None]:
        """The numbers in ``reported``, ``None`` for what is not finite. Not collective: it raises on the rank at fault
        before others wait for it.

        Raises:
            KeyError: where a metric is missing; the message names the nearest.
            TypeError: where it is no number.
        """
        judged = {metric.name: metric.value_in(reported) for metric in self.metrics}
        others = {name: _finite(value, name) for name, value in reported.items() if name not in judged}
        return {name: judged.get(name, others.get(name)) for name in reported}

    def judge(self, numbers: Mapping[str, float | None]) -> Verdict:
        """What rank 0's ``numbers`` mean. Collective."""
        if isinstance(self.asked, AutoMetric):
            auto = self.asked
            name, rule = from_leader(self._ranks, "choice of a metric", lambda: _spell(auto.settle(numbers)))
            self.asked = (Metric(name, rule),)
        metrics, is_best = from_leader(self._ranks, "report of metrics", lambda: self._verdict(numbers))
        return Verdict(metrics, is_best)

    def _verdict(self, numbers: Mapping[str, float | None]) -> Json:
        finite = {name: number for name, number in numbers.items() if number is not None}
        records = self._records()
        is_best = any(improves(one, finite.get(one.name), records, self.keep) for one in self.metrics)
        return [finite, is_best]


def _spell(metric: Metric) -> Json:
    return [metric.name, metric.rule]


def _finite(value: object, name: str) -> float | None:
    try:
        return as_number(value, name)
    except TypeError:
        return None  # what nobody asked to be judged need not be a number

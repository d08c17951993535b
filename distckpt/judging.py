"""Whether what training reports makes a checkpoint the best: rank 0's numbers decide, every rank learns it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distckpt.best import AutoMetric, Metric, as_number, improves
from distckpt.catalog import scan
from distckpt.ranks import Json, Ranks, from_leader
from distckpt.stores import Store


@dataclass(frozen=True)
class Verdict:
    """The finite numbers that rank 0 reported, and whether they make a new best."""

    metrics: Mapping[str, float]
    is_best: bool


class Judge:
    """Judges reports by the metrics of ``save_best``, against the records on disk, so that a restart changes nothing.

    Attributes:
        asked: the metrics; with ``"auto"`` the first report settles which one, on all ranks.
        keep: how many of the best are kept for each metric, so also how many count as best.
    """

    def __init__(self, asked: tuple[Metric, ...] | AutoMetric, keep: int, *, ranks: Ranks, store: Store) -> None:
        self.asked = asked
        self.keep = keep
        self._ranks = ranks
        self._store = store

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that are known by now."""
        return () if isinstance(self.asked, AutoMetric) else self.asked

    def check(self, reported: Mapping[str, object]) -> None:
        """``reported`` can be judged. Not collective: it raises on the rank at fault before others wait for it.

        Raises:
            KeyError: where a metric is missing; the message names the nearest.
            TypeError: where it is no number.
        """
        for metric in self.metrics:
            metric.value_in(reported)

    def judge(self, reported: Mapping[str, object]) -> Verdict:
        """What rank 0's ``reported`` means. Collective."""
        if isinstance(self.asked, AutoMetric):
            auto = self.asked
            name, rule = from_leader(self._ranks, "choice of a metric", lambda: _spell(auto.settle(reported)))
            self.asked = (Metric(name, rule),)
        metrics, is_best = from_leader(self._ranks, "report of metrics", lambda: self._verdict(reported))
        return Verdict(metrics, is_best)

    def _verdict(self, reported: Mapping[str, object]) -> Json:
        finite = {name: number for name, value in reported.items() if (number := _finite(value, name)) is not None}
        records = scan(self._store).records
        is_best = any(improves(one, finite.get(one.name), records, self.keep) for one in self.metrics)
        return [finite, is_best]


def _spell(metric: Metric) -> Json:
    return [metric.name, metric.rule]


def _finite(value: object, name: str) -> float | None:
    try:
        return as_number(value, name)
    except TypeError:
        return None  # what nobody asked to be judged need not be a number

"""Which checkpoints are kept, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Protocol

from distckpt.best import AutoMetric, Metric, ranking
from distckpt.manifest import Record
from distckpt.schedule import parse_duration, spell_duration

_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kMGTP])(i?))?B", re.IGNORECASE | re.ASCII)

BEST = "best"


class Rule(Protocol):
    """One reason to keep checkpoints. What no rule keeps, is let go."""

    def kept(self, records: Sequence[Record]) -> dict[str, str]:
        """The names of those of ``records`` that this rule keeps, each with a short phrase that says why.

        ``records`` go from the oldest to the newest.
        """
        ...


@dataclass(frozen=True)
class KeepNewest:
    """The newest of all: there is always one to resume from."""

    def kept(self, records: Sequence[Record]) -> dict[str, str]:
        return {record.name: "newest" for record in records[-1:]}


@dataclass(frozen=True)
class KeepLast:
    """The last ``n`` that were not saved for being the best alone; all of these where ``n`` is ``None``."""

    n: int | None = None

    def __post_init__(self) -> None:
        _refuse_below_one(self.n, "KeepLast")

    def kept(self, records: Sequence[Record]) -> dict[str, str]:
        periodic = [record for record in records if record.reasons != (BEST,)]
        if self.n is None:
            return {record.name: "no limit" for record in periodic}
        return {record.name: f"last {self.n}" for record in periodic[-self.n :]}


@dataclass(frozen=True)
class KeepBest:
    """The best ``n`` by ``metric``; of equals the older."""

    metric: Metric
    n: int = 1

    def __post_init__(self) -> None:
        _refuse_below_one(self.n, "KeepBest")

    def kept(self, records: Sequence[Record]) -> dict[str, str]:
        best = ranking(self.metric, records)[: self.n]
        return {record.name: f"best #{place} {self.metric.name}" for place, record in enumerate(best, start=1)}


@dataclass(frozen=True)
class KeepOnceBest:
    """All that ever were the best. For ``save_best="auto"`` after a restart: until the first report nobody knows by
    which metric, and what was the best must still be there then."""

    def kept(self, records: Sequence[Record]) -> dict[str, str]:
        return {record.name: "was best" for record in records if BEST in record.reasons}


@dataclass(frozen=True)
class KeepEvery:
    """Those at a step that ``n_steps`` divides, however old."""

    n_steps: int

    def __post_init__(self) -> None:
        _refuse_below_one(self.n_steps, "KeepEvery")

    def kept(self, records: Sequence[Record]) -> dict[str, str]:
        return {record.name: f"every {self.n_steps}" for record in records if record.progress.step % self.n_steps == 0}


@dataclass(frozen=True)
class KeepFor:
    """Those that are at most ``age`` old at ``now``, and those whose age nobody knows: with a time that does not
    parse, or that lies in the future."""

    age: timedelta
    now: datetime

    def __post_init__(self) -> None:
        if self.now.tzinfo is None:
            raise ValueError(f"now should have a time zone, best UTC; {self.now.isoformat()} has none")

    def kept(self, records: Sequence[Record]) -> dict[str, str]:
        told = {record.name: self._why(record.created) for record in records}
        return {name: why for name, why in told.items() if why is not None}

    def _why(self, created: str) -> str | None:
        try:
            at = datetime.fromisoformat(created)
        except ValueError:
            return "of unknown age"
        age = self.now - (at if at.tzinfo else at.replace(tzinfo=UTC))
        if age < timedelta(0):
            return "of unknown age"
        return f"newer than {spell_duration(self.age)}" if age <= self.age else None


@dataclass(frozen=True)
class Retention:
    """What is kept: whatever any rule keeps, and always the newest; then as much as the budget allows.

    It decides over the records it is given: give it those of one run, as what it does not keep will be deleted.

    Attributes:
        rules: what they keep, the budget may take again, the oldest first.
        bests: what they keep, stays, as the newest does; even over the budget.
        keep_for: see `KeepFor`.
        keep_bytes: the budget, over all that is kept.
    """

    rules: tuple[Rule, ...]
    bests: tuple[Rule, ...] = ()
    keep_for: timedelta | None = None
    keep_bytes: int | None = None

    @classmethod
    def parse(
        cls,
        *,
        max_keep_ckpts: int = -1,
        metrics: Iterable[Metric] | AutoMetric = (),
        max_keep_best: int = 1,
        keep_every: int | None = None,
        keep_for: str | timedelta | None = None,
        keep_bytes: str | int | None = None,
    ) -> Retention:
        """The retention that the user's words ask for. ``metrics`` is what `best.parse_metrics` made of theirs.

        With an ``AutoMetric`` all that ever were the best are kept: parse again once it is settled.

        Raises:
            TypeError, ValueError: naming the word, the value and what is right.
        """
        last = _int(max_keep_ckpts, "max_keep_ckpts")
        best = _positive(max_keep_best, "max_keep_best")
        rules: list[Rule] = [KeepLast(last if last > 0 else None)]
        if keep_every is not None:
            rules.append(KeepEvery(_positive(keep_every, "keep_every")))
        bests: tuple[Rule, ...]
        if isinstance(metrics, AutoMetric):
            bests = (KeepOnceBest(),)
        else:
            bests = tuple(KeepBest(metric, best) for metric in metrics)
        return cls(
            rules=tuple(rules),
            bests=bests,
            keep_for=None if keep_for is None else parse_duration(keep_for, "keep_for"),
            keep_bytes=None if keep_bytes is None else parse_bytes(keep_bytes, "keep_bytes"),
        )

    def kept(self, records: Iterable[Record], now: datetime) -> dict[str, str]:
        """The names of what is kept, the oldest first, and why. Never empty if there is a record."""
        ordered = _oldest_first(records)
        return {record.name: why for record, why in self._kept(ordered, now)}

    def to_delete(self, records: Iterable[Record], now: datetime) -> list[Record]:
        """What is not kept, the oldest first. Never the newest, and never one of the best."""
        ordered = _oldest_first(records)
        kept = self.kept(ordered, now)
        return [record for record in ordered if record.name not in kept]

    def over_bytes(self, records: Iterable[Record], now: datetime) -> int:
        """By how many bytes the newest and the best alone are more than the budget; 0 where all that is kept fits."""
        if self.keep_bytes is None:
            return 0
        kept = self._kept(_oldest_first(records), now)
        return max(0, sum(record.total_bytes for record, _ in kept) - self.keep_bytes)

    def _kept(self, ordered: Sequence[Record], now: datetime) -> list[tuple[Record, str]]:
        aged: tuple[Rule, ...] = () if self.keep_for is None else (KeepFor(self.keep_for, now),)
        soft = _whys((*self.rules, *aged), ordered)
        firm = _whys((*self.bests, KeepNewest()), ordered)
        whys = [(record, soft.get(record.name, []) + firm.get(record.name, [])) for record in ordered]
        kept = [(record, ", ".join(why)) for record, why in whys if why]
        if self.keep_bytes is None:
            return kept
        excess = sum(record.total_bytes for record, _ in kept) - self.keep_bytes
        fitting = []
        for record, why in kept:
            if excess > 0 and record.name not in firm:
                excess -= record.total_bytes
            else:
                fitting.append((record, why))
        return fitting


def parse_bytes(value: str | int, word: str) -> int:
    """The size that the user wrote for ``word``: an int, or a text such as ``"500GB"`` or ``"1.5TiB"``.

    Raises:
        TypeError, ValueError: for everything else, and for less than one byte; naming ``word``.
    """
    if not isinstance(value, str):
        return _positive(value, word)
    match = _BYTES.fullmatch(value.strip())
    if match is None:
        raise ValueError(f'{word}: {ascii(value)[:80]} is no size; write it as "500GB", "1.5TiB" or an int of bytes')
    number, prefix, binary = match.groups()
    size = int(Decimal(number) * (1024 if binary else 1000) ** " kmgtp".index((prefix or " ").lower()))
    if size < 1:
        raise ValueError(f"{word}: {ascii(value)[:80]} should be at least one byte")
    return size


def _whys(rules: Iterable[Rule], ordered: Sequence[Record]) -> dict[str, list[str]]:
    whys: dict[str, list[str]] = {}
    for rule in rules:
        for name, why in rule.kept(ordered).items():
            whys.setdefault(name, []).append(why)
    return whys


def _oldest_first(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda record: record.order)


def _int(value: object, word: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{word}: {ascii(value)[:80]} should be an int, is {type(value).__name__}")
    return value


def _positive(value: object, word: str) -> int:
    number = _int(value, word)
    if number < 1:
        raise ValueError(f"{word}: {number} should be at least 1")
    return number


def _refuse_below_one(n: int | None, who: str) -> None:
    if n is not None and n < 1:
        raise ValueError(f"{who}({n}) keeps nothing: it should be at least 1")

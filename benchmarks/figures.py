"""What samples amount to: medians with their spread, what a save adds to training, which differences are not noise.

A turn is what a contender answers to ``turn``: some quiet steps, a save, and the steps from it on until it was done.
The control's turns have the same steps without a save.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median, quantiles
from typing import Any

Sample = Mapping[str, Any]
NOISE, TOO_FEW = "within noise", "too few"
# With fewer samples the quartiles say nothing of the spread.
FEWEST = 3


@dataclass(frozen=True)
class Figure:
    """The median of some samples, and the quartiles around it."""

    median: float
    low: float
    high: float
    count: int

    @property
    def spread(self) -> float:
        """Between the quartiles lies half of all samples."""
        return self.high - self.low

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}..{self.high:.3f})"


def figure(samples: Iterable[float]) -> Figure | None:
    """None where there are none."""
    values = list(samples)
    if len(values) < 2:
        return Figure(values[0], values[0], values[0], 1) if values else None
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Figure(median(values), low, high, len(values))


def undisturbed(samples: Iterable[Sample], limit: float) -> list[Sample]:
    """Those during which others used no more than this share of a core."""
    return [one for one in samples if one["foreign_share"] <= limit]


def undisturbed_pairs(
    turns: Sequence[Sample], control: Sequence[Sample], limit: float
) -> tuple[list[Sample], list[Sample]]:
    """Of the turns in each round those where neither was disturbed."""
    both = [
        pair
        for pair in zip(turns, control, strict=True)
        if max(pair[0]["foreign_share"], pair[1]["foreign_share"]) <= limit
    ]
    return [pair[0] for pair in both], [pair[1] for pair in both]


def added(turns: Sequence[Sample], control: Sequence[Sample]) -> list[float]:
    """For each turn, how much longer its steps took than they would have without the save.

    They would have taken what the control's steps in the same places took, and what the steps of this process take
    longer anyhow, seen at the steps before the save: two processes that do the same differ by some per cent for as
    long as they live. Where a turn went on because its save was not done, the control's last place stands for the rest.
    """
    if not turns:
        return []
    places = [median(times) for times in zip(*(turn["steps"] for turn in control), strict=True)]
    offset = quiet_step(turns) - quiet_step(control)
    return [
        sum(step - places[min(place, len(places) - 1)] - offset for place, step in enumerate(turn["steps"]))
        for turn in turns
    ]


def quiet_step(turns: Iterable[Sample]) -> float:
    """The median of the steps that nothing was saved beside."""
    return median(chain.from_iterable(turn["quiet"] for turn in turns))


def slowdown(row: Sample) -> Figure:
    """By which share steps with a save at each took longer than those before and after. The spread is how far the two
    differ."""
    ratios = [
        sum(row["steps"]) / len(row["steps"]) / median(quiet) - 1 for quiet in (row["quiet_before"], row["quiet_after"])
    ]
    together = median(row["quiet_before"] + row["quiet_after"])
    return Figure(sum(row["steps"]) / len(row["steps"]) / together - 1, min(ratios), max(ratios), len(row["steps"]))


def ratio(one: Figure | None, other: Figure | None) -> str:
    """How many times ``other`` it is; only where they differ by more than either is spread, and no more exactly than
    it is known."""
    if one is None or other is None:
        return "-"
    if min(one.count, other.count) < FEWEST:
        return TOO_FEW
    if abs(one.median - other.median) <= max(one.spread, other.spread):
        return NOISE
    # What may as well be nothing has no ratio, but the ratio has a limit.
    if one.low <= 0 < min(one.high, other.low):
        return f"< {one.high / other.median:.2f}x"
    if other.low <= 0 < min(other.high, one.low):
        return f"> {one.median / other.high:.2f}x"
    return f"{one.median / other.median:.2f}x" if min(one.low, other.low) > 0 else NOISE

"""When a save is due: every so many steps, every so often, or both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

# A lone "m" is not among them: who means months in keep_for="3m" must not lose checkpoints after three minutes.
_UNITS = {
    "weeks": "w|weeks?",
    "days": "d|days?",
    "hours": "h|hrs?|hours?",
    "minutes": "mins?|minutes?",
    "seconds": "s|secs?|seconds?",
}
_DURATION = re.compile(
    " ?".join(rf"(?:(?P<{unit}>\d+(?:\.\d+)?) ?(?:{words}))?" for unit, words in _UNITS.items()),
    re.IGNORECASE | re.ASCII,
)

Interval = int | str | timedelta | Sequence[int | str | timedelta]


@dataclass(frozen=True)
class Schedule:
    """The moments at which a save is due.

    Attributes:
        every: the step-based intervals, each at least 1. The caller decides whether it counts steps or epochs.
        period: the shortest of the time-based intervals; ``None`` without one. Whether it has passed is for
            those to say who hold a clock.
        begin: the count at which the first save is due, and from which ``every`` is counted.
    """

    every: tuple[int, ...] = ()
    period: timedelta | None = None
    begin: int = 0

    @classmethod
    def parse(cls, interval: Interval, *, begin: int = 0) -> Schedule:
        """The schedule that the user's word ``interval`` asks for, together with ``save_begin``.

        An int is a number of steps, and one that is not positive means never. A str such as ``"15min"`` or a
        ``timedelta`` is a duration. A list or tuple asks for each of its items.

        Raises:
            TypeError, ValueError: for everything else, naming the word, the value and what is right.
        """
        if isinstance(interval, list | tuple):
            if not interval:
                raise ValueError(f"interval: an empty {type(interval).__name__} asks for nothing; -1 means never")
            asked = [_steps_or_duration(one) for one in interval]
        else:
            asked = [_steps_or_duration(interval)]
        return cls(
            every=tuple(one for one in asked if isinstance(one, int) and one > 0),
            period=min((one for one in asked if isinstance(one, timedelta)), default=None),
            begin=_count(begin),
        )

    def due(self, count: int, before: int | None = None) -> bool:
        """Whether a step-based save is due once ``count`` steps (or epochs) are done, and was not yet when it were
        ``before``: one less, if it is not said. The same on every rank."""
        passed = (count if before is None else before + 1) - self.begin
        since = count - self.begin
        return since >= 0 and any(since // steps * steps >= passed for steps in self.every)


def parse_duration(value: str | timedelta, word: str) -> timedelta:
    """The duration that the user wrote for ``word``: a text such as ``"90s"`` or ``"1h30min"``, or a ``timedelta``.

    Raises:
        TypeError, ValueError: for everything else, and for what is not longer than zero; naming ``word``.
    """
    if isinstance(value, timedelta):
        duration = value
    elif isinstance(value, str):
        duration = _parse(value, word)
    else:
        raise TypeError(f'{word}: {ascii(value)[:80]} should be a duration, such as "15min" or a timedelta')
    if duration <= timedelta(0):
        raise ValueError(f"{word}: {ascii(value)[:80]} should be longer than zero")
    return duration


def spell_duration(duration: timedelta) -> str:
    """A short text that `parse_duration` reads back as ``duration``, which is longer than zero: ``7d``, ``1h30min``."""
    minutes, seconds = divmod(duration.seconds, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{duration.microseconds:06d}".rstrip("0").rstrip(".")
    parts = ((str(duration.days), "d"), (str(hours), "h"), (str(minutes), "min"), (f"{seconds}{fraction}", "s"))
    return "".join(number + unit for number, unit in parts if number != "0")


def _parse(text: str, word: str) -> timedelta:
    match = _DURATION.fullmatch(text.strip())
    parts = {unit: float(number) for unit, number in match.groupdict().items() if number} if match else {}
    if not parts:
        raise ValueError(
            f"{word}: {ascii(text)[:80]} is no duration; "
            'write numbers with their units, the largest first: "90s", "15min", "2h", "1h30min", "7d"'
        )
    try:
        return timedelta(**parts)
    except OverflowError as error:
        raise ValueError(f"{word}: {ascii(text)[:80]} is longer than can be counted") from error


def _steps_or_duration(value: object) -> int | timedelta:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, timedelta):
        return parse_duration(value, "interval")
    if isinstance(value, str):
        try:
            return parse_duration(value, "interval")
        except ValueError as error:
            raise ValueError(f"{error}; a number of steps is an int, and -1 means never") from error
    raise TypeError(
        f"interval: {ascii(value)[:80]} should be a number of steps (an int, -1 for never), "
        'a duration ("15min" or a timedelta), or one flat list of such'
    )


def _count(begin: int) -> int:
    if isinstance(begin, bool) or not isinstance(begin, int):
        raise TypeError(f"save_begin: {ascii(begin)[:80]} should be an int, the count at which saving starts")
    if begin < 0:
        raise ValueError(f"save_begin should not be less than 0, but got {begin}")
    return begin

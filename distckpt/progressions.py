"""Many whole numbers in few: of those that are equally far apart, the first, the distance and how many they are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice

# Fewer of them take no more room one by one.
_LEAST = 4


def condensed(numbers: Sequence[int]) -> Sequence[int]:
    """The same numbers: as a ``range`` where they are equally far apart, else as a tuple. Equal where they are equal.

    None and one of them are equally far apart.
    """
    if isinstance(numbers, range):
        return numbers
    if not numbers:
        return range(0)
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if step:
        even = range(numbers[0], numbers[0] + step * len(numbers), step)
        if all(map(int.__eq__, even, numbers)):
            return even
    return tuple(numbers)


def is_rising(numbers: Sequence[int]) -> bool:
    """Whether each is more than the one before."""
    if isinstance(numbers, range):
        return numbers.step > 0 or len(numbers) < 2
    return all(map(int.__lt__, numbers, islice(numbers, 1, None)))


def told(numbers: Sequence[int]) -> list[int | list[int]]:
    """They, as JSON that is short where many of them are equally far apart; `read` reads it."""
    if isinstance(numbers, range) and len(numbers) >= _LEAST:
        return [[numbers[0], numbers.step, len(numbers)]]
    found: list[int | list[int]] = []
    at = 0
    while at < len(numbers):
        end = _end_of_run(numbers, at)
        if end - at >= _LEAST:
            found.append([numbers[at], numbers[at + 1] - numbers[at], end - at])
            at = end
        else:
            found.append(numbers[at])
            at += 1
    return found


def read(words: object, most: int, what: str) -> Sequence[int]:
    """What was `told`, condensed: at most so many numbers, none of them below zero. Nobody has to be trusted.

    Raises:
        ValueError: naming ``what``, for everything else.
    """
    if type(words) is not list or len(words) > most:
        raise ValueError(f"{what} should be up to {most} numbers, is {ascii(words)[:80]}")
    if words and set(map(type, words)) == {int} and min(words) >= 0:
        return condensed(words)  # as below, in a tenth of the time
    runs = [_run(word, what) for word in words]
    if sum(map(len, runs)) > most:
        raise ValueError(f"{what} should be up to {most} numbers, is {ascii(words)[:80]}")
    return runs[0] if len(runs) == 1 else condensed(tuple(chain(*runs)))


def _end_of_run(numbers: Sequence[int], at: int) -> int:
    end = at + 2
    if end > len(numbers) or not (step := numbers[at + 1] - numbers[at]):
        return at + 1
    while end < len(numbers) and numbers[end] - numbers[end - 1] == step:
        end += 1
    return end


def _run(word: object, what: str) -> range:
    first, step, count = (
        (word, 1, 1) if type(word) is int else word if type(word) is list and len(word) == 3 else (-1,) * 3
    )
    if not (type(first) is type(step) is type(count) is int and first >= 0 and step and count >= 1):
        raise ValueError(f"{what}: {ascii(word)[:80]} is neither a number nor several that are equally far apart")
    if first + step * (count - 1) < 0 or count >= 1 << 62:
        raise ValueError(f"{what}: {ascii(word)[:80]} is below zero, or too many")
    return range(first, first + step * count, step)

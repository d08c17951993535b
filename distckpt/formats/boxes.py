"""Boxes: parts of a tensor that are one range in each of its dimensions, many at a time.

Offsets and sizes are int64 arrays, a row for each box and a column for each dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distckpt.progressions import condensed

Ints = NDArray[np.int64]

_PAIRS_AT_ONCE = 1 << 20


def fault(shape: Sequence[int], offsets: Ints, sizes: Ints) -> str:
    """Why these boxes do not cover a tensor of that shape, each element once; empty where they do.

    A tensor without elements is covered by one box, which is all of it.
    """
    whole = np.array(shape, dtype=np.int64)
    if 0 in shape or not shape:
        is_whole = len(offsets) == 1 and not offsets.any() and bool((sizes == whole).all())
        return "" if is_whole else f"it is in {len(offsets)} parts, and should be in one"
    if (offsets < 0).any() or (sizes <= 0).any() or (sizes > whole).any() or (offsets > whole - sizes).any():
        return "a part of it lies outside of it, or is empty"
    held, all_of_it = int(sizes.prod(axis=1).sum()), math.prod(shape)
    if held < all_of_it:
        return f"{all_of_it - held} of its {all_of_it} elements are missing"
    is_first = np.arange(len(offsets)) == 0
    if held == all_of_it and _follow(np.broadcast_to(whole, offsets.shape), offsets, sizes, is_first).all():
        return ""
    return "" if held == all_of_it and _are_apart(offsets, offsets + sizes) else "parts of it overlap"


def are_whole(wholes: Ints, offsets: Ints, sizes: Ints, is_first: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of many tensors are covered, each element once, by boxes that were cut from them in turn, in order.

    Where it says no, `fault` knows.

    Args:
        wholes: of each box, the shape of its tensor, which has elements.
        offsets, sizes: of the boxes of one tensor after another, each as `corners` sorts them.
        is_first: which begin a tensor.
    """
    follow = _follow(wholes, offsets, sizes, is_first)
    if not len(follow):
        return follow
    whole: NDArray[np.bool_] = np.logical_and.reduceat(follow, np.flatnonzero(is_first))
    return whole


def grid_of(offsets: Ints, sizes: Ints) -> tuple[Sequence[int], ...] | None:
    """Where the parts of each dimension begin, as `progressions.condensed` has it, if these boxes are the cells of a
    grid; ``None`` where they are not.

    Args:
        offsets, sizes: of boxes that cover a tensor, each element once, as `corners` sorts them.
    """
    starts = [_distinct(column) for column in offsets.T]
    if math.prod(map(len, starts)) != len(offsets):
        return None
    return tuple(_condensed(of) for of in starts)


def cells(shape: Sequence[int], starts: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    """Offsets and sizes of the cells of that grid, sorted as `corners` does: the inverse of `grid_of`."""
    begins = [np.array(of, dtype=np.int64) for of in starts]
    extents = [np.diff(of, append=extent) for of, extent in zip(begins, shape, strict=True)]
    count = math.prod(map(len, begins))
    offsets, sizes = (
        np.stack([one.ravel() for one in np.meshgrid(*of, indexing="ij")], axis=1) if of else np.empty((1, 0), np.int64)
        for of in (begins, extents)
    )
    assert len(offsets) == count
    return offsets, sizes


def corners(shape: Sequence[int], offsets: Ints) -> Ints:
    """Where each box begins in the tensor's elements, as they lie one after another."""
    steps = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return offsets @ np.array(steps, dtype=np.int64)


def overlaps(offset: Sequence[int], size: Sequence[int], offsets: Ints, sizes: Ints) -> tuple[Ints, Ints, Ints]:
    """Which of the boxes share elements with the one at ``offset``; and where what they share begins and ends."""
    mine = np.array(offset, dtype=np.int64)
    low = np.maximum(offsets, mine)
    high = np.minimum(offsets + sizes, mine + np.array(size, dtype=np.int64))
    found = np.flatnonzero((high > low).all(axis=1))
    return found, low[found], high[found]


def _follow(wholes: Ints, offsets: Ints, sizes: Ints, is_first: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether each box begins where the one before it ends: in one dimension, if both are alike in those before it, and
    the one ends, and the other begins, with the whole in those behind it. The first begins, the last ends with it.
    """
    ends = offsets + sizes
    is_inside = ((offsets >= 0) & (sizes > 0) & (sizes <= wholes) & (offsets <= wholes - sizes)).all(axis=1)
    begins, is_at_end = offsets == 0, ends == wholes
    follow = begins.all(axis=1)
    alike = (offsets[1:] == offsets[:-1]) & (sizes[1:] == sizes[:-1])
    turns = is_at_end[:-1] & begins[1:]
    goes_on = np.zeros(len(alike), dtype=bool)
    for dim in range(wholes.shape[1]):
        behind = alike[:, :dim].all(axis=1) & turns[:, dim + 1 :].all(axis=1)
        goes_on |= behind & (offsets[1:, dim] == ends[:-1, dim])
    follow[1:] = np.where(is_first[1:], follow[1:], goes_on)
    is_last = np.append(is_first[1:], True)
    sound: NDArray[np.bool_] = follow & is_inside & (is_at_end.all(axis=1) | ~is_last)
    return sound


def _distinct(column: Ints) -> Ints:
    """The numbers in it, sorted, each once."""
    if not column.any():
        return column[:1]
    return column if (column[1:] > column[:-1]).all() else np.unique(column)


def _condensed(numbers: Ints) -> Sequence[int]:
    if len(numbers) > 1 and ((steps := np.diff(numbers)) == steps[0]).all():
        step = int(steps[0])
        return range(int(numbers[0]), int(numbers[0]) + step * len(numbers), step)
    return condensed(numbers.tolist())


def _are_apart(lows: Ints, highs: Ints) -> bool:
    """Whether no two of these boxes share an element.

    Where a plane lies between some and others, they are apart: what is left on one side of each plane is compared, each
    with each. That is next to nothing, however a tensor was cut and cut again.
    """
    dims = range(lows.shape[1])
    ranked = [np.unique(np.concatenate([lows[:, dim], highs[:, dim]]), return_inverse=True)[1] for dim in dims]
    sides = np.zeros(len(lows), dtype=np.int64)
    number, before = 1, 0
    while before < number < len(lows):
        before = number
        for ranks in ranked:
            sides = _parted(sides, *np.split(ranks, 2))
        number = int(sides.max()) + 1
    order = np.argsort(sides, kind="stable")
    counts = np.bincount(sides)
    ends = np.cumsum(counts)
    crowds = [order[ends[side] - counts[side] : ends[side]] for side in np.flatnonzero(counts > 1)]
    return all(_share_nothing(lows[crowd], highs[crowd]) for crowd in crowds)


def _parted(sides: Ints, lows: Ints, highs: Ints) -> Ints:
    """On which side each lies, where those of a side that a plane separates are on two. Of one dimension."""
    order = np.lexsort((lows, sides))
    apart = sides[order] * (int(highs.max()) + 1)
    reached = np.maximum.accumulate(apart + highs[order])
    is_first = np.append(True, apart[1:] + lows[order][1:] >= reached[:-1])
    parted = np.empty_like(sides)
    parted[order] = np.cumsum(is_first) - 1
    return parted


def _share_nothing(lows: Ints, highs: Ints) -> bool:
    step = max(_PAIRS_AT_ONCE // len(lows), 1)
    for begin in range(0, len(lows), step):
        some = slice(begin, begin + step)
        shared = (np.minimum(highs[some, None], highs) > np.maximum(lows[some, None], lows)).all(axis=2)
        if np.count_nonzero(shared) != len(lows[some]):  # each shares all of it with itself
            return False
    return True

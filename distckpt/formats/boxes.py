"""Boxes: parts of a tensor that are one range in each of its dimensions, many at a time.

Offsets and sizes are int64 arrays, a row for each box and a column for each dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
    if held > all_of_it or not _are_apart(offsets, offsets + sizes):
        return "parts of it overlap"
    return ""


def overlaps(offset: Sequence[int], size: Sequence[int], offsets: Ints, sizes: Ints) -> tuple[Ints, Ints, Ints]:
    """Which of the boxes share elements with the one at ``offset``; and where what they share begins and ends."""
    mine = np.array(offset, dtype=np.int64)
    low = np.maximum(offsets, mine)
    high = np.minimum(offsets + sizes, mine + np.array(size, dtype=np.int64))
    found = np.flatnonzero((high > low).all(axis=1))
    return found, low[found], high[found]


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

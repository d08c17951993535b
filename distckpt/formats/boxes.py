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
    if held > all_of_it or not (_are_cells(whole, offsets, sizes) or _are_apart(offsets, sizes)):
        return "parts of it overlap"
    return ""


def overlaps(offset: Sequence[int], size: Sequence[int], offsets: Ints, sizes: Ints) -> tuple[Ints, Ints, Ints]:
    """Which of the boxes share elements with the one at ``offset``; and where what they share begins and ends."""
    mine = np.array(offset, dtype=np.int64)
    low = np.maximum(offsets, mine)
    high = np.minimum(offsets + sizes, mine + np.array(size, dtype=np.int64))
    found = np.flatnonzero((high > low).all(axis=1))
    return found, low[found], high[found]


def _are_cells(whole: Ints, offsets: Ints, sizes: Ints) -> bool:
    """Whether they are cells of the grid that their beginnings make, each another one: then they are apart."""
    ends = offsets + sizes
    for dim in range(len(whole)):
        starts = np.unique(offsets[:, dim])
        following = np.append(starts, whole[dim])[np.searchsorted(starts, offsets[:, dim], side="right")]
        if (ends[:, dim] != following).any():
            return False
    return len(np.unique(offsets, axis=0)) == len(offsets)


def _are_apart(offsets: Ints, sizes: Ints) -> bool:
    """Whether no two of them share an element: each is compared with each."""
    ends = offsets + sizes
    step = max(_PAIRS_AT_ONCE // len(offsets), 1)
    for begin in range(0, len(offsets), step):
        some = slice(begin, begin + step)
        shared = (np.minimum(ends[some, None], ends) > np.maximum(offsets[some, None], offsets)).all(axis=2)
        if np.count_nonzero(shared) != len(offsets[some]):  # each shares all of it with itself
            return False
    return True

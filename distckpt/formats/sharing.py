"""Who writes what of that which several ranks hold alike: to each about as many bytes, and of no tensor two parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from distckpt.formats.boxes import Ints

# A tensor is cut across the first dimension whose slices are no more than that of a rank's share.
_FINE = 0.005

LEAST_SHARE_BYTES = 1 << 20

_LEAST_CUT_BYTES = 1 << 12  # which it makes no difference who writes; and no element that lies as bytes is cut


@dataclass(frozen=True)
class Group:
    """Ranks that hold the same, and how many bytes of it each can take until all have as much as the others."""

    ranks: tuple[int, ...]
    capacities: tuple[float, ...]


@dataclass(frozen=True)
class Shares:
    """What each rank of a group writes.

    Attributes:
        owners: by item, the how-manieth rank of the group writes all of it; -1 where it is cut.
        cuts: of those that are: by item, who, the dimension, and where in it the part begins and ends.
    """

    owners: Ints
    cuts: dict[int, list[tuple[int, int, int, int]]]


def group_of(
    ranks: Sequence[int], total_bytes: int, loads: np.ndarray, writers: Collection[int] | None = None
) -> Group:
    """Those of ``ranks`` that share so many bytes.

    Args:
        loads: how many bytes each rank of the job writes anyway.
        writers: those that are to write what others have, too, if there are any among ``ranks``; ``None``: all.
    """
    among = [rank for rank in ranks if writers is None or rank in writers] or ranks
    all_of_them = np.array(sorted(among), dtype=np.int64)
    few = min(len(all_of_them), max(total_bytes // LEAST_SHARE_BYTES, 1))
    chosen = np.sort(all_of_them[np.argsort(loads[all_of_them], kind="stable")[:few]])
    theirs = loads[chosen].astype(np.float64)
    capacities = np.maximum(_level(theirs, total_bytes) - theirs, 0.0)
    return Group(tuple(chosen.tolist()), tuple(capacities.tolist()))


def writers_of(machines: Sequence[str], per_node: int) -> frozenset[int]:
    """The first so many ranks of each machine.

    Args:
        machines: where each rank runs.
    """
    seen: Counter[str] = Counter()
    found = []
    for rank, machine in enumerate(machines):
        seen[machine] += 1
        if seen[machine] <= per_node:
            found.append(rank)
    return frozenset(found)


def _level(loads: np.ndarray, total_bytes: int) -> float:
    """How much each has, once that many bytes were given to those who have the least."""
    ordered = np.sort(loads)
    levels = (total_bytes + np.cumsum(ordered)) / np.arange(1, len(ordered) + 1)  # if so many took part
    return float(levels[np.flatnonzero(levels >= ordered)[-1]])


def share(group: Group, sizes: Sequence[tuple[int, ...]], item_bytes: Ints) -> Shares:
    """Who of ``group`` writes which of these boxes. The same for every rank that asks.

    All bytes are laid end to end, and cut where the ranks' capacities end: each rank gets one stretch of them, and so
    one part of a box at most.

    Args:
        sizes: of each box.
        item_bytes: how many bytes each box has.
    """
    number = len(group.ranks)
    ends = np.cumsum(item_bytes)
    begins = ends - item_bytes
    total = int(ends[-1]) if len(ends) else 0
    wanted = np.cumsum(group.capacities)
    marks = wanted[:-1] * (total / wanted[-1] if wanted[-1] else 1.0)
    first = np.searchsorted(marks - 0.5, begins, side="right")
    last = np.searchsorted(marks, ends, side="left")
    owners = first.astype(np.int64)
    cuts = {}
    for item in np.flatnonzero((last > first) & (item_bytes >= _LEAST_CUT_BYTES)).tolist():
        if any(extent > 1 for extent in sizes[item]):
            fine = _FINE * total / number
            parts = _cut(sizes[item], int(item_bytes[item]), float(begins[item]), int(first[item]), marks, fine)
            if len(parts) > 1:
                cuts[item] = parts
            owners[item] = -1 if len(parts) > 1 else parts[0][0]
    return Shares(owners, cuts)


def _cut(
    size: tuple[int, ...], box_bytes: int, begin: float, first: int, marks: np.ndarray, fine: float
) -> list[tuple[int, int, int, int]]:
    dims = [dim for dim, extent in enumerate(size) if extent > 1]
    dim = next((one for one in dims if box_bytes / size[one] <= fine), max(dims, key=lambda one: size[one]))
    extent = size[dim]
    slice_bytes = box_bytes / extent
    parts = []
    low = 0
    for owner in range(first, len(marks) + 1):
        is_last = owner == len(marks) or marks[owner] >= begin + box_bytes
        high = extent if is_last else min(max(round((float(marks[owner]) - begin) / slice_bytes), low), extent)
        if high > low:
            parts.append((owner, dim, low, high))
        low = high
        if low == extent:
            break
    return parts

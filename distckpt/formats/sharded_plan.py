"""Who writes what of a job's state: worked out by the leader from what all ranks hold, and by each rank for itself."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from distckpt import layout, progressions
from distckpt.chunks import Chunks, Grid
from distckpt.formats.boxes import Ints, corners, grid_of
from distckpt.formats.gathered import Alike, Gathered, gathered
from distckpt.formats.held import Holding, Told, pack_numbers, unpack_numbers
from distckpt.formats.safetensors_file import ITEM_BYTES
from distckpt.formats.sharing import Group, group_of, share
from distckpt.manifest import TensorGroup

_Ranks = tuple[int, ...]

_CUT = -1  # in place of the rank that writes a box, where several do
_MOST_RANKS = 1 << 30


class Part(NamedTuple):
    """What a rank writes of a tensor: which of its `Holding`, and where in the box that it has of it."""

    nth: int
    begins: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The leader's.

    Attributes:
        groups: what the manifest will say of all tensors.
        holders: the ranks that have something of it, by key.
        answer: what each rank needs to know, for `parts_of`.
    """

    groups: tuple[TensorGroup, ...]
    holders: Mapping[str, frozenset[int]]
    answer: Mapping[str, Any]


def make_plan(told: Sequence[Told], writers: Collection[int] | None = None) -> Plan:
    """The plan, from what the ranks told, in their order.

    Args:
        writers: those that share what several hold, see `distckpt.formats.sharing.group_of`.

    Raises:
        ValueError: naming a tensor that is not the same on all ranks, or that they do not hold whole.
    """
    held = gathered(told)
    sharing = _Sharing(held, len(told), writers)
    partition_of = np.array([one.partition for one in held.alike], dtype=np.int64)[held.class_of]
    told, numbers = _groups_to_json(sharing.groups)
    shared = [[numbers[one] for one in holders if len(one) > 1] for holders in held.partitions]
    answer = {
        "partitions": {schema: pack_numbers(partition_of[places]) for schema, places in held.places.items()},
        "shared": [*map(progressions.told, shared)],
        "groups": told,
    }
    return Plan(_Writing(held, sharing).groups(), _holders_of(held), answer)


def parts_of(holding: Holding, rank: int, answer: Mapping[str, Any], schema: str) -> list[Part]:
    """What this rank writes: of what it alone holds all, else its share."""
    groups = dict(_groups_from_json(answer["groups"], rank))
    of_partitions = [progressions.read(of, _MOST_RANKS, "the plan") for of in answer["shared"]]
    group_of_partition = [next((one for one in groups if one in of), None) for of in of_partitions]
    shared: defaultdict[int, list[int]] = defaultdict(list)
    parts = []
    partitions = unpack_numbers(answer["partitions"][schema]).tolist()
    for nth, (box, partition) in enumerate(zip(holding.boxes, partitions, strict=True)):
        if box is None:
            continue
        if (number := group_of_partition[partition]) is None:
            parts.append(Part(nth, (0,) * len(box.sizes), box.sizes))
        else:
            shared[number].append(nth)
    for number, items in shared.items():
        group = groups[number]
        if rank in group.ranks:
            parts += _share_of(holding, items, group, group.ranks.index(rank))
    return parts


def _share_of(holding: Holding, items: Sequence[int], group: Group, at: int) -> list[Part]:
    sizes = [box.sizes for nth in items if (box := holding.boxes[nth]) is not None]
    item_bytes = [
        ITEM_BYTES[holding.kinds[nth].dtype] * math.prod(size) for nth, size in zip(items, sizes, strict=True)
    ]
    shares = share(group, sizes, np.array(item_bytes, dtype=np.int64))
    parts = [
        Part(items[one], (0,) * len(sizes[one]), sizes[one]) for one in np.flatnonzero(shares.owners == at).tolist()
    ]
    for one, cuts in shares.cuts.items():
        for owner, dim, low, high in cuts:
            if owner == at:
                begins, size = [0] * len(sizes[one]), list(sizes[one])
                begins[dim], size[dim] = low, high - low
                parts.append(Part(items[one], tuple(begins), tuple(size)))
    return parts


def _groups_to_json(groups: Mapping[_Ranks, Group]) -> tuple[Any, Mapping[_Ranks, int]]:
    """Groups by the ranks that hold the same, and their numbers there. Thousands are alike but for their first rank,
    and told once: each rank is told of all of them."""
    alike: defaultdict[tuple[_Ranks, _Ranks, tuple[float, ...]], list[_Ranks]] = defaultdict(list)
    for holders, group in groups.items():
        held_by, ranks = (tuple(rank - holders[0] for rank in of) for of in (holders, group.ranks))
        alike[held_by, ranks, group.capacities].append(holders)
    told = [
        {
            "firsts": progressions.told([holders[0] for holders in of]),
            "held_by": progressions.told(held_by),
            "ranks": progressions.told(ranks),
            "capacities": pack_numbers(np.array(capacities, dtype=np.float64)),
        }
        for (held_by, ranks, capacities), of in alike.items()
    ]
    return told, {holders: number for number, holders in enumerate(chain.from_iterable(alike.values()))}


def _groups_from_json(told: Any, rank: int) -> Iterator[tuple[int, Group]]:
    """Those in which this rank is, and their numbers."""
    begin = 0
    for one in told:
        firsts, held_by, ranks = (
            progressions.read(one[name], _MOST_RANKS, "the plan") for name in ("firsts", "held_by", "ranks")
        )
        for number, first in enumerate(firsts, begin):
            if rank - first in held_by:
                capacities = tuple(unpack_numbers(one["capacities"]).tolist())
                yield number, Group(tuple(first + other for other in ranks), capacities)
        begin += len(firsts)


def _holders_of(held: Gathered) -> dict[str, frozenset[int]]:
    of_partition = [frozenset(rank for ranks in holders for rank in ranks) for holders in held.partitions]
    found: dict[str, frozenset[int]] = {}
    for kind, number in zip(held.kinds, held.class_of.tolist(), strict=True):
        ranks = of_partition[held.alike[number].partition]
        found[kind.key] = found[kind.key] | ranks if kind.nth else ranks
    return found


class _Parted:
    """The tensors of one partition, of which several ranks hold boxes alike.

    Attributes:
        tensors: which of all they are, sorted.
        owners: by tensor and box, the rank that writes it.
    """

    def __init__(self, alike: Sequence[Alike], holders: Sequence[tuple[int, ...]]) -> None:
        tensors = np.concatenate([one.members for one in alike])
        order = np.argsort(tensors, kind="stable")
        self.tensors = tensors[order]
        self._class_of = np.repeat(np.arange(len(alike)), [len(one.members) for one in alike])[order]
        self._sizes = [one.boxes[1] for one in alike]
        self._volumes = np.stack([sizes.prod(axis=1) for sizes in self._sizes])
        self.owners = np.repeat(_sole_owners(holders)[None], len(self.tensors), axis=0)

    def bytes_of(self, box: int, item_bytes: Ints) -> Ints:
        """How many each tensor has of them in that box."""
        each: Ints = self._volumes[self._class_of, box] * item_bytes[self.tensors]
        return each

    def size_of(self, nth: int, box: int) -> tuple[int, ...]:
        """The size of that box of the nth of the tensors."""
        return tuple(self._sizes[self._class_of[nth]][box].tolist())


class _Items(Sequence[tuple[int, ...]]):
    """The sizes of the boxes that a group shares: of one that is looked at, only."""

    def __init__(self, held: Sequence[tuple[_Parted, int]], of: Ints, nth: Ints) -> None:
        self._held, self._of, self._nth = held, of, nth

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, item: Any) -> Any:
        parted, box = self._held[self._of[item]]
        return parted.size_of(int(self._nth[item]), box)


class _Sharing:
    """Who writes what: what one rank alone holds, it writes; what several hold, they share.

    Attributes:
        groups: by the ranks that hold the same, those of them that share it.
        cuts: of what several ranks write parts of, by tensor and box: who, the dimension, from where to where in it.
    """

    def __init__(self, held: Gathered, world_size: int, writers: Collection[int] | None) -> None:
        self._writers = writers
        self._item_bytes = np.array([ITEM_BYTES[kind.dtype] for kind in held.kinds], dtype=np.int64)
        self._loads = np.zeros(world_size)
        self._owners = [_sole_owners(holders) for holders in held.partitions]
        of_partition: defaultdict[int, list[Alike]] = defaultdict(list)
        for one in held.alike:
            of_partition[one.partition].append(one)
        self._parted: dict[int, _Parted] = {}
        self.groups: dict[tuple[int, ...], Group] = {}
        self.cuts: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
        shared: defaultdict[tuple[int, ...], list[tuple[_Parted, int]]] = defaultdict(list)
        for number, holders in enumerate(held.partitions):
            if several := [box for box, ranks in enumerate(holders) if len(ranks) > 1]:
                parted = self._parted[number] = _Parted(of_partition[number], holders)
                for box in several:
                    shared[holders[box]].append((parted, box))
        if shared:
            self._load(held.alike)
        # Those first who have the fewest to share with, as others can make up for what they write.
        for ranks in sorted(shared, key=lambda ranks: (len(ranks), ranks)):
            self.groups[ranks] = self._share(ranks, shared[ranks])

    def owners_of(self, one: Alike) -> Ints:
        """By member and box, the rank that writes it; one row, if it is the same for all members."""
        if (parted := self._parted.get(one.partition)) is None:
            return self._owners[one.partition][None]
        owners: Ints = parted.owners[np.searchsorted(parted.tensors, one.members)]
        return owners

    def _load(self, alike: Sequence[Alike]) -> None:
        """What each rank alone holds, it writes anyway."""
        for one in alike:
            owners = self._owners[one.partition]
            alone = owners >= 0
            volumes = one.boxes[1][alone].prod(axis=1)
            np.add.at(self._loads, owners[alone], volumes * int(self._item_bytes[one.members].sum()))

    def _share(self, ranks: tuple[int, ...], held: Sequence[tuple[_Parted, int]]) -> Group:
        of = np.repeat(np.arange(len(held)), [len(parted.tensors) for parted, _ in held])
        nth = np.concatenate([np.arange(len(parted.tensors)) for parted, _ in held])
        tensors = np.concatenate([parted.tensors for parted, _ in held])
        item_bytes = np.concatenate([parted.bytes_of(box, self._item_bytes) for parted, box in held])
        order = np.argsort(tensors, kind="stable")  # as each of the ranks has them
        of, nth, tensors, item_bytes = of[order], nth[order], tensors[order], item_bytes[order]
        group = group_of(ranks, int(item_bytes.sum()), self._loads, self._writers)
        shares = share(group, _Items(held, of, nth), item_bytes)
        owners = np.array([*group.ranks, _CUT])[shares.owners]
        for number, (parted, box) in enumerate(held):
            mine = of == number
            parted.owners[nth[mine], box] = owners[mine]
        np.add.at(self._loads, owners[owners >= 0], item_bytes[owners >= 0])
        for item, cuts in shares.cuts.items():
            box = held[of[item]][1]
            self.cuts[int(tensors[item]), box] = [
                (group.ranks[owner], dim, low, high) for owner, dim, low, high in cuts
            ]
            for owner, _, low, high in cuts:
                self._loads[group.ranks[owner]] += int(item_bytes[item]) * (high - low) / cuts[-1][3]
        return group


def _sole_owners(holders: Sequence[tuple[int, ...]]) -> Ints:
    """Of each box the rank that alone holds it."""
    return np.array([of[0] if len(of) == 1 else _CUT for of in holders], dtype=np.int64)


class _Writing:
    """What will be written, as the manifest says it."""

    def __init__(self, held: Gathered, sharing: _Sharing) -> None:
        self._held = held
        self._sharing = sharing
        self._files: dict[tuple[bytes, int], tuple[str, ...]] = {}

    def groups(self) -> tuple[TensorGroup, ...]:
        """Of all tensors: together those of one dtype and shape that are whole, or lie in the same files."""
        kinds = self._held.kinds
        found = []
        loose: defaultdict[str, list[tuple[Alike, Ints, int]]] = defaultdict(list)
        for one in self._held.alike:
            owners = self._sharing.owners_of(one)
            rows, is_cut = [row.tobytes() for row in owners], (owners == _CUT).any(axis=1).tolist()
            together: defaultdict[tuple[str, bytes, int], list[int]] = defaultdict(list)
            for at, nth in enumerate(one.members.tolist()):
                row = at if len(rows) > 1 else 0
                if kinds[nth].key in self._held.several:
                    loose[kinds[nth].key].append((one, owners[row], nth))
                else:
                    together[kinds[nth].dtype, rows[row], nth if is_cut[row] else -1].append(nth)
            for (dtype, row_bytes, _), members in together.items():
                lies = self._lies(one, np.frombuffer(row_bytes, dtype=owners.dtype), members[0])
                found.append(TensorGroup.of(dtype, one.shape, lies, tuple(kinds[nth].key for nth in members)))
        for key, parts in loose.items():
            kind = kinds[parts[0][2]]
            pieces = [self._pieces(*part) for part in parts]
            files = [file for of, _, _ in pieces for file in of]
            offsets, sizes = (np.concatenate([piece[at] for piece in pieces]) for at in (1, 2))
            found.append(TensorGroup.of(kind.dtype, kind.shape, _laid(kind.shape, files, offsets, sizes), (key,)))
        return *_together(one for one in found if one.files), *(one for one in found if one.chunks)

    def _lies(self, one: Alike, owners: Ints, nth: int) -> Chunks | Grid:
        if one.starts is not None and (owners != _CUT).all():
            return Grid(self._files_of(owners, 0), one.shape, one.starts)
        return _laid(one.shape, *self._pieces(one, owners, nth))

    def _pieces(self, one: Alike, owners: Ints, nth: int) -> tuple[Sequence[str], Ints, Ints]:
        """What is written of a tensor: the file of each part, its offsets, and its sizes."""
        offsets, sizes = one.boxes
        number = self._held.kinds[nth].nth
        whole = np.flatnonzero(owners != _CUT)
        files, parts = [*self._files_of(owners[whole], number)], [(offsets[whole], sizes[whole])]
        for box in np.flatnonzero(owners == _CUT).tolist():
            cuts = self._sharing.cuts[nth, box]
            low, high = (np.repeat(rows[[box]], len(cuts), axis=0) for rows in (offsets, sizes))
            for at, (owner, dim, begin, end) in enumerate(cuts):
                low[at, dim] += begin
                high[at, dim] = end - begin
                files.append(layout.shard_file(owner, number))
            parts.append((low, high))
        lows, highs = zip(*parts, strict=True)
        return files, np.concatenate(lows), np.concatenate(highs)

    def _files_of(self, owners: Ints, number: int) -> tuple[str, ...]:
        key = owners.tobytes(), number
        if (known := self._files.get(key)) is None:
            known = self._files[key] = tuple(layout.shard_file(owner, number) for owner in owners.tolist())
        return known


def _together(groups: Iterable[TensorGroup]) -> Iterator[TensorGroup]:
    """Those that are whole, in one group for each dtype and shape."""
    alike: defaultdict[tuple[str, tuple[int, ...]], list[TensorGroup]] = defaultdict(list)
    for one in groups:
        alike[one.dtype, one.shape].append(one)
    for (dtype, shape), several in alike.items():
        files = tuple(one.files[0] for one in several for _ in one.keys)
        keys = tuple(key for one in several for key in one.keys)
        yield TensorGroup(files if len(several) > 1 else files[:1], dtype, shape, keys)


def _laid(shape: tuple[int, ...], files: Sequence[str], offsets: Ints, sizes: Ints) -> Chunks | Grid:
    """Parts that cover a tensor."""
    order = np.argsort(corners(shape, offsets), kind="stable")
    offsets, sizes, sorted_files = offsets[order], sizes[order], tuple(files[nth] for nth in order.tolist())
    if (starts := grid_of(offsets, sizes)) is not None:
        return Grid(sorted_files, shape, starts)
    return Chunks(sorted_files, tuple(offsets.ravel().tolist()), tuple(sizes.ravel().tolist()))

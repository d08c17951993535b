"""Who writes what of a job's state: worked out by the leader from what all ranks hold, and by each rank for itself.

Tensors that lie on the same ranks in the same boxes are one class, and looked at once: a model has thousands of
tensors, and tens of classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from distckpt import layout
from distckpt.chunks import Chunks
from distckpt.formats.boxes import Ints, fault
from distckpt.formats.held import Holding, Kind, Told, pack_numbers, unpack_numbers
from distckpt.formats.safetensors_file import ITEM_BYTES
from distckpt.formats.sharing import Group, Shares, group_of, share
from distckpt.manifest import TensorGroup

_NONE = 0xFFFFFFFF
_BLOCK = 1 << 22  # elements that are worked on at once


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


def make_plan(told: Sequence[Told]) -> Plan:
    """The plan, from what the ranks told, in their order.

    Raises:
        ValueError: naming a tensor that is not the same on all ranks, or that they do not hold whole.
    """
    return _Planner(told).plan()


def parts_of(holding: Holding, rank: int, answer: Mapping[str, Any], schema: str) -> list[Part]:
    """What this rank writes: of what it alone holds all, else its share."""
    class_of = unpack_numbers(answer["classes"][schema]).tolist()
    mine = [next((one for one in of if rank in answer["groups"][one]["held_by"]), None) for of in answer["partitions"]]
    shared: defaultdict[int, list[int]] = defaultdict(list)
    parts = []
    for nth, (box, number) in enumerate(zip(holding.boxes, class_of, strict=True)):
        if box is None:
            continue
        group = mine[answer["partition_of"][number]]
        if group is None:
            parts.append(Part(nth, (0,) * len(box.sizes), box.sizes))
        else:
            shared[group].append(nth)
    for number, items in shared.items():
        told = answer["groups"][number]
        group = Group(tuple(told["ranks"]), tuple(told["capacities"]))
        if rank in group.ranks:
            parts += _share_of(holding, items, group, group.ranks.index(rank))
    return parts


def _share_of(holding: Holding, items: Sequence[int], group: Group, at: int) -> list[Part]:
    sizes = [box.sizes for nth in items if (box := holding.boxes[nth]) is not None]
    item_bytes = [ITEM_BYTES[holding.kinds[nth].dtype] for nth in items]
    volumes = [int(np.prod(size, dtype=np.int64)) for size in sizes]
    shares = share(group, sizes, np.array(volumes, dtype=np.int64) * np.array(item_bytes, dtype=np.int64))
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


@dataclass
class _Class:
    """Tensors of one shape that lie alike.

    Attributes:
        members: which tensors.
        boxes: the rows of the table that they consist of.
        partition: which ranks hold which of the boxes.
        owners: by member and box, the rank that writes it; -1 where several do.
    """

    shape: tuple[int, ...]
    members: Ints
    boxes: Ints
    partition: int
    owners: Ints = field(default_factory=lambda: np.empty((0, 0), dtype=np.int64))


class _Planner:
    def __init__(self, told: Sequence[Told]) -> None:
        self._told = told
        self._world_size = len(told)
        self._kinds, self._places = _union(told)
        self._table, self._ids = _table(told)
        self._item_bytes = np.array([ITEM_BYTES[kind.dtype] for kind in self._kinds], dtype=np.int64)
        self._loads = np.zeros(self._world_size)
        self._partitions: dict[bytes, int] = {}
        self._holders: list[list[tuple[int, ...]]] = []  # of each partition, the ranks that hold each box
        self._cuts: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}  # by tensor and box

    def plan(self) -> Plan:
        class_of, classes = self._classes()
        self._check(classes)
        at = np.empty(len(self._kinds), dtype=np.int64)
        for one in classes:
            at[one.members] = np.arange(len(one.members))
            self._own(one)
        groups = self._share(classes, at)
        numbers = {holders: number for number, holders in enumerate(groups)}
        answer = {
            "classes": {schema: pack_numbers(class_of[places]) for schema, places in self._places.items()},
            "partition_of": [one.partition for one in classes],
            "partitions": [[numbers[one] for one in holders if len(one) > 1] for holders in self._holders],
            "groups": [
                {"held_by": holders, "ranks": group.ranks, "capacities": group.capacities}
                for holders, group in groups.items()
            ],
        }
        return Plan(self._groups(classes), self._holders_of(classes), answer)

    def _classes(self) -> tuple[Ints, list[_Class]]:
        matrix = np.full((len(self._kinds), self._world_size), _NONE, dtype=np.uint32)
        for rank, (told, ids) in enumerate(zip(self._told, self._ids, strict=True)):
            matrix[self._places[told.schema], rank] = ids
        shapes: dict[tuple[int, ...], int] = {}
        shape_of = np.array([shapes.setdefault(kind.shape, len(shapes)) for kind in self._kinds], dtype=np.uint64)
        hashes = _hash(matrix, seed=1) + shape_of * np.uint64(0x9E3779B97F4A7C15)
        _, first, class_of = np.unique(hashes, return_index=True, return_inverse=True)
        for begin in range(0, len(matrix), step := max(_BLOCK // self._world_size, 1)):
            some = slice(begin, begin + step)
            assert (matrix[some] == matrix[first[class_of[some]]]).all(), "two hashes are equal"
        order = np.argsort(class_of, kind="stable")
        members = np.split(order, np.cumsum(np.bincount(class_of, minlength=len(first)))[:-1]) if len(first) else []
        classes = [self._class(self._kinds[one].shape, of, matrix[one]) for one, of in zip(first, members, strict=True)]
        return class_of.astype(np.int64), classes

    def _class(self, shape: tuple[int, ...], members: Ints, row: np.ndarray) -> _Class:
        ranks = np.flatnonzero(row != _NONE)
        boxes, first, of = np.unique(row[ranks], return_index=True, return_inverse=True)
        order = np.argsort(first)
        label = np.empty(len(boxes), dtype=np.int64)
        label[order] = np.arange(len(boxes))
        labels = label[of]
        key = ranks.tobytes() + labels.tobytes()
        if (partition := self._partitions.get(key)) is None:
            partition = self._partitions[key] = len(self._holders)
            by_label = np.argsort(labels, kind="stable")
            parted = np.split(ranks[by_label], np.cumsum(np.bincount(labels, minlength=len(boxes)))[:-1])
            self._holders.append([tuple(one.tolist()) for one in parted] if len(boxes) else [])
        return _Class(shape, members, boxes[order].astype(np.int64), partition)

    def _check(self, classes: Sequence[_Class]) -> None:
        """Every tensor is held whole, and no part of it by two that hold different parts."""
        several = {kind.key for kind in self._kinds if kind.nth}
        loose: defaultdict[str, list[Ints]] = defaultdict(list)
        for one in classes:
            keys = [self._kinds[nth].key for nth in one.members.tolist()] if several else []
            for key in several.intersection(keys):
                loose[key].append(one.boxes)
            if len(several.intersection(keys)) < len(one.members):
                self._refuse(self._kinds[one.members[0]].key, one.shape, one.boxes)
        shapes = {kind.key: kind.shape for kind in self._kinds} if loose else {}
        for key, boxes in loose.items():
            self._refuse(key, shapes[key], np.unique(np.concatenate(boxes)))

    def _refuse(self, key: str, shape: tuple[int, ...], boxes: Ints) -> None:
        if told := fault(shape, *self._boxes(boxes, len(shape))):
            raise ValueError(f"{ascii(key)[:120]} of shape {shape} is not whole on the ranks of this job: {told}")

    def _boxes(self, numbers: Ints, dims: int) -> tuple[Ints, Ints]:
        rows = self._table[numbers]
        half = (self._table.shape[1] - 1) // 2
        return rows[:, 1 : 1 + dims], rows[:, 1 + half : 1 + half + dims]

    def _own(self, one: _Class) -> None:
        """What one rank alone holds, it writes."""
        holders = self._holders[one.partition]
        owners = np.array([of[0] if len(of) == 1 else -1 for of in holders], dtype=np.int64)
        one.owners = np.repeat(owners[None], len(one.members), axis=0)
        alone = np.flatnonzero(owners >= 0)
        _, sizes = self._boxes(one.boxes[alone], len(one.shape))
        np.add.at(self._loads, owners[alone], sizes.prod(axis=1) * int(self._item_bytes[one.members].sum()))

    def _share(self, classes: Sequence[_Class], at: Ints) -> dict[tuple[int, ...], Group]:
        """What several hold is shared among them; those first who have the fewest to share with."""
        shared: defaultdict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, one in enumerate(classes):
            for box, holders in enumerate(self._holders[one.partition]):
                if len(holders) > 1:
                    shared[holders].append((number, box))
        groups = {}
        for holders in sorted(shared, key=lambda ranks: (len(ranks), ranks)):
            groups[holders] = self._share_among(holders, shared[holders], classes, at)
        return groups

    def _share_among(
        self, holders: tuple[int, ...], held: Sequence[tuple[int, int]], classes: Sequence[_Class], at: Ints
    ) -> Group:
        tensors = np.concatenate([classes[number].members for number, _ in held])
        counts = [len(classes[number].members) for number, _ in held]
        sizes = [
            tuple(self._boxes(classes[number].boxes[[box]], len(classes[number].shape))[1][0]) for number, box in held
        ]
        volumes = np.repeat([int(np.prod(size, dtype=np.int64)) for size in sizes], counts)
        which = np.repeat(np.arange(len(held)), counts)
        order = np.argsort(tensors, kind="stable")
        tensors, which = tensors[order], which[order]
        item_bytes = volumes[order].astype(np.int64) * self._item_bytes[tensors]
        group = group_of(holders, int(item_bytes.sum()), self._loads)
        shares = share(group, _Sizes(sizes, which), item_bytes)
        self._take(shares, group, tensors, which, held, classes, at, item_bytes)
        return group

    def _take(
        self,
        shares: Shares,
        group: Group,
        tensors: Ints,
        which: Ints,
        held: Sequence[tuple[int, int]],
        classes: Sequence[_Class],
        at: Ints,
        item_bytes: Ints,
    ) -> None:
        ranks = np.array([*group.ranks, -1], dtype=np.int64)
        owners = ranks[shares.owners]
        np.add.at(self._loads, owners[owners >= 0], item_bytes[owners >= 0])
        for nth, (number, box) in enumerate(held):
            mine = which == nth
            classes[number].owners[at[tensors[mine]], box] = owners[mine]
        for item, cuts in shares.cuts.items():
            number, box = held[which[item]]
            told = [(int(ranks[owner]), dim, low, high) for owner, dim, low, high in cuts]
            self._cuts[int(tensors[item]), box] = told
            extent = cuts[-1][3]
            for rank, _, low, high in told:
                self._loads[rank] += item_bytes[item] * (high - low) / extent

    def _holders_of(self, classes: Sequence[_Class]) -> dict[str, frozenset[int]]:
        of_partition = [frozenset(rank for ranks in holders for rank in ranks) for holders in self._holders]
        found: dict[str, frozenset[int]] = {}
        for one in classes:
            ranks = of_partition[one.partition]
            for nth in one.members.tolist():
                key = self._kinds[nth].key
                found[key] = found[key] | ranks if key in found else ranks
        return found

    def _groups(self, classes: Sequence[_Class]) -> tuple[TensorGroup, ...]:
        several = {kind.key for kind in self._kinds if kind.nth}
        found: dict[tuple[str, int], tuple[Kind, Chunks, list[str]]] = {}  # by dtype and the chunks themselves
        loose: defaultdict[str, list[tuple[Kind, Chunks]]] = defaultdict(list)
        known: dict[bytes, Chunks] = {}
        for number, one in enumerate(classes):
            for nth, owners in zip(one.members.tolist(), one.owners, strict=True):
                kind = self._kinds[nth]
                is_cut = bool((owners < 0).any())
                key = owners.tobytes() + number.to_bytes(8, "little") + kind.nth.to_bytes(8, "little")
                if is_cut or (chunks := known.get(key)) is None:
                    chunks = self._chunks(one, nth, owners, kind.nth)
                    if not is_cut:
                        known[key] = chunks
                if kind.key in several:
                    loose[kind.key].append((kind, chunks))
                else:
                    found.setdefault((kind.dtype, id(chunks)), (kind, chunks, []))[2].append(kind.key)
        for told in loose.values():
            kind, joined = told[0][0], Chunks.joined([chunks for _, chunks in told])
            found[kind.dtype, id(joined)] = (kind, joined, [kind.key])
        return tuple(
            TensorGroup.of(kind.dtype, kind.shape, chunks, tuple(keys)) for kind, chunks, keys in found.values()
        )

    def _chunks(self, one: _Class, tensor: int, owners: Ints, nth: int) -> Chunks:
        offsets, sizes = self._boxes(one.boxes, len(one.shape))
        chunks: list[tuple[str, list[int], list[int]]] = []
        for box, (owner, offset, size) in enumerate(
            zip(owners.tolist(), offsets.tolist(), sizes.tolist(), strict=True)
        ):
            if owner >= 0:
                chunks.append((layout.shard_file(owner, nth), offset, size))
                continue
            for rank, dim, low, high in self._cuts[tensor, box]:
                begins, extents = [*offset], [*size]
                begins[dim] += low
                extents[dim] = high - low
                chunks.append((layout.shard_file(rank, nth), begins, extents))
        return Chunks(
            tuple(file for file, _, _ in chunks),
            tuple(number for _, offset, _ in chunks for number in offset),
            tuple(number for _, _, size in chunks for number in size),
        )


class _Sizes(Sequence[tuple[int, ...]]):
    """The sizes of many boxes that are of few kinds."""

    def __init__(self, kinds: Sequence[tuple[int, ...]], which: Ints) -> None:
        self._kinds = kinds
        self._which = which

    def __len__(self) -> int:
        return len(self._which)

    def __getitem__(self, item: Any) -> Any:
        return tuple(map(int, self._kinds[self._which[item]]))


def _union(told: Sequence[Told]) -> tuple[list[Kind], dict[str, Ints]]:
    """All tensors that some rank knows, sorted; and by schema, where its own are among them."""
    schemas = {one.schema: one.kinds for one in told if one.kinds is not None}
    found: dict[tuple[str, int], Kind] = {}
    for kinds in schemas.values():
        for kind in kinds:
            other = found.setdefault((kind.key, kind.nth), kind)
            if other is not kind and other != kind:
                raise ValueError(
                    f"{ascii(kind.key)[:120]} is not the same on all ranks: {kind.dtype} of {kind.shape}, and "
                    f"{other.dtype} of {other.shape}"
                )
    ordered = sorted(found)
    numbers = {name: number for number, name in enumerate(ordered)}
    places = {
        schema: np.array([numbers[kind.key, kind.nth] for kind in kinds], dtype=np.int64)
        for schema, kinds in schemas.items()
    }
    return [found[name] for name in ordered], places


def _table(told: Sequence[Told]) -> tuple[Ints, list[np.ndarray]]:
    """All boxes that occur, each once; and by rank, for each of its tensors which of them it has."""
    most = max((one.most for one in told), default=0)
    rows = np.concatenate([_widened(one, most) for one in told])
    _, first, number_of = np.unique(_hash(rows.view(np.uint64), seed=2), return_index=True, return_inverse=True)
    table = rows[first]
    assert (table[number_of] == rows).all(), "two hashes are equal"
    numbers = number_of.astype(np.uint32)
    numbers[rows[:, 0] == 0] = _NONE
    ids = []
    begin = 0
    for one in told:
        ids.append(numbers[begin : begin + len(one.rows)][one.ids])
        begin += len(one.rows)
    return table, ids


def _widened(one: Told, most: int) -> Ints:
    if one.most == most:
        return one.rows
    wide = np.zeros((len(one.rows), 2 * most + 1), dtype=np.int64)
    wide[:, : 1 + one.most] = one.rows[:, : 1 + one.most]
    wide[:, 1 + most : 1 + most + one.most] = one.rows[:, 1 + one.most :]
    return wide


def _hash(rows: np.ndarray, *, seed: int) -> np.ndarray:
    """A number for each row, as a rule another one for another row."""
    factors = np.random.default_rng(seed).integers(1, 1 << 63, size=rows.shape[1], dtype=np.uint64) | np.uint64(1)
    hashes = np.empty(len(rows), dtype=np.uint64)
    step = max(_BLOCK // max(rows.shape[1], 1), 1)
    for begin in range(0, len(rows), step):
        some = rows[begin : begin + step].astype(np.uint64)
        some ^= some >> np.uint64(3)
        hashes[begin : begin + step] = ((some + np.uint64(1)) * factors).sum(axis=1, dtype=np.uint64)
    return hashes

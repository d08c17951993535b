"""What all ranks of a job hold of its tensors, from what they told: those that lie alike are looked at once.

A model has thousands of tensors, and tens of kinds of them: a class is of one shape, and on each rank of one box. Where
it has thousands of kinds, too, many classes are looked at in one go.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distckpt.formats.boxes import Ints, are_whole, cells, fault, grid_of
from distckpt.formats.held import Kind, Rows, Told

_BLOCK = 1 << 19  # boxes that are looked at in one go
_NOWHERE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Alike:
    """Tensors that lie alike.

    Attributes:
        members: which of all they are, in their order.
        partition: which ranks hold which of the boxes, see `Gathered`.
        starts: where their parts begin in each dimension, if they are the cells of a grid.
    """

    shape: tuple[int, ...]
    members: Ints
    partition: int
    starts: tuple[Sequence[int], ...] | None
    _rows: tuple[Ints, Ints] | None

    @property
    def boxes(self) -> tuple[Ints, Ints]:
        """Offsets and sizes of the boxes that they consist of, in the order of `boxes.corners`."""
        if self._rows is not None:
            return self._rows
        assert self.starts is not None, "it has either"
        return cells(self.shape, self.starts)


@dataclass(frozen=True)
class Gathered:
    """What all ranks hold, all of it whole.

    Attributes:
        kinds: all that some rank knows, sorted.
        places: by what a rank told it knows, which of them.
        alike: all classes.
        class_of: of each of ``kinds``, which it is in.
        partitions: of each, the ranks that hold each of the boxes.
        several: the keys of which a rank has several boxes. Each nth of them is of a class of its own.
    """

    kinds: Sequence[Kind]
    places: dict[str, Ints]
    alike: Sequence[Alike]
    class_of: Ints
    partitions: Sequence[Sequence[tuple[int, ...]]]
    several: frozenset[str]


def gathered(told: Sequence[Told]) -> Gathered:
    """What the ranks told, in their order.

    Raises:
        ValueError: naming a tensor that is not the same on all ranks, or that they do not hold whole.
    """
    kinds, by_schema, places = _union(told)
    several = frozenset(kind.key for kind in kinds if kind.nth)
    forms = _forms(told, by_schema, places)
    shapes: dict[tuple[tuple[int, ...], bool], int] = {}
    shape_of = [shapes.setdefault((kind.shape, kind.key in several), len(shapes)) for kind in kinds]
    class_of, first = _classes(np.array(shape_of, dtype=np.int64), forms)
    makings = _Making(kinds, several, class_of, first, forms, len(told))
    return Gathered(kinds, places, makings.alike(), class_of, makings.partitions, several)


@dataclass
class _Form:
    """Ranks that know the same tensors, and told of them at the same places.

    Attributes:
        places: which of all tensors these are.
        begins: of each of them, where it begins among the rows of a rank.
        rows: of each rank.
        ranks: which they are.
    """

    places: Ints
    begins: Ints
    rows: list[np.ndarray]
    ranks: list[int]

    def begins_of(self, tensors: Ints, count: int) -> Ints:
        """Where some of all tensors begin; -1 where these ranks do not know one."""
        found = np.full(count, -1, dtype=np.int64)
        found[self.places] = self.begins
        return found[tensors]


def _union(told: Sequence[Told]) -> tuple[list[Kind], dict[str, Sequence[Kind]], dict[str, Ints]]:
    """All tensors that some rank knows, sorted; by schema, those in it; and where they are among all."""
    by_schema = {one.schema: one.kinds for one in told if one.kinds is not None}
    found: dict[tuple[str, int], Kind] = {}
    for kinds in by_schema.values():
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
        for schema, kinds in by_schema.items()
    }
    return [found[name] for name in ordered], by_schema, places


def _forms(told: Sequence[Told], by_schema: dict[str, Sequence[Kind]], places: dict[str, Ints]) -> list[_Form]:
    rows = {schema: Rows(kinds) for schema, kinds in by_schema.items()}
    forms: dict[tuple[str, str], _Form] = {}
    for rank, one in enumerate(told):
        if (form := forms.get((one.schema, one.which))) is None:
            begins = rows[one.schema].begins(one.which)
            form = forms[one.schema, one.which] = _Form(places[one.schema], begins, [], [])
        form.rows.append(one.rows)
        form.ranks.append(rank)
    return list(forms.values())


def _classes(shape_of: Ints, forms: Sequence[_Form]) -> tuple[Ints, Ints]:
    """Which class each tensor is in; and the first one of each, in their order."""
    hashes = _hash(shape_of)
    for number, form in enumerate(forms, 1):
        hashes[form.places] += _hash(form.begins + (number << 40))
    _, first, class_of = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank_of = np.empty_like(order)
    rank_of[order] = np.arange(len(order))
    first, class_of = first[order], rank_of[class_of]
    for row in (shape_of, *(form.begins_of(np.arange(len(shape_of)), len(shape_of)) for form in forms)):
        assert (row == row[first][class_of]).all(), "two hashes are equal"
    return class_of, first


class _Making:
    """Makes the classes, several at a time."""

    def __init__(
        self,
        kinds: Sequence[Kind],
        several: frozenset[str],
        class_of: Ints,
        first: Ints,
        forms: Sequence[_Form],
        world_size: int,
    ) -> None:
        self._kinds = kinds
        self._several = several
        self._firsts = [kinds[nth] for nth in first.tolist()]
        by_class = np.argsort(class_of, kind="stable")
        self._members = np.split(by_class, np.cumsum(np.bincount(class_of, minlength=len(first)))[:-1])
        self._forms = [(form, form.begins_of(first, len(kinds))) for form in forms]
        self._world_size = world_size
        self._partitions: dict[bytes, int] = {}
        self._loose: defaultdict[str, list[tuple[Ints, Ints]]] = defaultdict(list)
        self.partitions: list[list[tuple[int, ...]]] = []

    def alike(self) -> list[Alike]:
        """All of them."""
        found: dict[int, Alike] = {}
        by_dims: defaultdict[int, list[int]] = defaultdict(list)
        for number, kind in enumerate(self._firsts):
            by_dims[len(kind.shape)].append(number)
        step = max(_BLOCK // self._world_size, 1)
        for dims, numbers in by_dims.items():
            for begin in range(0, len(numbers), step):
                some = numbers[begin : begin + step]
                found |= zip(some, self._some(np.array(some, dtype=np.int64), dims), strict=True)
        for kind in self._kinds:
            if kind.key in self._loose:
                self._refuse(kind, *map(np.concatenate, zip(*self._loose.pop(kind.key), strict=True)))
        return [found[number] for number in range(len(self._firsts))]

    def _some(self, numbers: Ints, dims: int) -> Iterator[Alike]:
        """Some of them, all with so many dimensions."""
        wholes = np.array([self._firsts[number].shape for number in numbers], dtype=np.int64).reshape(
            len(numbers), dims
        )
        held, offsets, sizes = self._boxes(numbers, dims)
        order = _sort(wholes, held, offsets)
        if order is not None:
            held = np.take_along_axis(held, order, 1)
            offsets, sizes = (np.take_along_axis(one, order[..., None], 1) for one in (offsets, sizes))
        is_new = held.copy()  # else it is held by the rank before, too
        is_new[:, 1:] &= ((offsets[:, 1:] != offsets[:, :-1]) | (sizes[:, 1:] != sizes[:, :-1])).any(axis=2)
        box_of = np.where(held, np.cumsum(is_new, axis=1) - 1, -1).astype(np.int32)
        if order is not None:
            by_rank = np.empty_like(box_of)
            np.put_along_axis(by_rank, order, box_of, 1)
            box_of = by_rank
        counts = is_new.sum(axis=1)
        offsets, sizes = offsets[is_new], sizes[is_new]
        is_first = np.zeros(len(offsets), dtype=bool)
        ends = np.cumsum(counts)
        is_first[(ends - counts)[counts > 0]] = True
        sound = np.zeros(len(numbers), dtype=bool)
        sound[counts > 0] = are_whole(np.repeat(wholes, counts, axis=0), offsets, sizes, is_first)
        for nth, number in enumerate(numbers.tolist()):
            mine = slice(ends[nth] - counts[nth], ends[nth])
            yield self._one(number, box_of[nth], offsets[mine], sizes[mine], is_sound=bool(sound[nth]))

    def _boxes(self, numbers: Ints, dims: int) -> tuple[np.ndarray, Ints, Ints]:
        """By class and rank: whether it holds a box of it, and the offsets and sizes of that."""
        held = np.zeros((len(numbers), self._world_size), dtype=bool)
        offsets = np.zeros((len(numbers), self._world_size, dims), dtype=np.int64)
        sizes = np.zeros_like(offsets)
        for form, begins in self._forms:
            known = np.flatnonzero(begins[numbers] >= 0)
            if not len(known):
                continue
            at = begins[numbers][known][:, None] + np.arange(1 + 2 * dims)
            told = np.stack([rows[at] for rows in form.rows], axis=1)
            place = np.ix_(known, np.array(form.ranks))
            held[place] = told[..., 0]
            offsets[place] = told[..., 1 : 1 + dims]
            sizes[place] = told[..., 1 + dims :]
        return held, offsets, sizes

    def _one(self, number: int, box_of: np.ndarray, offsets: Ints, sizes: Ints, *, is_sound: bool) -> Alike:
        kind = self._firsts[number]
        if kind.key in self._several:
            for nth in self._members[number].tolist():
                self._loose[self._kinds[nth].key].append((offsets, sizes))
        elif not is_sound:
            self._refuse(kind, offsets, sizes)
        starts = grid_of(offsets, sizes) if is_sound else None
        rows = None if starts else (offsets.copy(), sizes.copy())
        return Alike(kind.shape, self._members[number], self._partition(box_of), starts, rows)

    def _partition(self, box_of: np.ndarray) -> int:
        key = box_of.tobytes()
        if (known := self._partitions.get(key)) is None:
            known = self._partitions[key] = len(self.partitions)
            ranks = np.argsort(box_of, kind="stable")[np.count_nonzero(box_of < 0) :]
            parted = np.split(ranks, np.cumsum(np.bincount(box_of[ranks]))[:-1]) if len(ranks) else []
            self.partitions.append([tuple(one.tolist()) for one in parted])
        return known

    def _refuse(self, kind: Kind, offsets: Ints, sizes: Ints) -> None:
        if told := fault(kind.shape, offsets, sizes):
            raise ValueError(
                f"{ascii(kind.key)[:120]} of shape {kind.shape} is not whole on the ranks of this job: {told}"
            )


def _sort(wholes: Ints, held: np.ndarray, offsets: Ints) -> Ints | None:
    """Of each class, its ranks by where their boxes begin, those behind that hold none; ``None``: as they are."""
    steps = np.ones_like(wholes)
    for dim in range(wholes.shape[1] - 2, -1, -1):
        steps[:, dim] = steps[:, dim + 1] * wholes[:, dim + 1]
    begins = np.where(held, (offsets * steps[:, None]).sum(axis=2), _NOWHERE)
    return None if (begins[:, 1:] >= begins[:, :-1]).all() else np.argsort(begins, axis=1, kind="stable")


def _hash(numbers: Ints) -> np.ndarray:
    """As a rule another number for another one, and of sums of some of them."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))

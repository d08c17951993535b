"""A sharded checkpoint that is read: its indexes first, then of each file the blocks that this rank needs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from distckpt import layout, strict_json
from distckpt.chunks import Chunks
from distckpt.errors import DamagedCheckpoint
from distckpt.formats import Chunk, Piece, Snapshot
from distckpt.formats import tree as trees
from distckpt.formats.merging import merged
from distckpt.formats.safetensors_file import DTYPES_BY_NAME
from distckpt.formats.shard_file import ShardFile, Wanted
from distckpt.formats.shards import boxes_of, bytes_of, is_on_several, narrowed, shape_in_bytes, view_of
from distckpt.formats.stand_ins import stand_in
from distckpt.formats.streaming import all_of
from distckpt.formats.tiling import Extents, Overlap, tiling_of
from distckpt.formats.tree import Reference
from distckpt.manifest import Manifest, TensorGroup, digest
from distckpt.stores import Store

_MOST_DIMENSIONS = 64


class _Cut:
    """How tensors of one dtype and shape are cut."""

    def __init__(self, group: TensorGroup, what: str) -> None:
        self.shape = group.shape
        self.dtype = DTYPES_BY_NAME.get(group.dtype)
        is_sane = len(group.shape) <= _MOST_DIMENSIONS and math.prod(filter(None, group.shape)) < 1 << 59
        if self.dtype is None or not is_sane:
            raise DamagedCheckpoint(f"{_whose(group, what)} cannot be")
        try:
            self._tiling = tiling_of(group.shape, group.chunks)
        except ValueError as error:
            raise DamagedCheckpoint(f"{_whose(group, what)} is not whole: {error}") from error
        self._known: dict[tuple[Extents, Extents], list[Overlap]] = {}

    def chunks_in(self, offsets: Extents, sizes: Extents) -> list[Overlap]:
        """What that box consists of. All of it is there, as all of the tensor is, once."""
        box = offsets, sizes
        if (known := self._known.get(box)) is None:
            known = self._known[box] = self._tiling.overlaps(offsets, sizes)
        return known


def _twice(manifest: Manifest) -> str:
    """A key that is in it twice."""
    counted = Counter(key for group in manifest.tensors for key in group.keys)
    return ascii(counted.most_common(1)[0][0])[:80]


def _whose(group: TensorGroup, what: str) -> str:
    return f"{what}: {ascii(group.keys[:1])[1:81]} of {ascii(group.dtype)[:20]} and the shape {group.shape}"


class OpenedSharded:
    """See `distckpt.formats.Opened`, and `distckpt.formats.Format.open` for what it raises."""

    def __init__(self, store: Store, path: str, manifest: Manifest, rank: int, parts: Collection[str] | None) -> None:
        self._store = store
        self._path = path
        self._entries = {entry.path: entry for entry in manifest.files}
        self._files: dict[str, ShardFile] = {}
        self._cuts: dict[Hashable, _Cut] = {}
        self._lies: dict[str, tuple[_Cut, tuple[str, ...]]] = {}  # how each tensor is cut, and the files of the chunks
        for group in manifest.tensors:
            self._lies.update(zip(group.keys, zip(repeat(self._cut_of(group)), group.files_of_each), strict=True))
        if len(self._lies) != sum(len(group.keys) for group in manifest.tensors):
            raise DamagedCheckpoint(f"{path}: {_twice(manifest)} stands twice in its manifest")
        self._stand_ins: dict[tuple[object, ...], Tensor] = {}
        self._places: dict[int, tuple[str, str]] = {}  # of each stand-in: its file, if it is of one rank, and its key
        self._arrays: list[tuple[Tensor, Tensor]] = []
        self.snapshot = Snapshot(self._shared(parts), self._own(rank, parts))

    def fill(self, targets: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See `distckpt.formats.Opened.fill`."""
        wanted: defaultdict[str, defaultdict[str, list[Wanted]]] = defaultdict(lambda: defaultdict(list))
        common_bytes: defaultdict[str, int] = defaultdict(int)  # more than that of this rank alone, if it is positive
        for standing, target in (*targets, *self._arrays):
            place = self._places.get(id(standing))
            if place is None or target.dtype is not standing.dtype or target.shape != standing.shape:
                raise ValueError(
                    f"a {target.dtype} of {tuple(target.shape)} is no place for what was {standing.dtype} of "
                    f"{tuple(standing.shape)}, or that is of another checkpoint"
                )
            sign = 1 if not place[0] and is_on_several(target) else -1
            for file, key, one in self._wanted(*place, target):
                wanted[file][key].append(one)
                common_bytes[file] += sign * one.target.nbytes
        for file in sorted(wanted):
            self._file(file).fill(wanted[file], by_all=common_bytes[file] > 0)

    def pieces(self, standing: Sequence[Tensor]) -> Iterator[Piece]:
        """See `distckpt.formats.Opened.pieces`. Each file is read once, however many ranks there were."""
        chunks: defaultdict[str, defaultdict[str, list[Chunk]]] = defaultdict(lambda: defaultdict(list))
        for one in standing:
            own_file, key = self._places[id(one)]
            for file, chunk in [(own_file, all_of(one))] if own_file else self._chunks(key, one):
                chunks[file][key].append(chunk)
        for file in sorted(chunks):
            yield from self._file(file).pieces(chunks[file])

    def _cut_of(self, group: TensorGroup) -> _Cut:
        """How they are cut. What several ranks shared among them is in many groups that lie in other files each, and
        are cut alike."""
        if isinstance(group.chunks, Chunks):
            return _Cut(group, self._path)
        alike = group.dtype, group.shape, group.chunks and group.chunks.starts
        if (known := self._cuts.get(alike)) is None:
            known = self._cuts[alike] = _Cut(group, self._path)
        return known

    def _chunks(self, key: str, standing: Tensor) -> Iterable[tuple[str, Chunk]]:
        """Where the parts of a tensor of the job lie."""
        cut, files = self._lies[key]
        shape = cut.shape
        dims = standing.ndim  # where it lies as bytes, there may be one more, that of the bytes of an element
        for part in cut.chunks_in((0,) * len(shape), shape):
            yield files[part.nth], Chunk(standing, part.begins[:dims], part.shared[:dims])

    def _wanted(self, file: str, key: str, target: Tensor) -> Iterable[tuple[str, str, Wanted]]:
        if file:
            yield file, key, Wanted(None, (), target)
            return
        cut, files = self._lies[key]
        if cut.dtype is not target.dtype:
            target = bytes_of(target)
        for box in boxes_of(target):
            view = view_of(target, box)
            for chunk in cut.chunks_in(box.offsets, box.sizes):
                part = narrowed(view, chunk.begins, chunk.shared)
                yield files[chunk.nth], key, Wanted(chunk.sizes, chunk.low, part)

    def _shared(self, parts: Collection[str] | None) -> dict[str, Any]:
        """What the leader knew, and what other ranks knew beside."""
        indexes = [layout.STATE, *layout.rank_states(self._entries)]
        told = [self._index(index, parts, self._find_shared) for index in indexes]
        return merged(told)

    def _own(self, rank: int, parts: Collection[str] | None) -> dict[str, Any]:
        index, file = layout.rank_file(rank), layout.shard_file(rank)
        if index not in self._entries:  # another world size has other ranks
            return {}

        def find(part: str, reference: Reference) -> Any:
            key = layout.own_key(rank, part, reference.key)
            held = self._file(file).held[key]
            return self._stand_in(file, key, reference, held.dtype, held.shape)

        return self._index(index, parts, find)

    def _index(self, index: str, parts: Collection[str] | None, find: Any) -> dict[str, Any]:
        told = read_index(self._store, f"{self._path}/{index}", self._entries.get(index))
        state = {}
        for part, one in told.items():
            if parts is None or part in parts:
                try:
                    state[part] = trees.decode(one, partial(find, part))
                except ValueError as error:
                    raise DamagedCheckpoint(f"{self._path}/{index}, {part}: {error}") from error
        return state

    def _find_shared(self, part: str, reference: Reference) -> Any:
        key = f"{part}.{reference.key}"
        cut, _ = self._lies[key]
        assert cut.dtype is not None, "others are refused"
        return self._stand_in("", key, reference, cut.dtype, cut.shape)

    def _stand_in(self, file: str, key: str, reference: Reference, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
        if reference.dtype is not None:
            in_bytes = (torch.uint8, shape_in_bytes(reference.shape, reference.dtype))
            if (dtype, tuple(shape)) not in ((reference.dtype, tuple(reference.shape)), in_bytes):
                raise ValueError(f"{ascii(key)[:80]} is {dtype} of {shape}, not {reference.dtype} of {reference.shape}")
            dtype, shape = reference.dtype, reference.shape
        place = (file, key, dtype, tuple(shape))
        if (known := self._stand_ins.get(place)) is None:
            known = self._stand_ins[place] = stand_in(shape, dtype)
            self._places[id(known)] = (file, key)
        if not reference.is_array:
            return known
        array = torch.empty(shape, dtype=dtype)
        self._arrays.append((known, array))
        return array.numpy()

    def _file(self, file: str) -> ShardFile:
        if file not in self._files:
            entry = self._entries.get(file)
            blocks = self._entries.get(entry.digests) if entry else None
            if entry is None or blocks is None:
                raise DamagedCheckpoint(f"{self._path}/{file}, or the digests of its blocks, is not in the manifest")
            told = read_index(self._store, f"{self._path}/{blocks.path}", blocks)
            self._files[file] = ShardFile(self._store, f"{self._path}/{file}", entry, told)
        return self._files[file]


def read_index(store: Store, place: str, entry: Any) -> dict[str, Any]:
    """The JSON object of that file.

    Raises:
        DamagedCheckpoint: where it is not what was committed.
    """
    if entry is None:
        raise DamagedCheckpoint(f"{place} is not in the manifest")
    data = store.read(place)
    if len(data) != entry.size_bytes or digest(data) != entry.xxh3_128:
        raise DamagedCheckpoint(f"{place}: its bytes changed after the commit")
    try:
        return strict_json.load(data, place)
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from error

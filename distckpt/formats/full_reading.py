"""A full checkpoint that is read: its indexes first, then each file once, straight into tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distckpt import layout, strict_json
from distckpt.errors import DamagedCheckpoint
from distckpt.formats import Chunk, Piece, Snapshot
from distckpt.formats import tree as trees
from distckpt.formats.safetensors_file import DTYPES
from distckpt.formats.safetensors_reading import SafetensorsFile
from distckpt.formats.stand_ins import stand_in
from distckpt.formats.streaming import all_of
from distckpt.formats.tree import Reference
from distckpt.manifest import FileEntry, Manifest, digest
from distckpt.stores import Store


class OpenedFull:
    """See `distckpt.formats.Opened`, and `distckpt.formats.Format.open` for what it raises.

    Arrays of NumPy in the snapshot have memory from the start, and `fill` fills them, whatever else it is asked for.
    """

    def __init__(self, store: Store, path: str, manifest: Manifest, rank: int, parts: Collection[str] | None) -> None:
        self._store = store
        self._path = path
        self._entries = {entry.path: entry for entry in manifest.files}
        self._committed: defaultdict[str, dict[str, tuple[str, tuple[int, ...]]]] = defaultdict(dict)
        for one in manifest.tensors:
            for key, lies in zip(one.keys, one.files_of_each, strict=True):
                for file in lies:
                    self._committed[file][key] = one.dtype, one.shape
        self._files: dict[str, SafetensorsFile] = {}
        self._stand_ins: dict[tuple[object, ...], Tensor] = {}
        self._places: dict[int, tuple[str, str]] = {}
        self._arrays: list[tuple[str, str, Tensor]] = []
        shared = self._group(layout.STATE, parts)
        # Another world size has other ranks: nothing of what was a rank's own belongs to any of them.
        is_same_world = layout.rank_file(rank) in self._entries
        own = self._group(layout.rank_file(rank), parts) if is_same_world else {}
        self.snapshot = Snapshot(shared, own)

    def fill(self, targets: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See `distckpt.formats.Opened.fill`."""
        wanted: defaultdict[str, defaultdict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        for standing, target in targets:
            place = self._places.get(id(standing))
            if place is None or target.dtype is not standing.dtype or target.shape != standing.shape:
                raise ValueError(
                    f"a {target.dtype} of {tuple(target.shape)} is no place for what was {standing.dtype} of "
                    f"{tuple(standing.shape)}, or that is of another checkpoint"
                )
            wanted[place[0]][place[1]].append(target)
        for file, key, array in self._arrays:
            wanted[file][key].append(array)
        for file in sorted(wanted):
            self._files[file].fill(wanted[file])

    def pieces(self, standing: Sequence[Tensor]) -> Iterator[Piece]:
        """See `distckpt.formats.Opened.pieces`."""
        chunks: defaultdict[str, defaultdict[str, list[Chunk]]] = defaultdict(lambda: defaultdict(list))
        for one in standing:
            file, key = self._places[id(one)]
            chunks[file][key].append(all_of(one))
        for file in sorted(chunks):
            yield from self._files[file].pieces(chunks[file])

    def _group(self, index: str, parts: Collection[str] | None) -> dict[str, Any]:
        told = _read_index(self._store, self._path, index, self._entries)
        state: dict[str, Any] = {}
        for part, one in told.items():
            if parts is not None and part not in parts:
                continue
            self._open(one["file"])
            try:
                state[part] = trees.decode(one["state"], partial(self._find, one["file"], one["prefix"]))
            except ValueError as error:
                raise DamagedCheckpoint(f"{self._path}/{index}, {part}: {error}") from error
        return state

    def _open(self, file: str) -> None:
        """Where the tensors of that file lie is known, if it is one of the checkpoint. Not every part has tensors."""
        if file not in self._entries or file in self._files:
            return
        opened = self._files[file] = SafetensorsFile(self._store, f"{self._path}/{file}", self._entries[file])
        kinds = {id(held): (DTYPES[held.dtype], held.shape) for held in opened.held.values()}
        if {key: kinds[id(held)] for key, held in opened.held.items()} != self._committed[file]:
            raise DamagedCheckpoint(f"{self._path}/{file}: its tensors are not those that were committed")

    def _find(self, file: str, prefix: str, reference: Reference) -> Any:
        """What stands for a tensor of that file.

        Raises:
            LookupError, ValueError: where it holds no such one.
        """
        key = prefix + reference.key
        place = (file, key) if reference.dtype is None else (file, key, reference.dtype, reference.shape)
        if (known := self._stand_ins.get(place)) is not None and not reference.is_array:
            return known
        held = self._files[file].held[key]
        dtype, shape = held.dtype, held.shape
        if reference.dtype is not None:
            dtype, shape = reference.dtype, reference.shape
            if reference.shape.numel() * dtype.itemsize != held.size_bytes:
                raise ValueError(f"{ascii(key)[:80]} has {held.size_bytes} bytes, no {dtype} of {tuple(shape)}")
        if reference.is_array:
            array = torch.empty(shape, dtype=dtype)
            self._arrays.append((file, key, array))
            return array.numpy()
        known = self._stand_ins[place] = stand_in(shape, dtype)
        self._places[id(known)] = (file, key)
        return known


def _read_index(store: Store, path: str, index: str, files: Mapping[str, FileEntry]) -> dict[str, Any]:
    place = f"{path}/{index}"
    if index not in files:
        raise DamagedCheckpoint(f"{place} is not in the manifest")
    data = store.read(place)
    if len(data) != files[index].size_bytes or digest(data) != files[index].xxh3_128:
        raise DamagedCheckpoint(f"{place}: its bytes changed after the commit")
    try:
        told = strict_json.load(data, place)
        for part, one in told.items():
            is_placed = type(one) is dict and all(type(one.get(key)) is str for key in ("file", "prefix"))
            if not is_placed or "state" not in one:
                raise ValueError(f"{place}: {ascii(part)[:80]} has no place, or no state")
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from error
    return told

"""A folder of safetensors files: whole tensors, as Hugging Face cuts a model into files, or parts of tensors, as
``HuggingFaceStorageWriter`` of torch writes them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash

from distckpt import strict_json
from distckpt.errors import DamagedCheckpoint
from distckpt.formats.dcp_chunks import Chunked
from distckpt.formats.dcp_metadata import Place
from distckpt.formats.filling import Cut, Span, fill
from distckpt.formats.safetensors_reading import SafetensorsFile
from distckpt.formats.shard_file import Wanted
from distckpt.stores import Store

_INFO = "DCP_SHARDING_INFO"

_Part = tuple[tuple[int, ...], tuple[int, ...], Place]  # offsets, sizes, and where it lies


class SafetensorsFolder:
    """Files of which the headers were read; see `distckpt.formats.dcp_reading.Folder`.

    Args:
        files: each with the tensors that are wanted of it; ``None``: all.

    Raises:
        DamagedCheckpoint: naming the file that is none, does not hold what is wanted of it, or says of itself what
            cannot be.
        OSError: where one cannot be read.
    """

    values = frozenset[str]()

    def __init__(self, store: Store, files: Mapping[str, frozenset[str] | None]) -> None:
        self.url = store.url
        self._store = store
        self._files: dict[str, SafetensorsFile] = {}
        self._parts: defaultdict[str, list[_Part]] = defaultdict(list)
        self._dtypes: dict[str, torch.dtype] = {}
        self.is_sharded = True
        for name, wanted in files.items():
            self._open(name, wanted)
        self.tensors = self._dtypes.keys()

    def tensor(self, name: str) -> Chunked:
        parts = self._parts[name]
        # Nowhere does it say how large a tensor is: those rows at its end that no file has are found to be missing
        # when it is laid beside the model.
        ends = [[offset + size for offset, size in zip(*part[:2], strict=True)] for part in parts]
        if len({len(end) for end in ends}) > 1:
            raise DamagedCheckpoint(f"{self.url}: parts of {ascii(name)[:80]} have other numbers of dimensions")
        try:
            return Chunked(self._dtypes[name], tuple(map(max, zip(*ends, strict=True))), parts)
        except ValueError as error:
            raise DamagedCheckpoint(f"{self.url}: {ascii(name)[:80]}: {error}") from error

    def value(self, name: str) -> Any:
        raise ValueError("there are only tensors in safetensors files")

    def fill(self, file: str, wanted: Mapping[Place, Sequence[Wanted]]) -> None:
        opened = self._files[file]
        with opened.opened() as source:
            header = bytearray(opened.header_bytes)
            source.read_into(header)
            if xxhash.xxh3_128_digest(header) != opened.header_digest:
                raise DamagedCheckpoint(f"{self.url}/{file} changed while it was read")
            fill(source, _spans(wanted, opened.header_bytes), _Unchecked())

    def _open(self, name: str, wanted: frozenset[str] | None) -> None:
        try:
            file = self._files[name] = SafetensorsFile(self._store, name)
            lies_at = self._offsets(name, file)
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{self.url}/{name} is missing") from error
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(f"{self.url}: {error}") from error
        if wanted is not None and (lost := wanted - file.held.keys()):
            raise DamagedCheckpoint(f"{self.url}/{name} does not hold {ascii(min(lost))[:80]}, and its index says so")
        begin = file.header_bytes
        for key, held in file.held.items():
            place = Place(name, begin, held.size_bytes)
            begin += held.size_bytes
            if wanted is None or key in wanted:
                self._parts[key].append((lies_at.get(key, (0,) * len(held.shape)), held.shape, place))
                if self._dtypes.setdefault(key, held.dtype) is not held.dtype:
                    raise DamagedCheckpoint(f"{self.url}: {ascii(key)[:80]} has another dtype in {name} than elsewhere")

    def _offsets(self, name: str, file: SafetensorsFile) -> dict[str, tuple[int, ...]]:
        """Where in the whole tensors what is in the file lies, if it says so."""
        with file.opened() as source:
            header = bytearray(file.header_bytes)
            source.read_into(header)
        try:
            notes = strict_json.load(bytes(header[8:]), name).get("__metadata__")
            info = notes.get(_INFO) if type(notes) is dict else None
            if info is None:
                self.is_sharded = False
                return {}
            told = strict_json.load(info.encode() if type(info) is str else b"", _INFO)
            return {key: _checked(told.get(key), len(held.shape)) for key, held in file.held.items()}
        except ValueError as error:
            raise DamagedCheckpoint(f"{name}: what its {_INFO} says of its tensors cannot be: {error}") from error


class _Unchecked:
    """There is no digest of such files."""

    def update(self, data: object) -> None:
        return None

    def skip(self, count: int) -> None:
        return None


def _checked(told: Any, dimensions: int) -> tuple[int, ...]:
    offsets = told.get("saved_offsets") if type(told) is dict else None
    if type(offsets) is not list or len(offsets) != dimensions:
        raise ValueError("one has no offsets")
    if any(type(one) is not int or not 0 <= one < 1 << 59 for one in offsets):
        raise ValueError("one has offsets that cannot be")
    return tuple(offsets)


def _spans(wanted: Mapping[Place, Sequence[Wanted]], at: int) -> Iterator[Span]:
    """What is read of a file, from byte ``at`` on, and what is passed over."""
    for place in sorted(wanted, key=lambda one: one.offset):
        begin, span = _rows(place, wanted[place])
        if begin > at:
            yield Span(begin - at, is_skipped=True)
        yield span
        at = begin + span.size_bytes


def _rows(place: Place, wanted: Sequence[Wanted]) -> tuple[int, Span]:
    """The rows that are wanted of a part of a tensor, and where they begin."""
    sizes, dtype = wanted[0].sizes, wanted[0].target.dtype
    assert sizes is not None, "of parts of tensors it is known"
    if not sizes:
        return place.offset, Span(place.size_bytes, [one.target for one in wanted])
    first = min(one.low[0] for one in wanted)
    last = max(one.low[0] + one.target.shape[0] for one in wanted)
    read = (last - first, *sizes[1:])
    row_bytes = place.size_bytes // sizes[0]
    targets = [one.target for one in wanted if one.target.shape == read]
    cuts = [Cut((one.low[0] - first, *one.low[1:]), one.target) for one in wanted if one.target.shape != read]
    return place.offset + first * row_bytes, Span((last - first) * row_bytes, targets, cuts, dtype, read)

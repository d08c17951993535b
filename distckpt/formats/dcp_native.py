"""A folder of ``torch.distributed.checkpoint``: its ``.metadata``, and the files ``*.distcp`` that it names."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from distckpt.errors import DamagedCheckpoint
from distckpt.formats.dcp_chunks import Chunked
from distckpt.formats.dcp_item import read_item
from distckpt.formats.dcp_metadata import Metadata, Place
from distckpt.formats.shard_file import Wanted
from distckpt.stores import Store

METADATA = ".metadata"

_MOST_METADATA_BYTES = 8 << 30  # of some ten million chunks of tensors, and more than anybody waits for
_MOST_VALUE_BYTES = 256 * 1024 * 1024


class NativeFolder:
    """A folder of which the metadata were read; see `distckpt.formats.dcp_reading.Folder`.

    Raises:
        DamagedCheckpoint: naming the file, where that holds anything else, or asks for what no such file needs.
        OSError: where it cannot be read.
    """

    def __init__(self, store: Store) -> None:
        self.url = store.url
        self._store = store
        with store.open(METADATA) as source:
            if source.size_bytes > _MOST_METADATA_BYTES:
                raise DamagedCheckpoint(f"{self.url}/{METADATA} has {source.size_bytes} bytes, which is too many")
            data = bytearray(source.size_bytes)
            with self._naming(METADATA):
                source.read_into(data)
                self._metadata = Metadata(bytes(data))
        self.tensors = frozenset(self._metadata.tensors)
        self.values = frozenset(self._metadata.values)
        self._sizes: dict[str, int] = {}

    def tensor(self, name: str) -> Chunked:
        with self._naming(METADATA):
            described = self._metadata.tensor(name)
            try:
                found = Chunked(*described)
            except ValueError as error:
                raise ValueError(f"{ascii(name)[:80]}: {error}") from error
            for place, sizes in found.places:
                self._check(name, place, found.dtype.itemsize, sizes)
            return found

    def value(self, name: str) -> Any:
        place = self._metadata.values[name]
        self._check(name, place, 1, ())
        if place.size_bytes > _MOST_VALUE_BYTES:
            raise ValueError(f"it has {place.size_bytes} bytes")
        data = bytearray(place.size_bytes)
        with self._store.open(place.file) as source, self._naming(place.file):
            source.skip(place.offset)
            source.read_into(data)
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # whatever its reader makes of bytes that are no file of torch.save
            raise ValueError(f"torch.load(weights_only=True) refuses it ({type(error).__name__})") from error

    def fill(self, file: str, wanted: Mapping[Place, Sequence[Wanted]]) -> None:
        at = 0
        with self._store.open(file) as source:
            for place in sorted(wanted, key=lambda one: one.offset):
                targets = wanted[place]
                with self._naming(f"{file}, at byte {place.offset}"):
                    if place.offset < at:
                        raise ValueError("what lies there is in what lies before it")
                    source.skip(place.offset - at)
                    sizes = targets[0].sizes
                    assert sizes is not None, "of parts of tensors it is known"
                    read_item(source, place.size_bytes, targets[0].target.dtype, sizes, targets)
                at = place.offset + place.size_bytes

    def _check(self, name: str, place: Place, item_bytes: int, sizes: Sequence[int]) -> None:
        """It can lie there."""
        if place.file not in self._sizes:
            try:
                with self._store.open(place.file) as source:
                    self._sizes[place.file] = source.size_bytes
            except FileNotFoundError as error:
                raise DamagedCheckpoint(
                    f"{self.url}/{place.file} is missing, in which {ascii(name)[:80]} lies, or a part of it"
                ) from error
        least = item_bytes
        for size in sizes:
            least *= size
        if place.offset + place.size_bytes > self._sizes[place.file]:
            raise DamagedCheckpoint(
                f"{self.url}/{place.file} has {self._sizes[place.file]} bytes: what is in it of {ascii(name)[:80]} "
                f"should end at byte {place.offset + place.size_bytes}"
            )
        if place.size_bytes < least:
            raise ValueError(f"a part of {ascii(name)[:80]} needs {least} bytes, and has {place.size_bytes}")

    @contextmanager
    def _naming(self, file: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, EOFError) as error:
            raise DamagedCheckpoint(f"{self.url}/{file}: {error}") from error


def is_of_single_ranks(names: Sequence[str]) -> bool:
    """Whether a folder of these files has metadata of single ranks: nobody knows there what all tensors are."""
    return METADATA not in names and any(one.startswith("__") and one.endswith(METADATA) for one in names)

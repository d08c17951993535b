"""One safetensors file, read without trusting it: first its header, then all of it, straight into tensors.

The layout is that of https://github.com/huggingface/safetensors: eight bytes of length, a JSON header, the tensors
packed behind it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeGuard

import torch
import xxhash
from torch import Tensor

from distckpt import strict_json
from distckpt.errors import DamagedCheckpoint
from distckpt.formats import Chunk, Piece
from distckpt.formats.filling import Span, fill, span_of
from distckpt.formats.hashing import Hash
from distckpt.formats.safetensors_file import DTYPES_BY_NAME
from distckpt.formats.streaming import stream
from distckpt.manifest import FileEntry
from distckpt.stores import Source, Store

_LONGEST_HEADER_BYTES = 100_000_000  # the limit of safetensors' own readers
_MOST_DIMENSIONS = 64  # the limit of torch's own operators


class Held(NamedTuple):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    size_bytes: int


class SafetensorsFile:
    """A file whose header was read.

    Attributes:
        held: its tensors, by key, in the order of the file, which they fill without holes and overlaps. Where there is
            an ``entry``, what the header says of them is proven by `fill`, not yet.
        header_bytes, header_digest: how long the header is, with its length; and the xxh3-128 of it, as it was read.

    Args:
        entry: the size and digest of the file that is meant, if there are any.

    Raises:
        DamagedCheckpoint: naming the file, where it is not of that size, or no safetensors file.
        OSError: where it cannot be read.
    """

    def __init__(self, store: Store, path: str, entry: FileEntry | None = None) -> None:
        self._store = store
        self._path = path
        self._entry = entry
        with self.opened() as source:
            self._size_bytes = source.size_bytes
            try:
                header = _header_of(source)
                self.held = _held(header[8:], source.size_bytes - len(header), path)
            except ValueError as error:
                raise DamagedCheckpoint(f"{path} is no whole safetensors file: {error}") from error
        self.header_bytes = len(header)
        self.header_digest = xxhash.xxh3_128_digest(header)

    def fill(self, targets: Mapping[str, Sequence[Tensor]]) -> None:
        """The tensors that are given for a key, of its dtype and shape, hold what the file does; all of it was read.
        Of one that is spread over ranks, what this rank has of it does.

        Raises:
            DamagedCheckpoint: naming the file, where it is not what was meant, or not what it was.
            OSError: where it cannot be read.
        """
        with self._checked() as (source, digest):
            fill(source, [span_of(*held, targets.get(key, ())) for key, held in self.held.items()], digest)

    def pieces(self, chunks: Mapping[str, Sequence[Chunk]]) -> Iterator[Piece]:
        """The elements of the tensors of which chunks are given, each the whole of what lies under its key, in the
        order of the file. All of it is read; once that has ended, it is what was meant.

        Raises:
            DamagedCheckpoint, OSError: as `fill`.
        """
        with self._checked() as (source, digest):
            spans = [Span(held.size_bytes, chunks=chunks.get(key, ())) for key, held in self.held.items()]
            yield from stream(source, spans, digest)

    def is_same(self, source: Source, digest: Hash) -> bool:
        """Whether ``source``, of the file, begins with the header that was read. That is in ``digest`` then."""
        header = bytearray(self.header_bytes)
        source.read_into(header)
        digest.update(header)
        return source.size_bytes == self._size_bytes and xxhash.xxh3_128_digest(header) == self.header_digest

    @contextmanager
    def _checked(self) -> Iterator[tuple[Source, Hash]]:
        """The bytes behind the header; and a digest that is told them, and is right in the end."""
        digest = xxhash.xxh3_128()
        with self.opened() as source:
            if is_same := self.is_same(source, digest):
                source.expect([(self.header_bytes, source.size_bytes)], by_all=True)
                yield source, digest
        if self._entry is not None and digest.hexdigest() != self._entry.xxh3_128:
            raise DamagedCheckpoint(
                f"{self._path}: its bytes changed after the commit (the size is right, the xxh3-128 is not)"
            )
        if not is_same:
            raise DamagedCheckpoint(f"{self._path} changed while it was read")

    @contextmanager
    def opened(self) -> Iterator[Source]:
        """The bytes of the file, which has the size that it should have."""
        with self._store.open(self._path) as source:
            if self._entry is not None and source.size_bytes != self._entry.size_bytes:
                raise DamagedCheckpoint(
                    f"{self._path} has {source.size_bytes} bytes, {self._entry.size_bytes} were committed"
                )
            try:
                yield source
            except EOFError as error:
                raise DamagedCheckpoint(f"{self._path} is no whole safetensors file: {error}") from error


def read_tensors(store: Store, path: str, entry: FileEntry | None = None) -> dict[str, Tensor]:
    """The tensors of the file at ``path``, in new host memory. Every byte was checked against ``entry``, if given.

    Raises:
        DamagedCheckpoint, OSError: as `SafetensorsFile`.
    """
    file = SafetensorsFile(store, path, entry)
    tensors = {key: torch.empty(held.shape, dtype=held.dtype) for key, held in file.held.items()}
    file.fill({key: [tensor] for key, tensor in tensors.items()})
    return tensors


def _header_of(source: Source) -> bytes:
    """The length and the text."""
    length = bytearray(8)
    source.read_into(length)
    (count,) = struct.unpack("<Q", length)
    if 8 + count > source.size_bytes or count > _LONGEST_HEADER_BYTES:
        raise ValueError(f"a header of {count} bytes does not fit")
    text = bytearray(count)
    source.read_into(text)
    return bytes(length + text)


def _held(text: bytes, rest: int, what: str) -> dict[str, Held]:
    fields = strict_json.load(text, what)
    fields.pop("__metadata__", None)
    held: dict[str, Held] = {}
    kinds: dict[str, Held] = {}  # many are of few kinds
    end = 0
    for begin, stop, name in sorted((*_offsets(field), name) for name, field in fields.items()):
        kind = repr((fields[name].get("dtype"), fields[name].get("shape")))
        if (one := kinds.get(kind)) is None:
            one = kinds[kind] = _one(name, fields[name])
        held[name] = one
        if (begin, stop) != (end, end + one.size_bytes):
            raise ValueError(f"{ascii(name)[:80]} lies at {(begin, stop)}, and should at {(end, end + one.size_bytes)}")
        end = stop
    if end != rest:
        raise ValueError(f"its tensors end at {end} of {rest} bytes")
    return held


def _one(name: str, field: dict[str, Any]) -> Held:
    dtype = DTYPES_BY_NAME.get(str(field.get("dtype")))
    shape = field.get("shape")
    # torch multiplies all extents but those that are zero.
    if dtype is None or not _is_shape(shape) or (span := dtype.itemsize * math.prod(filter(None, shape))) >= 1 << 63:
        raise ValueError(
            f"{ascii(name)[:80]} has the dtype {ascii(field.get('dtype'))[:80]} and the shape {ascii(shape)[:80]}"
        )
    return Held(dtype, tuple(shape), 0 if 0 in shape else span)


def _is_shape(shape: Any) -> TypeGuard[list[int]]:
    return type(shape) is list and len(shape) <= _MOST_DIMENSIONS and _are_counts(shape)


def _offsets(field: Any) -> tuple[int, int]:
    offsets = field.get("data_offsets") if type(field) is dict else None
    if type(offsets) is list and len(offsets) == 2:
        begin, end = offsets
        if type(begin) is int and type(end) is int and begin >= 0 and end >= 0:
            return begin, end
    raise ValueError(f"{ascii(field)[:80]} is no place of a tensor")


def _are_counts(values: list[Any]) -> bool:
    return set(map(type, values)) <= {int} and (not values or min(values) >= 0)

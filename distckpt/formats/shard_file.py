"""One file of a sharded checkpoint, of which a part is read: only the blocks that it lies in, each checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distckpt import strict_json
from distckpt.errors import DamagedCheckpoint
from distckpt.formats import Chunk, Piece
from distckpt.formats.filling import Cut, Span, fill
from distckpt.formats.hashing import CheckedBlocks, Hash, digest_of_blocks, is_block_size
from distckpt.formats.safetensors_reading import Held, SafetensorsFile
from distckpt.formats.streaming import stream
from distckpt.manifest import FileEntry
from distckpt.stores import Source, Store


class Wanted(NamedTuple):
    """A tensor that is to hold a box of what lies under a key.

    Attributes:
        sizes: of what lies there; ``None``: the target is all of it, byte for byte.
        low: where in it the box begins.
    """

    sizes: tuple[int, ...] | None
    low: tuple[int, ...]
    target: Tensor


class ShardFile:
    """A file of which the header was read, which `fill` proves.

    Attributes:
        held: its tensors, by key, in the order of the file.

    Args:
        told: what lies in its file of digests.

    Raises:
        DamagedCheckpoint: naming the file, where it is not what was committed.
        OSError: where it cannot be read.
    """

    def __init__(self, store: Store, path: str, entry: FileEntry, told: Mapping[str, Any]) -> None:
        self._path = path
        self._entry = entry
        self._block_bytes, self._blocks = _blocks(told, entry)
        self._file = SafetensorsFile(store, path, entry)
        self.held: Mapping[str, Held] = self._file.held

    def fill(self, wanted: Mapping[str, Sequence[Wanted]], *, by_all: bool) -> None:
        """The targets hold what lies under their keys. All blocks that were read for that, the header's among them,
        are those that were committed.

        Args:
            by_all: whether other ranks read the same.

        Raises:
            DamagedCheckpoint: naming the file; some targets may have changed.
            OSError: where it cannot be read.
        """
        ranges = [self._range(key, begin, held, wanted[key]) for key, begin, held in self._placed(wanted)]
        with self._checked(spans := [*self._spans(ranges)], by_all=by_all) as (source, digest):
            fill(source, spans, digest)

    def pieces(self, chunks: Mapping[str, Sequence[Chunk]]) -> Iterator[Piece]:
        """The elements of the tensors of which chunks are given, each the whole of what lies under its key, in the
        order of the file. Once that has ended, all blocks that were read are those that were committed.

        Raises:
            DamagedCheckpoint, OSError: as `fill`.
        """
        ranges = [(begin, self._span(key, held, chunks[key])) for key, begin, held in self._placed(chunks)]
        with self._checked(spans := [*self._spans(ranges)]) as (source, digest):
            yield from stream(source, spans, digest)

    @contextmanager
    def _checked(self, spans: Sequence[Span], *, by_all: bool = False) -> Iterator[tuple[Source, Hash]]:
        """The bytes behind the header, of which ``spans`` are read; and a digest that is told them, and raises where a
        block is another."""
        error = DamagedCheckpoint(f"{self._path}: its bytes changed after the commit (a block has another xxh3-128)")
        digest = CheckedBlocks(self._entry.size_bytes, self._block_bytes, self._blocks, error)
        with self._file.opened() as source:
            if not self._file.is_same(source, digest):
                raise DamagedCheckpoint(f"{self._path} changed while it was read")
            source.expect(_ranges(self._file.header_bytes, spans), by_all=by_all)
            yield source, digest

    def _placed(self, keys: Collection[str]) -> Iterator[tuple[str, int, Held]]:
        """Of these, those that have elements, in the order of the file: where each begins, and what is there."""
        end = self._file.header_bytes
        left = set(keys)
        for key, held in self.held.items():
            begin, end = end, end + held.size_bytes
            if key in left:
                left.discard(key)
                if held.size_bytes:
                    yield key, begin, held
        if left:
            raise DamagedCheckpoint(f"{self._path} does not hold {ascii(min(left))[:80]}, as the manifest says it does")

    def _span(self, key: str, held: Held, chunks: Sequence[Chunk]) -> Span:
        for one in chunks:
            is_it = one.standing.dtype is held.dtype and one.sizes == held.shape
            size_bytes = math.prod(one.sizes) * one.standing.itemsize
            is_it_in_bytes = held.dtype is torch.uint8 and size_bytes == held.size_bytes
            if not (is_it or is_it_in_bytes):
                raise DamagedCheckpoint(f"{self._path}: {ascii(key)[:80]} is not what the manifest says it is")
        return Span(held.size_bytes, chunks=chunks)

    def _range(self, key: str, begin: int, held: Held, wanted: Sequence[Wanted]) -> tuple[int, Span]:
        shape = held.shape
        if all(one.sizes is None for one in wanted):
            if any(one.target.nbytes != held.size_bytes for one in wanted):
                raise DamagedCheckpoint(f"{self._path}: {ascii(key)[:80]} is not what the manifest says it is")
            return begin, Span(held.size_bytes, [one.target for one in wanted])
        if any(one.sizes != shape or one.target.dtype is not held.dtype for one in wanted):
            raise DamagedCheckpoint(f"{self._path}: {ascii(key)[:80]} is not what the manifest says it is")
        if not shape:
            return begin, Span(held.size_bytes, [one.target for one in wanted])
        first = min(one.low[0] for one in wanted)
        last = max(one.low[0] + one.target.shape[0] for one in wanted)
        read = (last - first, *shape[1:])
        row_bytes = held.size_bytes // shape[0]
        begin += first * row_bytes
        targets, cuts = [], []
        for one in wanted:
            if one.target.shape == read:
                targets.append(one.target)
            else:
                cuts.append(Cut((one.low[0] - first, *one.low[1:]), one.target))
        return begin, Span((last - first) * row_bytes, targets, cuts, held.dtype, read)

    def _spans(self, ranges: Sequence[tuple[int, Span]]) -> Iterator[Span]:
        """The ranges, and what lies around them in the same blocks; other blocks are skipped. The header was read."""
        at = self._file.header_bytes
        for begin, span in ranges:
            yield from self._gap(at, begin)
            yield span
            at = begin + span.size_bytes
        end = min(-(-at // self._block_bytes) * self._block_bytes, self._entry.size_bytes)
        if end > at:
            yield Span(end - at)

    def _gap(self, begin: int, end: int) -> Iterator[Span]:
        block = self._block_bytes
        skipped = -(-begin // block) * block, end // block * block
        if skipped[0] >= skipped[1]:
            skipped = (end, end)
        for low, high, is_skipped in ((begin, skipped[0], False), (*skipped, True), (skipped[1], end, False)):
            if high > low:
                yield Span(high - low, is_skipped=is_skipped)


def _ranges(begin: int, spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Where what is read of these lies, the first from ``begin`` on."""
    ranges: list[tuple[int, int]] = []
    for span in spans:
        end = begin + span.size_bytes
        if ranges and ranges[-1][1] == begin and not span.is_skipped:
            ranges[-1] = (ranges[-1][0], end)
        elif not span.is_skipped:
            ranges.append((begin, end))
        begin = end
    return ranges


def _blocks(told: Mapping[str, Any], entry: FileEntry) -> tuple[int, Sequence[str]]:
    """The size of the blocks of a file, and their digests, which are those that were committed."""
    try:
        blocks = strict_json.take(told, "xxh3_128", list, entry.digests)
        size = strict_json.take(told, "block_bytes", int, entry.digests)
        is_size = is_block_size(size) and len(blocks) == -(-entry.size_bytes // size)
        if is_size and digest_of_blocks(blocks) == entry.xxh3_128:
            return size, blocks
    except (ValueError, TypeError) as error:
        raise DamagedCheckpoint(f"{entry.digests} holds no digests: {error}") from error
    raise DamagedCheckpoint(f"{entry.digests} does not hold the digests of blocks that were committed")

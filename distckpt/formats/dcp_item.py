"""One tensor in a ``.distcp`` file, which is a whole file of ``torch.save`` among others: read in one pass."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distckpt.formats.dcp_stored import Stored, read_stored
from distckpt.formats.dcp_zip import HEADER, UNPACKED, directory, record_at
from distckpt.formats.filling import SMALL_BYTES, Cut, Span, fill
from distckpt.formats.shard_file import Wanted
from distckpt.formats.shards import narrowed
from distckpt.stores import Source

if TYPE_CHECKING:
    from typing_extensions import Buffer

try:
    from isal.isal_zlib import crc32
except ImportError:  # an extra: several times as fast
    from zlib import crc32

_HEAD_BYTES = 4096  # of the records before the tensor, as a rule
_MOST_HEAD_BYTES = 256 * 1024  # where they are aligned to whatever somebody asked for
_MOST_TAIL_BYTES = 1024 * 1024


def read_item(
    source: Source, size_bytes: int, dtype: torch.dtype, sizes: tuple[int, ...], wanted: Sequence[Wanted]
) -> None:
    """The targets hold their boxes of the tensor, of that dtype and shape and not empty, that is in the next bytes of
    ``source``. All of these were read, and agree with the checksums in them, if there are any.

    Takes memory for the tensor, where no target is all of it.

    Raises:
        ValueError, EOFError: where they hold no such tensor, or hold it in a way that only unpickling could read; some
            targets may have changed.
        OSError: where the source does.
    """
    item = _Item(source, size_bytes)
    stored, begin = item.find()
    if (stored.dtype, stored.sizes) != (dtype, sizes):
        raise ValueError(f"it holds {stored.dtype} of {stored.sizes}, and should {dtype} of {sizes}")
    content_bytes = stored.held * dtype.itemsize
    if content_bytes > size_bytes - begin:
        raise ValueError(f"{content_bytes} bytes of a tensor are not in its {size_bytes}")
    item.skip(begin)
    digest = _Checksum()
    if stored.is_plain and content_bytes > SMALL_BYTES:
        targets = [one.target for one in wanted if one.target.shape == sizes]
        cuts = [Cut(one.low, one.target) for one in wanted if one.target.shape != sizes]
        fill(item, [Span(content_bytes, targets, cuts, dtype, sizes)], digest)
    else:
        held = _read(item, stored, digest)
        with torch.no_grad():
            for one in wanted:
                one.target.copy_(narrowed(held, one.low, tuple(one.target.shape)))
    item.check(stored.key, content_bytes, digest.value)


class _Item:
    """The bytes of an item, in their order; those that were looked at before their turn are kept. A `Source`."""

    def __init__(self, source: Source, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._source = source
        self._head = b""
        self._at = 0
        self._root = ""
        self._pickle = b""
        self._header_at = 0

    def find(self) -> tuple[Stored, int]:
        """The tensor, and where its elements begin."""
        self._look(_HEAD_BYTES)
        try:
            return self._find()
        except ValueError:
            if len(self._head) == self.size_bytes:
                raise
        self._look(_MOST_HEAD_BYTES)
        return self._find()

    def read_into(self, target: Buffer) -> None:
        rest = memoryview(target).cast("B")
        if len(rest) > self.size_bytes - self._at:
            raise EOFError(f"its {self.size_bytes} bytes end too early")
        kept = self._head[self._at : self._at + len(rest)]
        rest[: len(kept)] = kept
        self._at += len(rest)
        if rest := rest[len(kept) :]:
            self._source.read_into(rest)

    def skip(self, count: int) -> None:
        """Over what was looked at."""
        self._at += count

    def expect(self, ranges: Sequence[tuple[int, int]], *, by_all: bool = False) -> None:
        """It is read from its start to its end."""

    def check(self, key: str, content_bytes: int, checksum: int) -> None:
        """The directory, at the end of what is left, says the same of what was read.

        Raises:
            ValueError: where it does not.
        """
        begin, left = self._at, self.size_bytes - self._at
        if left > _MOST_TAIL_BYTES:
            raise ValueError(f"{left} bytes follow its tensor")
        tail = bytearray(left)
        self.read_into(tail)
        records = directory(bytes(tail), begin)
        told, content = records.get(f"{self._root}data.pkl"), records.get(f"{self._root}data/{key}")
        if told is None or content is None:
            raise ValueError("its directory does not have what is in it")
        if (told.header_at, told.size_bytes) != (0, len(self._pickle)):
            raise ValueError("its directory says something else of its pickle")
        if (content.header_at, content.size_bytes) != (self._header_at, content_bytes):
            raise ValueError("its directory says something else of its tensor")
        if any(one.method != UNPACKED or one.packed_bytes != one.size_bytes for one in (told, content)):
            raise ValueError("it is compressed")
        # Where torch was told to work out none, all of them are zero.
        is_summed = any(one.checksum for one in records.values())
        if is_summed and (told.checksum, content.checksum) != (crc32(self._pickle), checksum):
            raise ValueError("its bytes changed: the checksum in it does not match")
        if (order := records.get(f"{self._root}byteorder")) is not None:
            begin = record_at(self._head, order.header_at)[1]
            if self._head[begin : begin + order.size_bytes] != sys.byteorder.encode():
                raise ValueError("it was written on a machine of another byte order")

    def _look(self, count: int) -> None:
        more = bytearray(min(count, self.size_bytes) - len(self._head))
        self._source.read_into(more)
        self._head += more

    def _find(self) -> tuple[Stored, int]:
        name, begin = record_at(self._head, 0)
        self._root = name.removesuffix("data.pkl")
        if self._root == name:
            raise ValueError("it does not begin with the record data.pkl")
        stored, count = read_stored(self._head[begin:])
        at = begin + count
        self._pickle = self._head[begin:at]
        record = f"{self._root}data/{stored.key}"
        while (at := self._head.find(record.encode(), at)) >= 0:
            self._header_at = at - HEADER.size
            if self._head.startswith(b"PK\3\4", self._header_at):
                name, begin = record_at(self._head, self._header_at)
                if name == record:
                    return stored, begin
            at += 1
        raise ValueError("the record of its tensor is not where it should be")


class _Checksum:
    """The CRC-32 of what it is told."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, data: Buffer) -> None:
        self.value = crc32(data, self.value)


def _read(item: _Item, stored: Stored, digest: _Checksum) -> Tensor:
    """The tensor, in new memory."""
    memory = bytearray(stored.held * stored.dtype.itemsize)
    item.read_into(memory)
    digest.update(memory)
    held = torch.frombuffer(memory, dtype=stored.dtype).as_strided(stored.sizes, stored.strides, stored.first)
    held = held.conj() if stored.is_conj else held
    return torch._neg_view(held) if stored.is_neg else held

"""The bytes of an image on their way from memory to a store: summed, hashed and written while they are warm."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import xxhash

from distckpt import strict_json
from distckpt.engine.ahead import ahead
from distckpt.engine.copying import BLOCK_BYTES
from distckpt.formats import Image, Sum
from distckpt.formats.hashing import BlockDigests, Hash, block_bytes_of
from distckpt.manifest import FileEntry
from distckpt.stores import Store

try:
    from isal.isal_zlib import crc32
except ImportError:  # seven times as slow, and nothing else
    from zlib import crc32

_SUM_BYTES = 4


def write_image(
    image: Image, pieces: Iterable[memoryview], store: Store, place: str, spend: Callable[[str, float], None]
) -> list[FileEntry]:
    """A new file at ``place`` holds the bytes of ``image``, durable; and another one, beside it, the digests of its
    blocks, where the image asks for that.

    One piece is hashed while the one before is being written.

    Args:
        pieces: the bytes, from the first to the last. Sums are filled in there.
        spend: is told how many seconds each phase took.

    Raises:
        OSError: where it cannot be written; there is no file then.
    """
    digest = BlockDigests(block_bytes_of(image.size_bytes)) if image.digests else xxhash.xxh3_128()
    hashed = _hashed(pieces, _Sums(image.sums), digest, spend)
    with store.create(place) as sink:
        with ahead(hashed) if image.size_bytes > BLOCK_BYTES else nullcontext(hashed) as coming:
            for piece in coming:
                began = time.monotonic()
                sink.write(piece)
                spend("write", time.monotonic() - began)
        began = time.monotonic()
    spend("fsync", time.monotonic() - began)
    entry = FileEntry(image.path, image.size_bytes, digest.hexdigest(), image.digests)
    if not isinstance(digest, BlockDigests):
        return [entry]
    told = strict_json.dump({"block_bytes": digest.block_bytes, "xxh3_128": digest.blocks()})
    with store.create(beside(place, image)) as sink:
        sink.write(told)
    return [entry, FileEntry(image.digests, len(told), xxhash.xxh3_128_hexdigest(told))]


def beside(place: str, image: Image) -> str:
    """Where the digests of the blocks of ``image`` lie, which lies at ``place``."""
    return place.removesuffix(image.path) + image.digests


def _hashed(
    pieces: Iterable[memoryview], sums: _Sums, digest: Hash, spend: Callable[[str, float], None]
) -> Iterator[memoryview]:
    then = time.monotonic()
    for piece in pieces:
        filled = time.monotonic()
        sums.fill(piece)
        digest.update(piece)
        spend("fill", filled - then)
        spend("hash", time.monotonic() - filled)
        yield piece
        then = time.monotonic()


class _Sums:
    """Works sums out while the bytes that they are of pass by, and puts them in where they pass by later."""

    def __init__(self, sums: Iterable[Sum]) -> None:
        self._waiting = sorted(sums, key=lambda one: one.begin, reverse=True)
        self._at = 0
        self._value = 0
        self._known: dict[int, int] = {}

    def fill(self, piece: memoryview) -> None:
        """The next bytes of the file: what is known by now stands in them."""
        begin, self._at = self._at, self._at + len(piece)
        while self._waiting and self._waiting[-1].begin < self._at:
            one = self._waiting[-1]
            self._value = crc32(piece[max(one.begin - begin, 0) : one.end - begin], self._value)
            if one.end > self._at:
                break
            for place in one.places:
                self._known[place] = self._value
            self._waiting.pop()
            self._value = 0
        for place in [place for place in self._known if place < self._at]:
            told = self._known[place].to_bytes(_SUM_BYTES, "little")
            for nth, byte in enumerate(told):
                if begin <= place + nth < self._at:
                    piece[place + nth - begin] = byte
            if place + _SUM_BYTES <= self._at:
                del self._known[place]

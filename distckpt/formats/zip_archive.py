"""A zip file as ``torch.save`` writes them, byte for byte, laid out before all contents are known.

Contents are not compressed, and begin at multiples of an alignment. Their checksum follows them, which lets such a file
be written from its start to its end, and stands in the directory at the end of the file once more.
"""

from __future__ import annotations

import struct
import zlib

from distckpt.formats import Sum

_FOLDER = b"archive/"  # torch.save's word where the file has no name yet
_LONG, _MANY = 0xFFFFFFFF, 0xFFFF  # sizes and offsets, and numbers of records, that need more bits than zip once had
_UTF8, _SUM_FOLLOWS = 0x0800, 0x0008
_MADE_BY, _NEEDED = 0x031E, 45

_HEADER = struct.Struct("<4s5H3I2H")
_SUMS, _LONG_SUMS = struct.Struct("<4sIII"), struct.Struct("<4sIQQ")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LONG_END, _LOCATOR, _END = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI"), struct.Struct("<4s4H2IH")
_SUM_IN_SUMS, _SUM_IN_ENTRY = 4, 16


class ZipArchive:
    """Records are added in their order; after `finish`, the file is laid out.

    Attributes:
        size_bytes: of the file, so far.
        texts: its bytes, by offset, but for the contents that are not known.
        sums: the checksums of those.
    """

    def __init__(self, alignment: int) -> None:
        self.size_bytes = 0
        self.texts: list[tuple[int, bytes]] = []
        self.sums: list[Sum] = []
        self._alignment = alignment
        self._run: list[bytes] = []  # of what is known since the last content that is not
        self._run_at = 0
        self._count = 0
        self._entries: list[bytes] = []
        self._entries_bytes = 0
        self._unknown: list[tuple[int, int, int]] = []

    def add_text(self, name: str, content: bytes) -> None:
        """A record with that content, which is not empty."""
        is_long = self._begin(name, len(content), zlib.crc32(content))[1]
        self._append(content)
        self._append_sums(len(content), zlib.crc32(content), is_long=is_long)

    def add(self, name: str, size_bytes: int) -> int:
        """A record of that size; where its content is to stand."""
        entry_at = self._entries_bytes
        content_at, is_long = self._begin(name, size_bytes, 0)
        if size_bytes:
            self._unknown.append((content_at, content_at + size_bytes, entry_at))
            self._end_run()
            self.size_bytes = self._run_at = content_at + size_bytes
            self._append_sums(size_bytes, 0, is_long=is_long)
        return content_at

    def finish(self) -> None:
        """The directory, and the end of the file."""
        begin, count = self.size_bytes, self._count
        self.sums = [
            Sum(content_at, end, (end + _SUM_IN_SUMS, begin + entry_at + _SUM_IN_ENTRY))
            for content_at, end, entry_at in self._unknown
        ]
        self._append(b"".join(self._entries))
        end, length = self.size_bytes, self._entries_bytes
        self._append(_LONG_END.pack(b"PK\6\6", 44, _MADE_BY, _NEEDED, 0, 0, count, count, length, begin))
        self._append(_LOCATOR.pack(b"PK\6\7", 0, end, 1))
        few = min(count, _MANY)
        self._append(_END.pack(b"PK\5\6", 0, 0, few, few, min(length, _LONG), min(begin, _LONG), 0))
        self._end_run()

    def _begin(self, name: str, size_bytes: int, checksum: int) -> tuple[int, bool]:
        """The header of a record, and its entry in the directory; where its content stands, and whether its size is
        spelled with 64 bits there."""
        at, spelled = self.size_bytes, _FOLDER + name.encode()
        flags = _UTF8 | _SUM_FOLLOWS if size_bytes else _UTF8
        size, offset = min(size_bytes, _LONG), min(at, _LONG)
        before = after = b""
        if size == _LONG or offset == _LONG:
            place = (at,) if offset == _LONG else ()
            before = _long_fields(*((size_bytes, 0) if size == _LONG else ()), *place)
            after = _long_fields(*((size_bytes, size_bytes) if size == _LONG else ()), *place)
        filled_at = at + _HEADER.size + len(spelled) + len(before) + 4
        padding = -filled_at % self._alignment
        extra_bytes = len(before) + 4 + padding
        self._append(
            _HEADER.pack(b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(spelled), extra_bytes)
            + spelled
            + before
            + struct.pack("<2sH", b"FB", padding)
            + b"Z" * padding
        )
        entry = _ENTRY.pack(
            *(b"PK\1\2", 0, 0, flags, 0, 0, 0, checksum, size, size, len(spelled), len(after), 0, 0, 0, 0, offset)
        )
        self._count += 1
        self._entries += entry, spelled, after
        self._entries_bytes += len(entry) + len(spelled) + len(after)
        return filled_at + padding, bool(before)

    def _append_sums(self, size_bytes: int, checksum: int, *, is_long: bool) -> None:
        self._append((_LONG_SUMS if is_long else _SUMS).pack(b"PK\7\10", checksum, size_bytes, size_bytes))

    def _append(self, text: bytes) -> None:
        self._run.append(text)
        self.size_bytes += len(text)

    def _end_run(self) -> None:
        self.texts.append((self._run_at, b"".join(self._run)))
        self._run = []


def _long_fields(*values: int) -> bytes:
    """What is too long for its place in a header, in an extra field behind it."""
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)

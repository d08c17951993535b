"""The directory of a zip file of ``torch.save``, and the headers of its records."""

from __future__ import annotations

import struct
from typing import NamedTuple

_ENTRY = struct.Struct("<4s6H3I5H2I")
_END, _LOCATOR, _LONG_END = struct.Struct("<4s4H2IH"), struct.Struct("<4sIQI"), struct.Struct("<4sQ2H2I4Q")
HEADER = struct.Struct("<4s5H3I2H")
UNPACKED = 0  # the method of what is not compressed
_LONG = 0xFFFFFFFF


class Record(NamedTuple):
    """A record of a zip file, as the directory at its end has it."""

    method: int
    checksum: int
    packed_bytes: int
    size_bytes: int
    header_at: int


def record_at(head: bytes, at: int) -> tuple[str, int]:
    """The name of the record whose header stands there, and where its content does."""
    if len(head) < at + HEADER.size:
        raise ValueError("it is cut off")
    signature, _, _, method, *_, name_bytes, extra_bytes = HEADER.unpack_from(head, at)
    begin = at + HEADER.size
    end = begin + name_bytes + extra_bytes
    if signature != b"PK\3\4" or method != UNPACKED or end > len(head):
        raise ValueError("it is no file of torch.save")
    return head[begin : begin + name_bytes].decode(errors="replace"), end


def directory(tail: bytes, tail_at: int) -> dict[str, Record]:
    """The records of a zip file that ends with ``tail``, by name."""
    try:
        signature, *_, count, size_bytes, at, comment = _END.unpack(tail[-_END.size :])
        if signature != b"PK\5\6" or comment:
            raise ValueError("it does not end as a file of torch.save does")
        before = tail[: -_END.size]
        if before[-_LOCATOR.size :].startswith(b"PK\6\7"):
            _, _, long_at, _ = _LOCATOR.unpack(before[-_LOCATOR.size :])
            if long_at < tail_at:
                raise ValueError("its directory is not at its end")
            *_, count, size_bytes, at = _LONG_END.unpack_from(tail, long_at - tail_at)
        if at < tail_at:
            raise ValueError("its directory is not at its end")
        return _records(tail[at - tail_at :][:size_bytes], count)
    except struct.error as error:
        raise ValueError("its directory is cut off") from error


def _records(text: bytes, count: int) -> dict[str, Record]:
    found: dict[str, Record] = {}
    at = 0
    for _ in range(count):
        fields = _ENTRY.unpack_from(text, at)
        (signature, _, _, _, method, _, _, checksum, packed, size), rest = fields[:10], fields[10:]
        name_bytes, extra_bytes, comment_bytes, *_, header_at = rest
        begin = at + _ENTRY.size
        name = text[begin : begin + name_bytes].decode(errors="replace")
        long = _long_fields(text[begin + name_bytes :][:extra_bytes])
        size, packed, header_at = (long.pop(0) if one == _LONG and long else one for one in (size, packed, header_at))
        if signature != b"PK\1\2" or name in found:
            raise ValueError("its directory is broken")
        found[name] = Record(method, checksum, packed, size, header_at)
        at = begin + name_bytes + extra_bytes + comment_bytes
    return found


def _long_fields(extra: bytes) -> list[int]:
    """What does not fit into 32 bits."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1 and at + 4 + size <= len(extra):
            return list(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
        at += 4 + size
    return []

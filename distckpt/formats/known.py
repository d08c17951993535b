"""The formats that this distckpt reads, by the names in records."""

from __future__ import annotations

from distckpt.errors import NewerVersion
from distckpt.formats import Format
from distckpt.formats.full import FORMAT as FULL
from distckpt.formats.pth import FORMAT as PTH
from distckpt.formats.sharded import FORMAT as SHARDED

_FORMATS: dict[str, Format] = {format.name: format for format in (FULL, SHARDED, PTH)}


def get_format(name: str) -> Format:
    """The format that records call ``name``.

    Raises:
        NewerVersion: where this distckpt does not know it.
    """
    if name not in _FORMATS:
        raise NewerVersion(f"the format {ascii(name)[:40]} is not known to this distckpt: upgrade it to read that")
    return _FORMATS[name]

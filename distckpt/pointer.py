"""The file ``last_checkpoint`` of MMEngine, from which its runner knows what to resume."""

from __future__ import annotations

import logging
import os
from pathlib import Path, PurePath

import xxhash

from distckpt import layout
from distckpt.catalog import scan
from distckpt.contest import is_link
from distckpt.manifest import Record
from distckpt.stores import Store

_log = logging.getLogger("distckpt")

_PIECE_BYTES = 16 * 1024 * 1024


class Pointer:
    """One line of text beside a run: the path of the file to resume from. Leader only."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def set(self, path: str) -> None:
        """It says ``path``, whole and durably, without a newline: its readers take all that it holds."""
        self._store.put(layout.LAST_CHECKPOINT, os.fsencode(path))

    def path(self) -> str | None:
        """What it says; None where there is none, or where it cannot be read."""
        try:
            return os.fsdecode(self._store.read(layout.LAST_CHECKPOINT)).strip() or None
        except (OSError, EOFError):
            return None

    def name(self) -> str | None:
        """The name of the file that it says."""
        path = self.path()
        return None if path is None else PurePath(path).name

    def mend(self, store: Store, out_dir: str) -> bool:
        """It says a file in ``out_dir`` that verifies, if one does: the one that it said, else the newest. Whether
        there is a file to resume from.

        A file that we did not write is left to its reader. Costs one read of the file.
        """
        said = self.path()
        records = [record for record in reversed(scan(store).records) if not is_link(record)]
        if not records:
            return said is not None and Path(said).exists()
        named = [record for record in records if said is not None and record.name == PurePath(said).name]
        if said is not None and not named and Path(said).exists():
            return True
        for record in named + [one for one in records if one not in named]:
            path = os.path.join(out_dir, record.name)  # noqa: PTH118  as MMEngine spells it
            if _is_whole(store, record):
                if said is None or Path(said).absolute() != Path(path).absolute():
                    _log.warning("%s said %s, and now says %s", layout.LAST_CHECKPOINT, said or "nothing", path)
                    self.set(path)
                return True
            _log.warning("%s is damaged and passed over; it is left for inspection", path)
        return False


def _is_whole(store: Store, record: Record) -> bool:
    digest = xxhash.xxh3_128()
    try:
        with store.open(record.name) as source:
            left = source.size_bytes
            if left != record.content_bytes:
                return False
            piece = memoryview(bytearray(min(left, _PIECE_BYTES)))
            while left:
                source.read_into(piece[: min(left, _PIECE_BYTES)])
                digest.update(piece[: min(left, _PIECE_BYTES)])
                left -= min(left, _PIECE_BYTES)
    except (OSError, EOFError):
        return False
    return digest.hexdigest() == record.content_xxh3_128

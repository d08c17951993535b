"""One restore, whole: the leader proposes a checkpoint, every rank reads and checks its part, all agree or go on
to the one before it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

from distckpt import layout
from distckpt.catalog import is_passing, read_manifest, refuse_newer, scan
from distckpt.errors import DamagedCheckpoint, NewerVersion, NoCheckpoint
from distckpt.formats import Format, Snapshot
from distckpt.manifest import Manifest, Record
from distckpt.ranks import Json, Ranks, from_leader, is_leader, together
from distckpt.stores import Store

_log = logging.getLogger("distckpt")


@dataclass(frozen=True)
class Restored:
    """What one rank read: the checkpoint's record and manifest, its state, and which newer ones were passed over."""

    record: Record
    manifest: Manifest
    snapshot: Snapshot
    skipped: tuple[str, ...] = ()


def read_newest(
    ranks: Ranks,
    *,
    store: Store,
    get_format: Callable[[str], Format],
    parts: Collection[str] | None = None,
    name: str | None = None,
) -> Restored | None:
    """The newest checkpoint that verifies on every rank; ``None`` where nothing was ever committed. Collective.

    Nothing is changed yet: the state is in memory, each byte of it checked. A checkpoint that is damaged for any rank
    is named in a warning, left for inspection, and the one before it is taken.

    Args:
        parts: only these parts of the state.
        name: only this checkpoint, whatever else is there.

    Raises:
        NoCheckpoint: on every rank, where none of the candidates verifies. Never a silent fresh start.
        NewerVersion: on every rank, where a newer distckpt wrote one.
        RankFailure: on every rank, where one failed otherwise.
    """
    candidates = from_leader(ranks, "choice of a checkpoint", lambda: _candidates(store, name))
    skipped: list[str] = []
    for text in candidates:
        record = Record.from_json(text.encode(), "record")
        reader = _Reader(record, store, get_format, ranks.rank, parts)
        faults = {
            rank: fault for rank, fault in enumerate(together(ranks, f"read of {record.name}", reader.fault)) if fault
        }
        if not faults and reader.restored is not None:
            return Restored(reader.restored.record, reader.restored.manifest, reader.restored.snapshot, tuple(skipped))
        skipped.append(record.name)
        if is_leader(ranks):
            told = "; ".join(f"rank {rank}: {fault}" for rank, fault in faults.items())
            _log.warning("%s is damaged and passed over; it is left for inspection. %s", record.name, told)
    if skipped:
        raise NoCheckpoint(
            f"{store.url}: none of the committed checkpoints can be read ({', '.join(skipped)}). They are left as "
            "they are; to start from nothing, use another directory"
        )
    return None


def _candidates(store: Store, name: str | None) -> Json:
    listing = scan(store)
    if name is not None:
        for record in listing.records:
            if record.name == name:
                return [record.to_json().decode()]
        if name in listing.unreadable:
            raise listing.unreadable[name]
        known = ", ".join(record.name for record in listing.records) or "none"
        raise NoCheckpoint(f"{store.url}: {ascii(name)[:120]} is not committed there; committed: {known}")
    refuse_newer(listing)
    for damaged, error in listing.unreadable.items():
        _log.warning("%s is passed over: %s", damaged, error)
    if listing.unreadable and not listing.records:
        raise NoCheckpoint(
            f"{store.url}: no record there can be read: {'; '.join(map(str, listing.unreadable.values()))}"
        )
    if not listing.records:
        _log.info("%s: nothing is committed there, so training starts at step 0", store.url)
    return [record.to_json().decode() for record in reversed(listing.records)]


class _Reader:
    """Reads one candidate on one rank. That it is damaged is a result, told to all, and no exception."""

    def __init__(
        self,
        record: Record,
        store: Store,
        get_format: Callable[[str], Format],
        rank: int,
        parts: Collection[str] | None,
    ) -> None:
        self._record = record
        self._store = store
        self._get_format = get_format
        self._rank = rank
        self._parts = parts
        self.restored: Restored | None = None

    def fault(self) -> str:
        record = self._record
        try:
            manifest = read_manifest(self._store, record)
            if layout.StepName.parse(record.name) and manifest.progress != record.progress:
                raise DamagedCheckpoint(f"{record.name}: its manifest is of step {manifest.progress.step}")
            snapshot = self._get_format(record.format).read(self._store, record.name, manifest, self._rank, self._parts)
        except NewerVersion:
            raise
        except (DamagedCheckpoint, OSError, EOFError) as error:
            if not isinstance(error, DamagedCheckpoint) and is_passing(error):
                raise
            return f"{type(error).__name__}: {error}"
        self.restored = Restored(record, manifest, snapshot)
        return ""

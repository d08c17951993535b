"""The checkpoints that are meant by a path, wherever it is: in a run, or copied away from it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distckpt import layout
from distckpt.catalog import is_passing, read_manifest, read_record, refuse_newer, scan
from distckpt.errors import DamagedCheckpoint, NoCheckpoint
from distckpt.manifest import Manifest, Record
from distckpt.stores.local import LocalStore

_log = logging.getLogger("distckpt")

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Candidate:
    """A checkpoint.

    Attributes:
        record: what binds it; ``None`` where it was copied away, and its manifest has to do.
    """

    store: LocalStore
    name: str
    record: Record | None

    @property
    def place(self) -> Path:
        return self.store.root / self.name

    def manifest(self) -> Manifest:
        """What it is.

        Raises:
            DamagedCheckpoint, OSError: where that is not what was committed, or cannot be read now.
        """
        if self.record is None:
            path = f"{self.name}/{layout.MANIFEST}"
            return Manifest.from_json(self.store.read(path), path)
        manifest = read_manifest(self.store, self.record)
        if manifest.progress != self.record.progress:
            raise DamagedCheckpoint(f"{self.name}: its manifest is of step {manifest.progress.step}")
        return manifest


def candidates_of(checkpoint: Source) -> tuple[list[Candidate], bool]:
    """The checkpoints that are meant, the newest first; and whether that is a run's, of which any will do."""
    path = Path(checkpoint).resolve()
    store = LocalStore(path.parent)
    if (store.root / layout.record_of(path.name)).exists():
        return [Candidate(store, path.name, read_record(store, path.name))], False
    if path.is_file():
        raise NoCheckpoint(
            f"{checkpoint} is not committed: there is no {layout.record_of(path.name)} beside it, so nothing proves it"
        )
    if (path / layout.MANIFEST).exists():
        return [Candidate(store, path.name, None)], False
    if not path.is_dir():
        raise NoCheckpoint(f"{checkpoint} is neither a checkpoint nor a run's directory")
    store = LocalStore(path)
    listing = scan(store)
    refuse_newer(listing)
    for name, error in listing.unreadable.items():
        _log.warning("%s is passed over: %s", name, error)
    if not listing.records:
        raise NoCheckpoint(f"{checkpoint} holds no committed checkpoint")
    return [Candidate(store, record.name, record) for record in reversed(listing.records)], True


@contextmanager
def damage_in(name: str) -> Iterator[None]:
    """What cannot be read, and will not be later, is damage."""
    try:
        yield
    except (OSError, EOFError) as error:
        if is_passing(error):
            raise
        raise DamagedCheckpoint(f"{name} cannot be read: {error}") from error

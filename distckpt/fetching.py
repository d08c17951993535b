"""What a runner resumes from, made ready: here or, where that is lost or behind, from the place of the copies."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from distckpt import layout, message_hub
from distckpt.catalog import read_record, scan
from distckpt.errors import DamagedCheckpoint, DistckptError, NoCheckpoint
from distckpt.formats.pth import open_pth
from distckpt.linked_keeping import INTERVAL, LAST
from distckpt.manifest import Record
from distckpt.mirror import Mirror
from distckpt.pointer import Pointer
from distckpt.progress import Progress
from distckpt.stores import Store
from distckpt.stores.local import LocalStore

_log = logging.getLogger("distckpt")


def make_ready(work_dir: str, directory: str, mirror: Mirror | None, filename_tmpl: str) -> None:
    """``last_checkpoint`` in ``work_dir`` says a file in ``directory`` that is whole, if there is one. What it says at
    the other place is fetched where there is none, or where another directory has gone on with the run since. Leader
    only.

    Raises:
        NoCheckpoint, DamagedCheckpoint, DistckptError: where what should be at the other place is not, is not whole, or
            cannot be read, and there is nothing here to resume from.
    """
    is_there = Pointer(LocalStore(work_dir)).mend(LocalStore(directory), directory)
    if mirror is None:
        return
    try:
        name = _pointed(mirror)
        if name is None or (is_there and (name == mirror.said() or LocalStore(directory).exists(name))):
            return
        _log.warning("%s is fetched, as %s holds %s", mirror.path(name), directory, "another" if is_there else "none")
        _fetch(LocalStore(directory), directory, mirror, name, filename_tmpl, is_there=is_there)
    except DistckptError as error:
        if not is_there:
            raise
        _log.warning("%s; the run goes on with what is in %s", error, directory)


def record_again(store: Store, directory: str, name: str, run: str) -> None:
    """The file ``name`` is a checkpoint again, if it is one of ``run`` without a record: a kill came as it was written
    once more, between the record of the old one and that of the new. Leader only."""
    place = Path(directory) / name
    if store.exists(layout.record_of(name)) or not place.is_file():
        return
    told = _Told.read(place)
    if told is None or told.run != run:
        return
    try:
        _check(place, str(place))
    except DamagedCheckpoint as error:
        _log.warning("%s; it is left for inspection", error)
        return
    with place.open("rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    record = told.record(store, name, place.stat().st_size, digest, (INTERVAL,))
    store.publish(layout.record_of(name), record.to_json())


def _fetch(store: LocalStore, directory: str, mirror: Mirror, name: str, filename_tmpl: str, *, is_there: bool) -> None:
    store.make_root()
    draft = f"{layout.DRAFT_PREFIX}{name}-{secrets.token_hex(4)}"
    try:
        size_bytes, digest = _download(mirror, name, store, draft)
        _check(Path(directory) / draft, mirror.path(name))
        told = _Told.read(Path(directory) / draft)
        record = (
            None if told is None else told.record(store, name, size_bytes, digest, told.reasons(name, filename_tmpl))
        )
        if is_there and (record is None or not _is_further(store, record)):
            _log.warning("%s is of another run, or not further, and is not resumed from", mirror.path(name))
            return
        store.delete(layout.record_of(name))  # of a file that is damaged, or gone
        store.settle()
        store.move(draft, name)
        store.settle()
        if record is not None and told is not None:
            store.publish(layout.record_of(name), record.to_json())
            mirror.inherit(record, [one for one in told.others(mirror, filename_tmpl) if one != name])
        Pointer(store).set(os.path.join(directory, name))  # noqa: PTH118  as MMEngine spells it
    finally:
        store.delete(draft)


def _pointed(mirror: Mirror) -> str | None:
    path = mirror.path(layout.LAST_CHECKPOINT)
    try:
        if not mirror.files.isfile(path):
            return None
        said = os.fsdecode(b"".join(mirror.files.download(path))).strip()
    except Exception as error:  # of whatever library
        raise DistckptError(
            f"{path} cannot be read, so it is not known what there is to resume from: {type(error).__name__}: {error}"
        ) from error
    name = PurePosixPath(said).name
    if not layout.is_safe(name):
        raise NoCheckpoint(f"{path} says {said[:200]!r}, which is no file to resume from")
    return name


def _download(mirror: Mirror, name: str, store: LocalStore, draft: str) -> tuple[int, str]:
    path, digest, size_bytes = mirror.path(name), xxhash.xxh3_128(), 0
    try:
        if not mirror.files.isfile(path):
            raise NoCheckpoint(
                f"{path} is not there, which {mirror.path(layout.LAST_CHECKPOINT)} says to resume from: bring it back, "
                "or have that say another file, or remove that to start anew"
            )
        with store.create(draft) as sink:
            for piece in mirror.files.download(path):
                sink.write(piece)
                digest.update(piece)
                size_bytes += len(piece)
    except DistckptError:
        raise
    except Exception as error:  # of whatever library
        raise DistckptError(f"{path} cannot be fetched: {type(error).__name__}: {error}") from error
    return size_bytes, digest.hexdigest()


def _check(draft: Path, path: str) -> None:
    try:
        with zipfile.ZipFile(draft) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise DamagedCheckpoint(f"{path} is not whole: {error}") from error
    if wrong is not None:
        raise DamagedCheckpoint(f"{path} is damaged, in {wrong}")


def _is_further(store: LocalStore, record: Record) -> bool:
    """Whether ``record`` is of the run that the directory goes on with, and of a later step."""
    name = Pointer(store).name()
    try:
        here = read_record(store, name or "")
    except (OSError, DistckptError):
        return False
    return here.run == record.run and here.progress.step < record.progress.step


@dataclass(frozen=True)
class _Told:
    """What a file of a run says of itself."""

    run: str
    progress: Progress
    known: Mapping[str, Any]

    @classmethod
    def read(cls, draft: Path) -> _Told | None:
        """None for a file of no run, as stock MMEngine writes them, and one that could only be unpickled."""
        try:
            held = open_pth(draft).value
            known, meta = held["message_hub"]["runtime_info"], held["meta"]
            return cls(str(known[message_hub.RUN]), Progress(int(meta["iter"]), int(meta["epoch"])), known)
        except (DistckptError, KeyError, TypeError, ValueError) as error:
            _log.debug("%s is no file of a run: %s", draft, error)
            return None

    def record(self, store: Store, name: str, size_bytes: int, digest: str, reasons: tuple[str, ...]) -> Record:
        """The record of that file, as the newest in ``store``."""
        newest = [one.order for one in scan(store).records][-1:]
        attempt, serial = newest[0] if newest else (0, -1)
        return Record(
            name=name,
            progress=self.progress,
            format="pth",
            world_size=1,
            reasons=reasons,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            run=self.run,
            attempt=attempt,
            serial=serial + 1,
            total_bytes=size_bytes,
            content_bytes=size_bytes,
            content_xxh3_128=digest,
        )

    def reasons(self, name: str, filename_tmpl: str) -> tuple[str, ...]:
        """Why it was saved, as far as that matters."""
        ids = self._ids()
        return (INTERVAL,) if ids is None or name in map(filename_tmpl.format, ids) else (LAST,)

    def others(self, mirror: Mirror, filename_tmpl: str) -> list[str]:
        """What else was at the other place when the file was written."""
        names = [filename_tmpl.format(one) for one in self._ids() or ()]
        for key, path in self.known.items():
            name = PurePosixPath(path).name if isinstance(path, str) else ""
            if key.startswith("best_ckpt") and mirror.path(name) == path:
                names.append(name)
        return names

    def _ids(self) -> list[Any] | None:
        """The periodic files that were kept; None where all were."""
        ids = self.known.get(message_hub.KEEP_CKPT_IDS)
        return ids if isinstance(ids, list) else None

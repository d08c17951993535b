"""Which checkpoints exist: they do if and only if their record does.

Written bottom-up (data, manifest, record), deleted top-down (record, folder). A folder or file without a record is
no checkpoint: it is being written, or was left by a save that did not end.
"""

from __future__ import annotations

import errno
import logging
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any

from distckpt import layout, strict_json
from distckpt.attempt import Attempt
from distckpt.errors import DamagedCheckpoint, NewerVersion, RestoreError
from distckpt.manifest import FileEntry, Manifest, Record, digest
from distckpt.progress import Progress
from distckpt.stores import Store

_log = logging.getLogger("distckpt")

# Not there, not a file, a link to somewhere else, larger than it can be, or bytes that the disk has lost.
_LASTING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENXIO, errno.EFBIG, errno.EIO}

_FILES_LEFT = (layout.DRAFT_PREFIX, layout.SPARE_PREFIX)

_IN_BOTH = {one.name for one in fields(Record)} & {one.name for one in fields(Manifest)} - {"version"}


@dataclass(frozen=True)
class Draft:
    """A place that one save has for itself. ``path`` is where it writes, ``name`` what it will be called."""

    name: str
    path: str
    is_folder: bool


@dataclass(frozen=True)
class Listing:
    """What one look at a directory found: records from the oldest to the newest, and records that say nothing."""

    records: list[Record]
    unreadable: Mapping[str, RestoreError] = field(default_factory=dict)


def scan(store: Store) -> Listing:
    """The checkpoints in ``store``; one listing, and one small read for each."""
    records: list[Record] = []
    unreadable: dict[str, RestoreError] = {}
    for entry in store.list():
        name = layout.recorded_by(entry)
        if name is None:
            continue
        try:
            records.append(read_record(store, name))
        except FileNotFoundError:
            continue  # deleted since the listing
        except RestoreError as error:
            unreadable[name] = error
    return Listing(sorted(records, key=lambda record: record.order), unreadable)


def read_record(store: Store, name: str) -> Record:
    """The record of ``name``.

    Raises:
        FileNotFoundError: where it is not committed.
        DamagedCheckpoint, NewerVersion: where the record cannot be read.
        OSError: where it cannot be read now, and may be later.
    """
    path = layout.record_of(name)
    try:
        record = Record.from_json(store.read(path), path)
    except FileNotFoundError:
        raise
    except (OSError, EOFError) as error:
        if is_passing(error):
            raise
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error
    if record.name != name:
        raise DamagedCheckpoint(f"{path} is the record of {ascii(record.name)[:80]}")
    return record


def read_manifest(store: Store, record: Record) -> Manifest:
    """The manifest that ``record`` binds; for a checkpoint of one file, what the record says of that file.

    Raises:
        DamagedCheckpoint, NewerVersion: where it is not there, or not what was committed.
        OSError: where it cannot be read now, and may be later.
    """
    if layout.StepName.parse(record.name) is None:
        file = FileEntry(record.name, record.content_bytes, record.content_xxh3_128)
        return _manifest_of_file(record, file)
    path = f"{record.name}/{layout.MANIFEST}"
    try:
        data = store.read(path)
    except (OSError, EOFError) as error:
        if is_passing(error):
            raise
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error
    if len(data) != record.content_bytes or digest(data) != record.content_xxh3_128:
        raise DamagedCheckpoint(f"{path} is not the one that was committed")
    return Manifest.from_json(data, path)


def is_passing(error: OSError | EOFError) -> bool:
    """Whether what could not be read now may be read later: such an error is no damage, and taking it for one would
    send a run back to an older checkpoint, and later delete the newer."""
    return isinstance(error, OSError) and error.errno not in _LASTING


class Catalog:
    """The checkpoints of one run, and the right to change them. Leader only."""

    def __init__(self, store: Store, attempt: Attempt) -> None:
        self.store = store
        self.attempt = attempt
        self._serial = 0

    def scan(self) -> Listing:
        return scan(self.store)

    def begin(self, progress: Progress, file_name: str | None = None) -> Draft:
        """A fresh place to write to, which no other save ever had: a folder, or the draft of ``file_name``.

        Raises:
            Superseded: where a newer attempt has taken over.
        """
        self.attempt.check()
        if file_name is not None:
            path = f"{layout.DRAFT_PREFIX}{file_name}-{self.attempt.number}.{secrets.token_hex(4)}"
            return Draft(file_name, path, is_folder=False)
        taken = {layout.recorded_by(entry) or entry for entry in self.store.list()}
        name = layout.StepName(progress.step)
        while str(name) in taken:
            name = replace(name, take=name.take + 1)
        self.store.make_folder(str(name))
        claim = {"run": self.attempt.run, "attempt": self.attempt.number, "since": _now()}
        self.store.publish(f"{name}/{layout.CLAIM}", strict_json.dump(claim))
        return Draft(str(name), str(name), is_folder=True)

    def commit(self, draft: Draft, manifest: Manifest) -> Record:
        """The checkpoint exists from now on, and outlives a power cut. Its data must be durable before.

        Raises:
            Superseded: where a newer attempt has taken over; nothing is published then.
            OSError: where it could not be published. If the record is there all the same, only its durability is
                unknown; it is left alone.
        """
        self.attempt.check()
        self._serial += 1
        manifest = replace(
            manifest, run=self.attempt.run, attempt=self.attempt.number, serial=self._serial, created=_now()
        )
        if draft.is_folder:
            content = manifest.to_json()
            # Replaces none: the name may be that of a checkpoint of a newer attempt by now, which has swept our folder.
            self.store.publish(f"{draft.path}/{layout.MANIFEST}", content)
            self.store.settle(draft.path)
            self.store.settle()
            record = _record(draft.name, manifest, len(content), digest(content))
            self.attempt.check()
        else:
            (file,) = manifest.files
            record = _record(draft.name, manifest, file.size_bytes, file.xxh3_128)
            self._replace_file(draft)
        self.store.publish(layout.record_of(draft.name), record.to_json())
        return record

    def relabel(self, record: Record) -> None:
        """The record on disk says what ``record`` says, if it is still there.

        Raises:
            Superseded: where a newer attempt has taken over; nothing is changed then.
        """
        self.attempt.check()
        if not self.store.exists(layout.record_of(record.name)):
            return  # deleted since by retention: a record without its folder would be a damaged checkpoint
        self.store.put(layout.record_of(record.name), record.to_json())

    def alias(self, record: Record, name: str, *, reasons: tuple[str, ...], metrics: Mapping[str, float]) -> Record:
        """The file of ``record`` is a checkpoint under a second name too, with a record of its own. No byte is
        written again where the store knows hard links. An older checkpoint of that name is replaced.

        Raises:
            Superseded: where a newer attempt has taken over; nothing is changed then.
        """
        self.attempt.check()
        self._serial += 1
        own = replace(record, name=name, reasons=reasons, metrics={**record.metrics, **metrics}, serial=self._serial)
        self._forget(name)
        self.store.link(record.name, name)
        self.store.publish(layout.record_of(name), own.to_json())
        return own

    def abandon(self, draft: Draft) -> None:
        """What the draft holds is gone, unless it was committed after all.

        Raises:
            Superseded: where a newer attempt has taken over; the left-overs are for it to sweep, and the name may be
                that of a save of its own.
        """
        self.attempt.check()
        if self.store.exists(layout.record_of(draft.name)) and draft.is_folder:
            return
        if draft.is_folder:
            self._discard(draft.path)
        else:
            self.store.delete(draft.path)

    def delete(self, record: Record) -> None:
        """The checkpoint is no more: first its record, durably, then what it named.

        Raises:
            Superseded: where a newer attempt has taken over; nothing is deleted then.
        """
        self.attempt.check()
        if layout.StepName.parse(record.name) is not None:
            self.store.delete(layout.record_of(record.name))
            self.store.settle()
            self._discard(record.name, is_reusable=True)
        else:
            # A file has no claim in it: until it is gone, its record in the trash says that it was ours.
            trash = f"{layout.TRASH_PREFIX}{layout.record_of(record.name)}"
            self.store.move(layout.record_of(record.name), trash)
            self.store.settle()
            self._finish(trash, record.name)

    def sweep(self) -> list[str]:
        """What saves that did not end have left is gone, and was so much. Only between saves, and only what this run
        claimed: a folder of anybody else is not ours to judge.

        Raises:
            Superseded: where a newer attempt has taken over; nothing is deleted then.
        """
        self.attempt.check()
        entries = self.store.list()
        left = [entry for entry in entries if entry.startswith((*_FILES_LEFT, layout.TRASH_PREFIX))]
        for entry in entries:
            if layout.StepName.parse(entry) and layout.record_of(entry) not in entries and self._is_ours(entry):
                left.append(entry)
        if left:
            # A record whose removal is not durable must not come back without its folder.
            self.store.settle()
        for entry in left:
            if entry.startswith(_FILES_LEFT):
                self.store.delete(entry)
            elif (name := layout.recorded_by(entry.removeprefix(layout.TRASH_PREFIX))) is not None:
                self._finish(entry, name)
            else:
                self._discard(entry)
        return left

    def _is_ours(self, folder: str) -> bool:
        try:
            inside = self.store.list(folder)
        except NotADirectoryError:
            return False
        if all(entry.startswith(layout.DRAFT_PREFIX) for entry in inside):
            return True  # killed before it had its claim; a live save fails at its next step, and says so
        try:
            claim = strict_json.load(self.store.read(f"{folder}/{layout.CLAIM}"), layout.CLAIM)
        except (OSError, EOFError, ValueError):
            return False
        number = claim.get("attempt")
        return claim.get("run") == self.attempt.run and type(number) is int and number <= self.attempt.number

    def _discard(self, folder: str, *, is_reusable: bool = False) -> None:
        trash = folder
        if not folder.startswith(layout.TRASH_PREFIX):
            trash = f"{layout.TRASH_PREFIX}{folder}-{secrets.token_hex(4)}"
            self.store.move(folder, trash)
            # Else a power cut could bring the old name back, with the claim gone that says whose it is.
            self.store.settle()
        if is_reusable:
            self.store.recycle_folder(trash)
        else:
            self.store.delete_folder(trash)

    def _finish(self, trash: str, name: str) -> None:
        if not self.store.exists(layout.record_of(name)):  # else it was saved again since
            self.store.delete(name)
            self.store.settle()
        self.store.delete(trash)

    def _replace_file(self, draft: Draft) -> None:
        record = layout.record_of(draft.name)
        old = self.store.read(record) if self.store.exists(record) else None
        try:
            self._forget(draft.name)
            self.store.move(draft.path, draft.name)
        except OSError:
            # While the draft is there the old file is, too, and stays a checkpoint. Where even that cannot be written
            # the error that came first is told.
            if old is not None and self.store.exists(draft.path):
                with suppress(OSError):
                    self.store.put(record, old)
            raise
        self.store.settle()

    def _forget(self, name: str) -> None:
        # The old file must not stand under the new record, nor the new one under the old.
        if self.store.exists(layout.record_of(name)):
            self.store.delete(layout.record_of(name))
            self.store.settle()


def refuse_newer(listing: Listing) -> None:
    """Every record could be of this or an older version.

    Raises:
        NewerVersion: passing over a newer one in silence would take the run back without a word.
    """
    for error in listing.unreadable.values():
        if isinstance(error, NewerVersion):
            raise error


def _record(name: str, manifest: Manifest, content_bytes: int, content_xxh3_128: str) -> Record:
    return Record(
        name=name,
        total_bytes=manifest.total_bytes,
        content_bytes=content_bytes,
        content_xxh3_128=content_xxh3_128,
        **_said_by_both(manifest),
    )


def _manifest_of_file(record: Record, file: FileEntry) -> Manifest:
    return Manifest(files=(file,), **_said_by_both(record))


def _said_by_both(one: Manifest | Record) -> dict[str, Any]:
    """What a record repeats of its manifest, so that a listing need not read manifests."""
    return {name: getattr(one, name) for name in _IN_BOTH}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")

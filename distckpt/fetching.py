"""What a run left at another place, brought to a directory that has nothing to resume from."""

from __future__ import annotations

import logging
import os
import secrets
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from distckpt import layout, message_hub
from distckpt.errors import DamagedCheckpoint, DistckptError, NoCheckpoint
from distckpt.formats.pth import open_pth
from distckpt.linked_keeping import LAST
from distckpt.manifest import Record
from distckpt.mirror import Mirror
from distckpt.pointer import Pointer
from distckpt.progress import Progress
from distckpt.stores.local import LocalStore

_log = logging.getLogger("distckpt")


def fetch(directory: str, mirror: Mirror, filename_tmpl: str) -> None:
    """The file that ``last_checkpoint`` says at the other place is in ``directory``, whole and durably, as a
    checkpoint of the run that wrote it, and ``last_checkpoint`` here says it. Where there is none at the other place,
    nothing happens. Leader only.

    Raises:
        NoCheckpoint: naming the file that is not there.
        DamagedCheckpoint: where it is not whole there.
        DistckptError: where the other place cannot be read.
    """
    name = _pointed(mirror)
    if name is None:
        return
    store = LocalStore(directory)
    _log.warning("%s holds nothing to resume from: %s is fetched", directory, mirror.path(name))
    draft = f"{layout.DRAFT_PREFIX}{name}-{secrets.token_hex(4)}"
    try:
        size_bytes, digest = _download(mirror, name, store, draft)
        _check(Path(directory) / draft, mirror.path(name))
        meta, known = _said_in(Path(directory) / draft)
        store.delete(layout.record_of(name))
        store.settle()
        store.move(draft, name)
        store.settle()
    finally:
        store.delete(draft)
    if known.get(message_hub.RUN):
        record = _record(name, size_bytes, digest, meta, known, filename_tmpl)
        store.publish(layout.record_of(name), record.to_json())
        mirror.inherit(record.run, record, [one for one in _others(mirror, known, filename_tmpl) if one != name])
    Pointer(store).set(os.path.join(directory, name))  # noqa: PTH118  as MMEngine spells it


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


def _said_in(draft: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The ``meta`` of the file and what its message hub knew; nothing of one that could only be unpickled."""
    try:
        held = open_pth(draft).value
        return held["meta"], held["message_hub"]["runtime_info"]
    except (DistckptError, KeyError, TypeError) as error:
        _log.debug("%s is left as it is: %s", draft, error)
        return {}, {}


def _record(
    name: str, size_bytes: int, digest: str, meta: Mapping[str, Any], known: Mapping[str, Any], filename_tmpl: str
) -> Record:
    ids = known.get(message_hub.KEEP_CKPT_IDS)
    is_counted = not isinstance(ids, list) or name in [filename_tmpl.format(one) for one in ids]
    return Record(
        name=name,
        progress=Progress(int(meta["iter"]), int(meta["epoch"])),
        format="pth",
        world_size=1,
        reasons=("interval",) if is_counted else (LAST,),
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        run=str(known[message_hub.RUN]),
        attempt=0,
        serial=0,
        total_bytes=size_bytes,
        content_bytes=size_bytes,
        content_xxh3_128=digest,
    )


def _others(mirror: Mirror, known: Mapping[str, Any], filename_tmpl: str) -> list[str]:
    """What else is up, as the file knew it."""
    ids = known.get(message_hub.KEEP_CKPT_IDS)
    names = [filename_tmpl.format(one) for one in ids] if isinstance(ids, list) else []
    for key, path in known.items():
        if key.startswith("best_ckpt") and isinstance(path, str) and mirror.path(PurePosixPath(path).name) == path:
            names.append(PurePosixPath(path).name)
    return names

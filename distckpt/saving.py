"""One save, whole: every rank cuts and writes its part, the leader commits, then what no rule keeps is deleted.

It runs in a background thread or on the training thread alike. All that ranks say to one another here is in
`together` and `from_leader`; what touches the disk is given no ranks to wait for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from distckpt.catalog import Catalog, Draft
from distckpt.chunks import Chunks
from distckpt.errors import DistckptError, RankFailure, SaveFailed
from distckpt.formats import Format, Staged, Written
from distckpt.manifest import FileEntry, Manifest, Record, TensorGroup
from distckpt.progress import Progress
from distckpt.ranks import Json, Ranks, from_leader, is_leader, to_leader, together
from distckpt.stores import Store

_log = logging.getLogger("distckpt")


@dataclass(frozen=True)
class Job:
    """One save, as one rank sees it.

    Attributes:
        snapshot: this rank's files; raises what went wrong when they were laid out, so that every rank learns it.
        file_name: how a checkpoint of one file is called; folders are called by their step.
        environment: goes to the manifest: versions, the commit of the training code.
    """

    progress: Progress
    reasons: tuple[str, ...]
    snapshot: Callable[[], Staged]
    metrics: Mapping[str, float] = field(default_factory=dict)
    file_name: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


class AfterCommit(Protocol):
    """What the leader does once a checkpoint exists: labels, retention, one line to the log.

    It is given the seconds of each phase, and the most that any rank measured: see `distckpt.formats.Written`.
    """

    def __call__(self, record: Record, seconds: Mapping[str, float], measures: Mapping[str, float]) -> None: ...


def save(
    job: Job, *, format: Format, store: Store, ranks: Ranks, catalog: Catalog | None, after: AfterCommit
) -> Record:
    """The checkpoint is committed, and every rank holds its record. Collective.

    Args:
        catalog: the right to commit; the leader's alone.

    Raises:
        SaveFailed: on every rank, with each failing rank's words. Nothing was committed, nothing committed was
            touched, and the next save starts afresh.
        Superseded: on every rank, where a newer attempt has taken the directory over.
    """
    what = f"save of step {job.progress.step}"
    clock = _Clock()
    draft: Draft | None = None
    if (planner := format.planner) is not None:
        # Where this save fails, which it does on all ranks, they agree anew before the next.
        was_due, planner.is_due = planner.is_due, True
    try:
        together(ranks, f"{what} (snapshot)", lambda: bool(job.snapshot()), all)
        draft = _to_draft(from_leader(ranks, f"{what} (begin)", lambda: _begin(catalog, job)))
        clock.lap("agree")
        told = to_leader(ranks, f"{what} (write)", lambda: _write(job, store, draft))
        clock.lap("write")
        record, is_planned = from_leader(
            ranks, f"{what} (commit)", lambda: _commit(catalog, draft, job, format, told, clock)
        )
        if planner is not None:
            planner.is_due = was_due or not is_planned
        clock.lap("commit")
    except DistckptError as failure:
        if draft is not None and catalog is not None:
            _abandon(catalog, draft)
        if isinstance(failure, RankFailure):
            raise SaveFailed(failure.during, failure.failures) from failure.__cause__
        raise
    finally:
        _release(job)
    committed = Record.from_json(record.encode(), "record")
    if is_leader(ranks):
        after(committed, clock.seconds, _most(told))
    return committed


def _begin(catalog: Catalog | None, job: Job) -> Json:
    draft = _owned(catalog).begin(job.progress, job.file_name)
    return [draft.name, draft.path, draft.is_folder]


def _to_draft(told: Json) -> Draft:
    name, path, is_folder = told
    return Draft(name, path, is_folder)


def _write(job: Job, store: Store, draft: Draft) -> Json:
    written = job.snapshot().write(store, draft.path)
    if draft.is_folder and written.files:
        store.settle(draft.path)  # each client of a network file system must do it for its own names
    return {
        "files": [[file.path, file.size_bytes, file.xxh3_128, file.digests] for file in written.files],
        "tensors": None if written.tensors is None else [_to_json(one) for one in written.tensors],
        "gone": written.gone,
        "measures": dict(written.measures),
    }


def _commit(catalog: Catalog | None, draft: Draft, job: Job, format: Format, told: list[Json], clock: _Clock) -> Json:
    """The record, and whether all ranks wrote what they had agreed on."""
    written = [_to_written(one) for one in told]
    manifest = Manifest(
        progress=job.progress,
        format=format.name,
        world_size=len(told),
        reasons=job.reasons,
        created="",
        run="",
        attempt=0,
        serial=0,
        files=tuple(file for one in written for file in one.files),
        tensors=format.tensors_of(written),
        metrics=job.metrics,
        seconds=clock.seconds,
        environment=job.environment,
        read_with=format.read_with,
    )
    if not draft.is_folder:
        manifest = replace(manifest, files=tuple(replace(file, path=draft.name) for file in manifest.files))
    record = _owned(catalog).commit(draft, manifest).to_json().decode()
    return [record, all(one.tensors is None for one in written)]


def _to_json(group: TensorGroup) -> Json:
    chunks = group.chunks and [group.chunks.files, group.chunks.offsets, group.chunks.sizes]
    return [group.files, group.dtype, group.shape, group.keys, chunks]


def _to_group(told: Json) -> TensorGroup:
    files, dtype, shape, keys, chunks = told
    return TensorGroup(tuple(files), dtype, tuple(shape), tuple(keys), chunks and Chunks(*map(tuple, chunks)))


def _to_written(told: Json) -> Written:
    tensors = None if told["tensors"] is None else tuple(map(_to_group, told["tensors"]))
    return Written(tuple(FileEntry(*one) for one in told["files"]), tensors, tuple(told["gone"]))


def _most(told: list[Json]) -> dict[str, float]:
    """The most that any rank measured."""
    names = dict.fromkeys(name for one in told for name in one["measures"])
    return {name: round(max(one["measures"].get(name, 0) for one in told), 6) for name in names}


def _release(job: Job) -> None:
    try:
        snapshot = job.snapshot()
    except Exception as error:  # it was never there, and every rank was told why
        _log.debug("there is no snapshot to release: %s", error)
        return
    try:
        snapshot.release()
    except BaseException:  # what was committed is, on all ranks
        _log.warning("the memory of a snapshot could not be given up", exc_info=True)


def _abandon(catalog: Catalog, draft: Draft) -> None:
    try:
        catalog.abandon(draft)
    except Exception as error:
        # The disk may be full or gone; what is left is no checkpoint, and a later sweep takes it.
        _log.warning("%s: what the failed save left could not be removed: %s", draft.path, error)


def _owned(catalog: Catalog | None) -> Catalog:
    assert catalog is not None, "the leader holds the catalog"
    return catalog


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._then = time.monotonic()

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = round(now - self._then, 6)
        self._then = now

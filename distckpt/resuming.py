"""One resume: which checkpoint it is, laid beside the state by every rank, read into it, and how exact that is."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from distckpt import layout
from distckpt.best import Metric, ranking
from distckpt.errors import DamagedCheckpoint, NoCheckpoint
from distckpt.formats import Snapshot
from distckpt.formats.known import get_format
from distckpt.initialising import Source, committed, open_modules
from distckpt.manifest import Record
from distckpt.matching import Matched, match
from distckpt.ranks import Ranks, from_leader, is_leader, to_leader
from distckpt.restoring import fit_together, restore_newest
from distckpt.run import Run
from distckpt.selection import Selection
from distckpt.state import Parts
from distckpt.stores.local import LocalStore

_log = logging.getLogger("distckpt")


def resume(run: Run, parts: Parts, selection: Selection, *, name: str | None, strict: bool) -> Record | None:
    """``parts`` hold what the checkpoint ``name``, or the newest that verifies, does, and this is its record; ``None``
    where nothing was ever committed. Collective. One log line says how exact it is.

    Raises:
        NoCheckpoint, NewerVersion, RankFailure: on all ranks, as in `distckpt.restoring.restore_newest`.
        StateMismatch: on all ranks, where it does not fit; nothing of it was put in then.
    """
    tried: list[Sequence[str]] = []

    def fit(snapshot: Snapshot, record: Record) -> Matched:
        is_same_world = record.world_size == run.ranks.world_size
        matched = match(parts, snapshot, selection, strict=strict, is_same_world=is_same_world)
        tried.append(matched.report.in_place)
        return matched

    restored = run.restore(fit, name=name)
    if restored is None:
        return None
    record, matched = restored.record, restored.fitted
    run.record = record
    run.saved = record.progress if not matched.report.left and matched.report.is_whole else None
    if is_leader(run.ranks):
        _log.info("%s", matched.exactness(record))
        if spoiled := {key for keys in tried for key in keys} - set(matched.report.loaded):
            told = ", ".join(sorted(spoiled)[:20])
            _log.warning(
                "%d hold what a damaged checkpoint does, and %s has none of: %s", len(spoiled), record.name, told
            )
    return record


def read_part(root: str | os.PathLike[str], ranks: Ranks, part: str, into: Any, *, name: str | None = None) -> bool:
    """``into`` holds what the checkpoint ``name``, or the newest that verifies, has of that part, if anything was ever
    committed, which is what is returned. Collective. Nothing else is read.

    Raises:
        NoCheckpoint, NewerVersion, RankFailure: on all ranks, as in `resume`.
    """
    parts = Parts({part: into}, per_rank=())

    def fit(snapshot: Snapshot, _: Record) -> Matched:
        return match(parts, snapshot, Selection(), strict=True, is_same_world=False)

    store = LocalStore(root)
    return restore_newest(ranks, fit, store=store, get_format=get_format, parts=[part], name=name) is not None


def start_from(source: str, ranks: Ranks, parts: Parts, selection: Selection, *, strict: bool) -> None:
    """The modules of ``parts`` hold what those in ``source`` do. Collective. Each rank reads what it needs, straight
    into its tensors.

    Raises:
        NoCheckpoint, DamagedCheckpoint, StateMismatch, RankFailure: on all ranks, as in `resume`.
    """
    if not parts.modules:
        raise ValueError("init_from: there is no module in state that could start from it")
    modules = Parts(parts.modules, per_rank=())

    def fit(snapshot: Snapshot, _: Record | None = None) -> Matched:
        return match(modules, snapshot, selection, strict=strict, is_same_world=False)

    place = from_leader(ranks, f"look at {source}", lambda: committed(source))
    if place is None:
        fitted = _read_in(source, ranks, modules, selection, fit)
    else:
        root, name = place
        names = list(modules.shared)
        restored = restore_newest(ranks, fit, store=LocalStore(root), get_format=get_format, parts=names, name=name)
        if restored is None:
            raise NoCheckpoint(f"init_from: {source} holds no committed checkpoint any more")
        fitted = restored.fitted
    if is_leader(ranks):
        _log.info("started from %s: %s", source, fitted.report)


def _read_in(
    source: str, ranks: Ranks, parts: Parts, selection: Selection, fit: Callable[[Snapshot], Matched]
) -> Matched:
    """What is no checkpoint in a run of ours is in the modules. Collective."""
    found: list[Source] = []
    to_leader(
        ranks, f"look into {source}", lambda: found.append(open_modules(source, parts.modules, selection, get_format))
    )
    (one,) = found
    fitted = fit_together(ranks, f"match of {source} with the state", lambda: fit(one.opened.snapshot))

    def read() -> None:
        try:
            one.opened.fill(fitted.targets)
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(
                f"{error}. The state is not what it was: something of {source} was read into it before"
            ) from error

    to_leader(ranks, f"read of {source}, of which the state holds a part now,", read)
    to_leader(ranks, f"load of {source}", fitted.apply)
    if is_leader(ranks):
        if one.left:
            counts = Counter(name.partition(".")[0] for name in one.left)
            _log.info("left in %s: %s", source, ", ".join(f"{count} of {word}" for word, count in counts.items()))
        for name, why in one.unread.items():
            _log.warning("%s: %s is not read: %s", source, name, why)
    return fitted


def name_of(which: str | int, records: Sequence[Record], metrics: Sequence[Metric]) -> str | None:
    """The name of the checkpoint that is meant; ``None`` for the newest.

    Raises:
        NoCheckpoint: where there is no best.
    """
    if which == "latest":
        return None
    if which == "best":
        if (best := best_of(records, metrics)) is None:
            raise NoCheckpoint("no checkpoint there has a metric of save_best")
        return best.name
    if isinstance(which, str):
        return which
    # Where the run was taken back there may be several of that step: the newest is meant.
    of_step = [record.name for record in records if record.progress.step == which]
    return of_step[-1] if of_step else str(layout.StepName(which))


def best_of(records: Sequence[Record], metrics: Sequence[Metric]) -> Record | None:
    """The best of ``records`` by the first of ``metrics``."""
    ranked = ranking(metrics[0], records) if metrics else []
    return ranked[0] if ranked else None

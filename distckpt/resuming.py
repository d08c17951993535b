"""One resume: which checkpoint it is, laid beside the state by every rank, read into it, and how exact that is."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from distckpt import layout
from distckpt.best import Metric, ranking
from distckpt.errors import NoCheckpoint
from distckpt.formats import Snapshot
from distckpt.formats.known import get_format
from distckpt.initialising import read_modules
from distckpt.manifest import Record
from distckpt.matching import Matched, match
from distckpt.ranks import Ranks, is_leader, together
from distckpt.restoring import fit_together
from distckpt.run import Run
from distckpt.selection import Selection
from distckpt.state import Parts

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


def start_from(source: str, ranks: Ranks, parts: Parts, selection: Selection, *, strict: bool) -> None:
    """The modules of ``parts`` hold what those in ``source`` do. Collective.

    Raises:
        NoCheckpoint, DamagedCheckpoint, StateMismatch, RankFailure: on all ranks, as in `resume`.
    """
    if not parts.modules:
        raise ValueError("init_from: there is no module in state that could start from it")
    read: list[Snapshot] = []
    modules = Parts(parts.modules, per_rank=())
    together(ranks, f"read of {source}", lambda: read.append(read_modules(source, modules, get_format)))
    fitted = fit_together(
        ranks,
        f"match of {source} with the state",
        lambda: match(modules, read[0], selection, strict=strict, is_same_world=False),
    )
    together(ranks, f"load of {source}", fitted.apply)
    if is_leader(ranks):
        _log.info("started from %s: %s", source, fitted.report)


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

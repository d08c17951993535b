"""One training of a runner, as the hook sees it: its files, the best among them, and what a restart reads."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from distckpt import layout
from distckpt.best import Metric, ranking
from distckpt.buffers import sync_buffers
from distckpt.catalog import Catalog
from distckpt.contest import Contest, Verdict, is_link, links
from distckpt.copies import Copies
from distckpt.engine.memory import expected_bytes
from distckpt.engine.stager import Stager
from distckpt.errors import DistckptError
from distckpt.fetching import record_again
from distckpt.formats import Snapshot, Staged
from distckpt.formats.known import get_format
from distckpt.formats.pth import Pth
from distckpt.hook_words import Extras
from distckpt.linked_keeping import LAST, LinkedKeeping
from distckpt.manifest import Record
from distckpt.mirror import Mirror
from distckpt.places import Place
from distckpt.pointer import Pointer
from distckpt.progress import Progress
from distckpt.publishing import publish
from distckpt.ranks import Json, from_leader, is_leader
from distckpt.ranks.process_group import detect
from distckpt.retention import BEST
from distckpt.run import Run
from distckpt.runner_state import capture, module_of, optimizer_in, to_plain
from distckpt.saving import Job
from distckpt.stores.local import LocalStore
from distckpt.writer import Writer

_log = logging.getLogger("distckpt")

_RAISED: Mapping[str, type[Exception]] = {"KeyError": KeyError, "TypeError": TypeError, "ValueError": ValueError}


class RunnerRun:
    """Everything is collective, unless it says otherwise.

    Attributes:
        id: the id of the run, which its files carry on.
        last: the last file that was written here; None before, and where the last save failed.
    """

    def __init__(
        self, work_dir: str, place: Place, contest: Contest, extras: Extras, *, by_epoch: bool, continues: str | None
    ) -> None:
        self.place = place
        self.contest = contest
        self._extras = extras
        self._stager = Stager()
        self._format = Pth()
        self._told_of_code = False
        self._errors = 0
        self._pointer = Pointer(LocalStore(work_dir))
        self._copies = None if place.mirror is None else self._new_copies(place.mirror)
        ranks = detect(extras.timeout)
        try:
            for folder in dict.fromkeys((place.directory, work_dir)):
                from_leader(ranks, f"creation of {folder}", LocalStore(folder).make_root)
            self.run = Run(
                LocalStore(place.directory),
                ranks=ranks,
                format=self._format,
                get_format=get_format,
                keeping=LinkedKeeping(
                    extras.keeping,
                    contest.best_by,
                    by_epoch=by_epoch,
                    pointed=self._pointer.name,
                    **({} if self._copies is None else {"follow": self._copies.follow}),
                ),
                timeout=extras.timeout,
                continues=continues,
            )
            self.id: str = from_leader(ranks, "name of the run", self._introduce)
        except DistckptError:
            ranks.close()
            raise

    @property
    def last(self) -> Record | None:
        self.run.collect()
        return self.run.record if self.run.saved is not None else None

    def reserve(self, runner: Any) -> None:
        """There is memory for what ``runner`` has to save, as far as that is known. Not collective."""
        if is_leader(self.run.ranks):
            self._stager.reserve(expected_bytes([module_of(runner.model), optimizer_in(runner)]))

    def close(self) -> None:
        """As `Run.close`; and the memory is given back.

        Raises:
            SaveFailed: on all ranks, if the last save failed.
        """
        try:
            self.run.close()
        finally:
            if self._copies is not None:
                self._copies.close(self._extras.timeout.total_seconds())
            self._stager.close()

    def path(self, name: str) -> str:
        """The path of the file ``name``, as people are told it. Not collective."""
        return self.place.path(name)

    def save(
        self,
        runner: Any,
        progress: Progress,
        reasons: Sequence[str],
        *,
        name: str,
        wins: Mapping[str, float],
        is_resumed_from: bool,
        **parts: bool,
    ) -> None:
        """The state of ``runner`` is in the file ``name``, or, with ``async_save``, will be.

        Args:
            wins: the metrics by which it is among the best, with its values: so many links are made to it.
            is_resumed_from: whether a restart should read it.
            parts: ``save_optimizer`` and ``save_param_scheduler``.

        Raises:
            SaveFailed: on all ranks, as in `Run.save`.
            RankFailure: on all ranks, where it was written, but what points to it was not, or its copies were not.
        """
        began = time.monotonic()
        self.run.collect()
        module = module_of(runner.model)
        sync_buffers([module], self._extras.buffers_mode, ranks=self.run.ranks, timeout=self._extras.timeout)
        job = Job(progress, tuple(reasons), lambda: self._take(runner, progress, parts), file_name=name)
        failed: list[Exception] = []

        def then(record: Record) -> None:
            try:
                self._point(record, wins, moves=is_resumed_from)
            except (OSError, DistckptError) as error:
                _log.warning("%s is saved, but not all that should point to it: %s", record.name, error)
                failed.append(error)

        self.run.save(job, began=began, wait=not self._extras.async_save, then=then)
        if not self._extras.async_save:
            from_leader(self.run.ranks, f"pointing to {name}", lambda: _raise(failed))

    def link(self, record: Record, wins: Mapping[str, float]) -> None:
        """The file of ``record`` is among the best by ``wins``, too: links are made to it, and no byte is written."""
        self._after(record, lambda: self._point(record, wins, moves=False))

    def promote(self, record: Record) -> None:
        """The file of ``record``, which was saved for being the best, is the last, too, and a restart reads it."""

        def work() -> None:
            self._catalog.relabel(record.with_metrics({}, (LAST,)))
            self._point(record, {}, moves=True)

        self._after(record, work)

    def catch_up(self) -> None:
        """What of this run should be at the other place is there, and what should not is not.

        Raises:
            RankFailure: on all ranks, where that could not be done.
        """
        if (copies := self._copies) is not None:
            seconds = self._extras.timeout.total_seconds()
            from_leader(self.run.ranks, f"copying to {self.place.out_dir}", lambda: copies.settle(seconds))

    def judge(self, reported: Mapping[str, object]) -> Verdict | None:
        """What rank 0's ``reported`` changes; None where that is empty.

        Raises:
            KeyError, TypeError, ValueError: on all ranks, as in `Contest`.
        """
        self.run.collect()  # a save in flight may be the best so far, which its link will say
        told = from_leader(self.run.ranks, "report of metrics", lambda: self._judge(reported))
        if told is None:
            return None
        if "raised" in told:
            self._errors += 1
            self.run.ranks.fork(f"error {self._errors}").close()  # the leader leaves last: who reads needs its store
            raise _RAISED[told["raised"]](told["words"])
        self.contest.best_by.asked = tuple(Metric(name, rule) for name, rule in told["metrics"])
        return Verdict(told["wins"], tuple(told["tops"]))

    def standing(self, elsewhere: Callable[[Metric], tuple[float, str] | None]) -> dict[str, tuple[float, str]]:
        """The best score by each metric, and the path of its file: of the links that are here, and of what rank 0
        knows from ``elsewhere``, the better."""
        held: dict[str, tuple[float, str]] = from_leader(
            self.run.ranks, "look for the best", lambda: self._standing(elsewhere)
        )
        return held

    def publish(self, paths: Collection[str | None], keys: Collection[str]) -> None:
        """Those of ``paths`` that are here are published beside themselves, stripped to ``keys``."""

        def work() -> None:
            names = [os.path.basename(path) for path in paths if path is not None]  # noqa: PTH119
            for name in dict.fromkeys(names):
                if self.run.store.exists(name):
                    told = publish(self._catalog, self._here(name), name, keys)
                    _log.info("%s is published as %s", name, self.path(told))
                    if self.place.mirror is not None:
                        self.place.mirror.send(told)

        from_leader(self.run.ranks, "publishing", work)

    def newest(self) -> Record | None:
        """The newest file of this run that is no link."""

        def work() -> Json:
            written = [record for record in self.run.own_records() if not is_link(record)]
            return written[-1].to_json().decode() if written else None

        told = from_leader(self.run.ranks, "look for the newest", work)
        return None if told is None else Record.from_json(told.encode(), "record")

    @property
    def _catalog(self) -> Catalog:
        assert self.run.catalog is not None, "the leader holds the catalog"
        return self.run.catalog

    def _after(self, record: Record, point: Callable[[], None]) -> None:
        def work() -> None:
            point()
            try:
                self.run.keep(self._catalog)
            except (OSError, DistckptError) as error:
                _log.warning("%s: what is not to be kept could not be deleted: %s", self.run.store.url, error)

        from_leader(self.run.ranks, f"pointing to {record.name}", work)

    def _introduce(self) -> str:
        run = self._catalog.attempt.run
        if (pointed := self._pointer.name()) is not None:
            record_again(self._catalog.store, self.place.directory, pointed, run)
        self._sweep_links()
        others = [record.name for record in self._catalog.scan().records if record.run != run]
        if others:
            _log.warning(
                "%s holds %d checkpoints of another training, %s to %s: they are not judged and not deleted, but a "
                "new one replaces the old one of its name",
                *(self.place.directory, len(others), others[0], others[-1]),
            )
        if self.place.mirror is not None:
            self.place.mirror.start(run)
        return run

    def _sweep_links(self) -> None:
        """Of links and their records, one without the other is gone: what a killed process left beside the file that
        it shares, and what belonged to a file that somebody removed."""
        store = self.run.store
        for entry in store.list():
            if layout.is_best_file(entry) and entry.endswith(layout.RECORD_SUFFIX):  # they were not hidden at first
                store.move(entry, layout.record_of(entry.removesuffix(layout.RECORD_SUFFIX)))
        entries = store.list()
        for record in self.run.own_records():
            if is_link(record) and record.name not in entries:
                store.delete(layout.record_of(record.name))
            for entry in entries:
                is_loose = layout.is_best_file(entry) and layout.record_of(entry) not in entries
                is_its = entry.endswith(record.name) and _is_one_file(self._here(entry), self._here(record.name))
                if is_loose and is_its:
                    store.delete(entry)

    def _take(self, runner: Any, progress: Progress, parts: Mapping[str, bool]) -> Staged:
        leads = is_leader(self.run.ranks)
        checkpoint = capture(
            runner,
            progress,
            is_leader=leads,
            save_optimizer=parts["save_optimizer"],
            save_param_scheduler=parts["save_param_scheduler"],
        )
        left: list[str] = []
        state = {key: to_plain(value, key, left) for key, value in checkpoint.items()} if leads else {}
        if left and not self._told_of_code:
            self._told_of_code = True
            _log.warning("torch.load(weights_only=True) will not read the checkpoints, for: %s", ", ".join(left[:10]))
        return self._stager.take(self._format.lay_out(Snapshot(shared=state), self.run.ranks.rank))

    def _point(self, record: Record, wins: Mapping[str, float], *, moves: bool) -> None:
        try:
            for metric, value in wins.items():
                name = layout.best_file(metric, record.name)
                self._catalog.alias(record, name, reasons=(BEST,), metrics={metric: value})
        finally:
            if moves:
                self._pointer.set(self._here(record.name))
        if self._copies is not None:
            self._copies.make()

    def _new_copies(self, mirror: Mirror) -> Copies:
        def records() -> list[Record]:
            self._catalog.attempt.check()
            return self.run.own_records()

        seconds = self._extras.timeout.total_seconds()
        return Copies(
            mirror,
            self.contest,
            records=records,
            pointed=self._pointer.name,
            max_keep_ckpts=int(self._extras.keeping["max_keep_ckpts"]),
            writer=Writer("distckpt-copies", exit_seconds=seconds) if self._extras.async_save else None,
        )

    def _here(self, name: str) -> str:
        return os.path.join(self.place.directory, name)  # noqa: PTH118  as MMEngine spells it

    def _judge(self, reported: Mapping[str, object]) -> Json:
        if not reported:
            return None
        try:
            self.contest.best_by.settle(reported)
            verdict = self.contest.judge(reported, self.run.own_records())
        except (KeyError, TypeError, ValueError) as error:
            return {"raised": type(error).__name__, "words": str(error.args[0] if error.args else error)}
        return {
            "metrics": [[metric.name, metric.rule] for metric in self.contest.best_by.metrics],
            "wins": dict(verdict.wins),
            "tops": list(verdict.tops),
        }

    def _standing(self, elsewhere: Callable[[Metric], tuple[float, str] | None]) -> Json:
        known: dict[str, tuple[float, str] | None] = {}

        def remembered(metric: Metric) -> tuple[float, str] | None:
            if metric.name not in known:
                known[metric.name] = self._found(elsewhere(metric))
            return known[metric.name]

        def score_of(metric: Metric) -> float | None:
            return None if (found := remembered(metric)) is None else found[0]

        self.contest.elsewhere = score_of
        standing: dict[str, Json] = {}
        linked = links(self.run.own_records())
        for metric in self.contest.best_by.metrics:
            there, here = remembered(metric), ranking(metric, linked)[:1]
            if here and (there is None or not metric.is_better(there[0], here[0].metrics[metric.name])):
                standing[metric.name] = [here[0].metrics[metric.name], self.path(here[0].name)]
            elif there is not None:
                standing[metric.name] = list(there)
        return standing

    def _found(self, best: tuple[float, str] | None) -> tuple[float, str] | None:
        """``best`` with the path where its file is now; None where there is none."""
        if best is None:
            return None
        score, path = best
        name = os.path.basename(path)  # noqa: PTH119
        if self.run.store.exists(name):
            return score, self.path(name)
        mirror = self.place.mirror
        if mirror is not None and path == self.path(name):
            return best if mirror.files.isfile(path) else None
        return best if "://" in path or os.path.exists(path) else None  # noqa: PTH110


def _is_one_file(path: str, other: str) -> bool:
    return os.path.exists(other) and os.path.samefile(path, other)  # noqa: PTH110, PTH121


def _raise(errors: Sequence[Exception]) -> None:
    for error in errors:
        raise error

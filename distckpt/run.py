"""One process's part in a run: its hold on the directory, its ranks, its writer, and what became of each save."""

from __future__ import annotations

import logging
import platform
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Protocol

from distckpt import layout, progressions
from distckpt.agreeing import Request, Requests
from distckpt.attempt import Attempt, Holder
from distckpt.catalog import Catalog
from distckpt.errors import DistckptError, SaveFailed
from distckpt.formats import Format, Snapshot, Staged
from distckpt.manifest import Record
from distckpt.planning import plan
from distckpt.progress import Progress
from distckpt.ranks import Json, Ranks, from_leader, is_among, is_leader, together
from distckpt.restoring import F, Restored, restore_newest
from distckpt.saving import Job, save
from distckpt.stores import Store
from distckpt.telling import Teller
from distckpt.writer import Writer

_log = logging.getLogger("distckpt")

# For training to be stopped no longer than it takes to stage a little: the two would take the GIL from one another.
_HEAD_START_SECONDS = 0.02

_FAILURE = "failure of save"
_GRACE = timedelta(seconds=15)
_PROBE_SECONDS = 70.0  # network file systems may keep "not there" in mind for a minute


class Keeping(Protocol):
    """What is done to the checkpoints of a run once a new one exists."""

    def to_delete(self, records: Sequence[Record]) -> list[Record]:
        """Those that no rule keeps, of ``records`` from the oldest to the newest."""
        ...

    def label(self, catalog: Catalog, records: Sequence[Record]) -> None:
        """The labels on disk say what ``records`` say."""
        ...


class Run:
    """A run's directory, as one of its processes uses it. Every method is collective unless it says otherwise.

    Construction claims the directory, and finds out whether all ranks see it.

    Attributes:
        saved: the progress whose save is under way or committed; a failed one does not count.
        record: the last that was committed, or resumed from.
        catalog: the right to change the directory; the leader's alone.

    Args:
        format: how new checkpoints are written. ``get_format`` finds the one of an old checkpoint by its name.
        on_event: called on the leader with one record for each event, from the writer's thread.
        timeout: how long a rank waits for another before it gives it up, and training for a save to end.
        continues: see `Attempt.start`; the leader's is taken.

    Raises:
        DirectoryInUse: on all ranks, where another live process holds the directory.
        RankFailure: on all ranks, where the leader could not claim it otherwise, or a rank does not see it.
    """

    def __init__(
        self,
        store: Store,
        *,
        ranks: Ranks,
        format: Format,
        get_format: Callable[[str], Format],
        keeping: Keeping,
        timeout: timedelta,
        on_event: Callable[[Mapping[str, object]], None] | None = None,
        continues: str | None = None,
    ) -> None:
        self.store = store
        self.ranks = ranks
        self.timeout = timeout
        self._format = format
        self._get_format = get_format
        self._keeping = keeping
        self._teller = Teller(store, on_event)
        self.catalog = self._claim(continues)
        self.requests = Requests(ranks.fork("requests"), timeout)
        self._writer_ranks = ranks.fork("writer")
        self._writer = Writer("distckpt-writer", exit_seconds=timeout.total_seconds())
        self._saves = 0
        self._pending: _Pending | None = None
        self._failure: DistckptError | None = None
        self._damaged: set[str] = set()
        self._known: list[Record] = []
        self.saved: Progress | None = None
        self.record: Record | None = None
        self.is_closed = False

    def plan(self, capture: Callable[[], Snapshot]) -> None:
        """The ranks know who writes what of the next save, of a state like this one. Asks them only where they do not
        yet, or where the save before, which has ended, found that the state has become another.

        Raises:
            RankFailure: on all ranks, where the state of one cannot be stored, or they do not hold it whole and alike.
        """
        if (planner := self._format.planner) is None:
            return
        self.collect()
        if planner.is_due:
            plan(self.ranks, planner, capture)

    def save(
        self, job: Job, *, began: float, wait: bool = False, then: Callable[[Record], None] | None = None
    ) -> Record | None:
        """The save is under way in the background, and `settle` waits for it; with ``wait`` it is durable, and this
        is its record.

        Args:
            job: its ``snapshot`` is taken and staged now, on this thread, once the save before has ended and its
                memory is free. What that raises is raised on all ranks when the save is settled.
            began: ``time.monotonic()`` when training stopped for this save.
            then: what the leader does with the record, after the commit and before retention.

        Raises:
            SaveFailed: on all ranks, what became of the save before, if nobody was told yet: this one is under way all
                the same. With ``wait``, what became of this.
            TimeoutError: where the save before it has not ended in time; nothing is saved.
        """
        self.collect()
        self._saves += 1
        number = self._saves
        taken = _now(job.snapshot)
        staged: Future[float] = Future()

        def write() -> Record:
            wait_for([staged], _HEAD_START_SECONDS)
            told = replace(job, snapshot=taken.result)
            return self._save(number, told, then, began, None if wait else staged.result)

        self._pending = _Pending(number, job.progress, self._writer.submit(write), taken)
        try:
            if taken.exception() is None:
                taken.result().stage()
        finally:
            staged.set_result(time.monotonic() - began)
        self.saved = job.progress
        if wait:
            self.collect()
        self.raise_failure()
        return self.record if wait else None

    def settle(self, timeout: timedelta | None = None) -> Record | None:
        """The save in flight has ended within ``timeout`` (of the run, if ``None``), and this is the last record. On
        the leader its labels are on disk, too.

        Raises:
            SaveFailed: on all ranks, if it failed.
            TimeoutError: where it did not end in time; it goes on.
        """
        self.collect(timeout)
        self._writer.wait((self.timeout if timeout is None else timeout).total_seconds())
        self.raise_failure()
        return self.record

    def collect(self, timeout: timedelta | None = None) -> None:
        """As `settle`, but a failure is kept for `raise_failure`: what else is to be done comes first."""
        if self._pending is None:
            return
        pending = self._pending
        # Ranks that wait for one that is lost give it up after as long: what they say names it.
        timeout = self.timeout + _GRACE if timeout is None else timeout
        try:
            if pending.taken.exception() is None:
                pending.taken.result().settle()
            error = pending.future.exception(timeout.total_seconds())
        except TimeoutError:
            raise TimeoutError(f"save {pending.number} has not ended within {timeout}; it goes on") from None
        self._pending = None
        if error is None:
            self.record = pending.future.result()
            return
        self._failure = self._failure or _failure(pending.progress, self.ranks.rank, error)
        if self.saved == pending.progress:
            self.saved = None  # so that it is tried again

    def raise_failure(self) -> None:
        """No save has failed since the last call.

        Raises:
            SaveFailed: on all ranks, the first that did.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    @property
    def is_busy(self) -> bool:
        """Whether a save is in flight on this rank. Not collective."""
        return self._writer.is_busy

    def boundary(self, step: int) -> list[Request]:
        """What the leader asked all ranks to do at this step. A look at a flag, unless there is something.

        Where a save failed since, `raise_failure` raises it from now on, on all ranks.
        """
        due = self.requests.due(step)
        for request in due:
            if request.what == _FAILURE and self._pending is not None and str(self._pending.number) == request.why:
                self.collect()
        return [request for request in due if request.what != _FAILURE]

    def on_leader(self, work: Callable[[Catalog], None]) -> None:
        """The leader's writer does ``work`` after what it was given before. A failure of it is a warning: it changes
        labels, never what was saved. Not collective: on other ranks nothing happens."""
        if (catalog := self.catalog) is not None:
            self._writer.submit(lambda: self._teller.guard("labels", lambda: work(catalog)))

    def relabel(self, record: Record) -> None:
        """The record on disk will say what ``record`` says, and labels and retention follow."""
        self.record = record

        def rewrite(catalog: Catalog) -> None:
            catalog.relabel(record)
            self.keep(catalog)

        self.on_leader(rewrite)

    def restore(
        self,
        fit: Callable[[Snapshot, Record], F],
        *,
        name: str | None = None,
        parts: Collection[str] | None = None,
    ) -> Restored[F] | None:
        """As `restore_newest`, after the save in flight has ended."""
        self.settle()
        restored = restore_newest(
            self.ranks, fit, store=self.store, get_format=self._get_format, parts=parts, name=name
        )
        if restored is not None:
            self._damaged.update(restored.skipped)
        return restored

    def close(self) -> None:
        """What was submitted has ended, and the directory is free. Safe to call twice.

        Raises:
            SaveFailed: on all ranks, if the last save failed.
        """
        if self.is_closed:
            return
        self.is_closed = True
        try:
            self.settle()
        finally:
            self.requests.close()
            self._writer.close(self.timeout.total_seconds())
            if self.catalog is not None:
                self._teller.guard("end of the run", self.catalog.attempt.end)
            self._teller.guard("end of the run", self.ranks.close)

    def own_records(self) -> list[Record]:
        """The committed checkpoints of this run, from the oldest to the newest, without those that a resume found
        damaged: they are neither deleted nor counted. Leader only; on other ranks none.

        Raises:
            OSError: where they cannot be listed now.
        """
        if self.catalog is None:
            return []
        run = self.catalog.attempt.run
        self._known = [
            record for record in self.catalog.scan().records if record.run == run and record.name not in self._damaged
        ]
        return self._known

    def known_records(self) -> list[Record]:
        """As `own_records`, with what `relabel` was last told; where they cannot be listed now, with a warning, those
        that were the last time."""
        self._writer.wait(self.timeout.total_seconds())
        try:
            return self.own_records()
        except OSError as error:
            _log.warning("%s: its checkpoints cannot be listed now: %s", self.store.url, error)
            return self._known

    def keep(self, catalog: Catalog) -> None:
        """What no rule keeps is gone, labels point where they should, left-overs are swept. In the leader's writer."""
        mine = self.own_records()
        gone = self._keeping.to_delete(mine)
        for record in gone:
            catalog.delete(record)
            self._teller.tell("deleted", name=record.name)
        left = [record for record in mine if record not in gone]
        self._teller.guard("labels", lambda: self._keeping.label(catalog, left))
        catalog.sweep()

    def _claim(self, continues: str | None) -> Catalog | None:
        claimed: list[Attempt] = []

        def start() -> list[object]:
            claimed.append(Attempt.start(self.store, Holder.here(), continues=continues))
            return [claimed[0].run, claimed[0].number]

        # Not named here: ranks that were given different ones would not understand one another.
        _, number = from_leader(self.ranks, "claim of the directory", start)
        during = "look into the directory"
        counts = together(self.ranks, during, lambda: self._see(layout.attempt_file(number)), _on_one_machine)
        self.store.neighbours = next(count for count, ranks in counts if is_among(self.ranks.rank, ranks))
        return Catalog(self.store, claimed[0]) if claimed else None

    def _see(self, name: str) -> str:
        """This machine, which sees that file."""
        deadline = time.monotonic() + min(_PROBE_SECONDS, self.timeout.total_seconds() / 2)
        while not self.store.exists(name):
            if time.monotonic() > deadline:
                raise DistckptError(
                    f"{self.store.url} is not the directory that rank 0 writes to: its file {name} is not there. "
                    "All ranks need a directory on a file system that they share"
                )
            time.sleep(0.1)
        return platform.node()

    def _save(
        self,
        number: int,
        job: Job,
        then: Callable[[Record], None] | None,
        began: float,
        blocked: Callable[[], float] | None,
    ) -> Record:
        catalog = self.catalog

        def after(record: Record, seconds: Mapping[str, float], measures: Mapping[str, float]) -> None:
            durable = time.monotonic() - began
            if then is not None:
                self._teller.guard("labels", lambda: then(record))
            if catalog is not None:
                self._teller.guard("retention", lambda: self.keep(catalog))
            stopped = durable if blocked is None else blocked()
            self._teller.guard(
                "report",
                lambda: self._teller.tell_saved(record, seconds, measures, blocked=stopped, durable=durable),
            )

        try:
            return save(
                job,
                format=self._format,
                store=self.store,
                ranks=self._writer_ranks,
                catalog=catalog,
                after=after,
            )
        except BaseException as error:  # on this thread it ends no program: training learns of it, whatever it is
            why = str(_failure(job.progress, self.ranks.rank, error))
            if is_leader(self.ranks):
                self._teller.guard("report", lambda: self._teller.tell("failed", step=job.progress.step, why=why))
                self.requests.ask(Request(_FAILURE, str(number)))
            raise


def _on_one_machine(machines: list[Json]) -> Json:
    """With how many ranks they share a machine, and which ranks they are: as a rule it is the same for all."""
    of = Counter(machines)
    ranks = {count: [rank for rank, one in enumerate(machines) if of[one] == count] for count in set(of.values())}
    return [[count, progressions.told(found)] for count, found in ranks.items()]


@dataclass(frozen=True)
class _Pending:
    """A save that nobody has collected yet."""

    number: int
    progress: Progress
    future: Future[Record]
    taken: Future[Staged]


def _failure(progress: Progress, rank: int, error: BaseException) -> DistckptError:
    """What a save raised, as training is told of it."""
    if isinstance(error, DistckptError):
        return error
    failure = SaveFailed(f"save of step {progress.step}", {rank: f"{type(error).__name__}: {error}"})
    failure.__cause__ = error
    return failure


def _now(take: Callable[[], Staged]) -> Future[Staged]:
    """What ``take`` returned, or raised."""
    taken: Future[Staged] = Future()
    try:
        taken.set_result(take())
    except Exception as error:  # raised on all ranks, by the save that follows
        taken.set_exception(error)
    return taken

"""The front door: a checkpointer for a training loop of one's own."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from distckpt import policy, words
from distckpt.accelerator_state import is_accelerator
from distckpt.best import BestBy, Metric, parse_metrics
from distckpt.buffers import parse_mode
from distckpt.capturing import Capturing
from distckpt.catalog import scan
from distckpt.choosing import choose_format
from distckpt.engine.memory import expected_size
from distckpt.engine.stager import Mode, Stager
from distckpt.formats.known import get_format
from distckpt.judging import Judge
from distckpt.keeping import LabelledKeeping
from distckpt.manifest import Record
from distckpt.progress import Progress
from distckpt.ranks import from_leader, to_leader
from distckpt.ranks.process_group import detect
from distckpt.resuming import best_of, name_of, resume, start_from
from distckpt.run import Run
from distckpt.saver import Saver
from distckpt.schedule import Interval, Schedule
from distckpt.selection import Selection
from distckpt.state import Parts
from distckpt.step_body import StepBody
from distckpt.stores.local import LocalStore
from distckpt.triggers import Triggers

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.checkpoint.planner import SavePlanner

_log = logging.getLogger("distckpt")


class Checkpointer:
    """Saves what training would lose, when it is due, and resumes from the newest that is whole.

    Every rank constructs one with the same words, and calls its methods at the same steps. Rank 0 decides and writes;
    an error on any rank is raised on all of them.

    Args:
        out_dir: the run's directory, on a file system that all ranks share. One run, one directory.
        state: what to save: ``{name: object}``, each with ``state_dict`` and ``load_state_dict``; of a ``DataLoader``
            without these, how far it is (see `distckpt.loader_position`). Random number generators and progress are
            added. Construct it after wrapping the model (DDP, ``torch.compile``). Or an ``Accelerator`` of Hugging
            Face, after its ``prepare()``: everything that it prepared or that was registered with it.
        interval: when to save: a number of steps (of epochs with ``by_epoch``), a duration such as ``"15min"``, or a
            list of these. -1 means never.
        by_epoch: whether a number in ``interval`` and ``save_begin`` counts epochs (`step` with ``epoch_ends=True``).
        save_begin: the step or epoch at which the interval begins.
        save_last: whether `close` saves what was not saved yet.
        max_keep_ckpts: how many of the periodic checkpoints to keep; -1 means all.
        save_best, rule, greater_keys, less_keys: by which metrics checkpoints are best, as `CheckpointHook` has it.
        max_keep_best: how many of the best to keep, for each metric.
        keep_every: keep those at each multiple of so many steps for ever.
        keep_for: keep those younger than that, e.g. ``"7d"``.
        keep_bytes: the budget of the directory, e.g. ``"2TB"``. The oldest go first, never the newest or a best.
        format: ``"full"``: rank 0 writes one file for each part. ``"sharded"``: every rank writes what it has of
            tensors that are spread over ranks (FSDP, tensor parallel), and its share of those that are not; any number
            of ranks reads it. ``"auto"``: sharded where tensors are spread over ranks, or several ranks have more than
            2 GB to write; the log says so.
        planner: a ``SavePlanner`` of ``torch.distributed.checkpoint``: its ``create_local_plan``, ``lookup_object`` and
            ``transform_object`` decide which tensors are saved, and as what. The format is sharded then. A
            ``LoadPlanner`` is given to torch's own loading, with `distckpt.CheckpointReader`.
        writers_per_node: in the sharded format, how many ranks of a machine write what several ranks hold alike, where
            they share one disk. None: all.
        async_save: whether training goes on while a save is written.
        snapshot: ``"eager"``: a save stops training until the state is copied into host memory. ``"lazy"``: until that
            is copied which may change before the optimizer's next step; weights and moments are copied beside the next
            forward and backward, and the optimizer waits for them. ``"auto"``: lazy, unless training itself uses all
            cores of the CPU, where that would cost more. ``"paranoid"``: lazy, and every byte of it is compared with
            the live tensors afterwards. Before changing weights without an optimizer, call `wait_staged`.
        arena_bytes: how much host memory rank 0 may take for that; None: as much as the state. Where that is less
            than the state, a save stops training until all but so much is written.
        recycle: whether a save is written over the files of a checkpoint that retention has deleted, where nobody has
            them open: up to twice as fast on a local disk (ext4, XFS), which always holds one checkpoint more. Not
            where another machine may still read what is being deleted.
        when_busy: what a save does that is due before the last one is durable: ``"wait"`` for it, or ``"skip"``.
        sync_buffers: how buffers are made equal over ranks before a save: ``"mean"``, ``"broadcast"`` (both from
            rank 0 where they are integers) or False. It changes the buffers that training goes on with.
        per_rank: names in ``state`` that each rank has of its own. None: those that can be iterated over.
        init_from: a checkpoint, a run's directory, a file of weights, or a folder that another library saved (see
            `distckpt.foreign`), whose modules training starts from where ``out_dir`` is empty.
        on_event: called on rank 0 with a dict for each event, from the writer's thread.
        timeout: how long a rank waits for another, or for a save to end, before it gives up.

    Raises:
        TypeError, ValueError: naming the word that is wrong; for a word of another library, ours. The words that
            `CheckpointHook` has too raise the errors of its specification: AssertionError and KeyError as well.
        DirectoryInUse: on all ranks, where another live process saves into the directory.
        RankFailure: on all ranks, where the directory cannot be written, is a file, or is not seen by all ranks; or
            where several write a part each, and parameters of an optimizer are in no module of ``state``.
        RuntimeError: where a launcher started several processes that ``torch.distributed`` does not know of.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        state: Mapping[str, Any] | Accelerator,
        *,
        interval: Interval = -1,
        by_epoch: bool = False,
        save_begin: int = 0,
        save_last: bool = True,
        max_keep_ckpts: int = -1,
        save_best: str | list[str] | None = None,
        rule: str | list[str] | None = None,
        greater_keys: Sequence[str] | None = None,
        less_keys: Sequence[str] | None = None,
        max_keep_best: int = 1,
        keep_every: int | None = None,
        keep_for: str | timedelta | None = None,
        keep_bytes: str | int | None = None,
        format: Literal["auto", "full", "sharded"] = "auto",
        planner: SavePlanner | None = None,
        writers_per_node: int | None = None,
        async_save: bool = True,
        snapshot: Mode = "auto",
        arena_bytes: int | None = None,
        recycle: bool = False,
        when_busy: Literal["wait", "skip"] = "wait",
        sync_buffers: Literal["mean", "broadcast", False] = "mean",
        per_rank: Collection[str] | None = None,
        init_from: str | os.PathLike[str] | None = None,
        on_event: Callable[[Mapping[str, object]], None] | None = None,
        timeout: timedelta = timedelta(minutes=15),
        **unknown: object,
    ) -> None:
        words.refuse_unknown(unknown, inspect.signature(Checkpointer).parameters, "Checkpointer")
        policy.check({**locals()})
        schedule = Schedule.parse(interval, begin=save_begin)
        self._save_last = save_last
        self._best_by = BestBy(parse_metrics(save_best, rule, greater_keys, less_keys), max_keep_best)
        kept = dict(max_keep_ckpts=max_keep_ckpts, keep_every=keep_every, keep_for=keep_for, keep_bytes=keep_bytes)
        buffers_mode = parse_mode(sync_buffers)
        self._init_from = os.fspath(init_from) if init_from is not None else None
        self._parts = Parts(state, per_rank)
        self._accelerator: Any = state if is_accelerator(state) else None

        store = LocalStore(out_dir, recycles=recycle)
        ranks = detect(timeout)
        size = expected_size(self._parts.shared.values())
        chosen = choose_format(format, size, ranks, planner=planner, writers_per_node=writers_per_node)
        self._judge = Judge(self._best_by, ranks=ranks, records=lambda: self._run.known_records())
        keeping = LabelledKeeping(kept, self._best_by)
        self._stager = Stager(snapshot, arena_bytes=arena_bytes, modules=self._parts.modules.values())
        capturing = Capturing(self._parts, chosen, self._stager, ranks)
        to_leader(ranks, "look at the state", capturing.check)
        to_leader(ranks, "memory for snapshots", lambda: capturing.reserve(size))
        from_leader(ranks, "creation of the directory", store.make_root)
        self._run = Run(
            store,
            ranks=ranks,
            format=chosen,
            get_format=get_format,
            keeping=keeping,
            timeout=timeout,
            on_event=on_event,
        )
        self._ranks = ranks
        self._triggers = Triggers(schedule, self._run, by_epoch=by_epoch)
        self._saver = Saver(
            self._run,
            self._parts,
            capturing,
            triggers=self._triggers,
            buffers_mode=buffers_mode,
            is_async=async_save,
            skips=when_busy == "skip",
        )
        self._progress = Progress(0)
        self._metrics: Mapping[str, float] = {}
        self._body = StepBody()
        self._is_resumed = False
        self._holds_checkpoints = bool(from_leader(ranks, "look for checkpoints", lambda: bool(scan(store).records)))

    def resume(
        self,
        which: str | int = "latest",
        *,
        strict: bool = True,
        only: str | Collection[str] | None = None,
        exclude: str | Collection[str] | None = None,
        rename: Mapping[str, str] | None = None,
    ) -> int:
        """How many steps are done; the state is that of the checkpoint. Collective.

        An empty directory gives 0; then the modules of ``init_from`` are loaded, if it is given. One log line says how
        exact the resume is. Create the iterators of data loaders before: random number generators are set last.

        Args:
            which: ``"latest"``: the newest that verifies on all ranks; damaged ones are named and passed over.
                ``"best"``, a name such as ``"step-00012000"``, or a step: that one or an error.
            strict: whether every key of the state and of the checkpoint must have its counterpart.
            only, exclude: patterns of parts (``"model"``) or of keys in them (``"model.head.*"``) to load or to leave.
            rename: regular expressions for keys of modules in the checkpoint, and their replacements.

        Raises:
            NoCheckpoint: on all ranks, where checkpoints are there but none verifies, or ``which`` is not there.
            StateMismatch: on all ranks, where it is of another model. Nothing of it was put in.
            NewerVersion: on all ranks, where a newer distckpt wrote it.
            RankFailure: on all ranks, where one failed otherwise.
        """
        if not isinstance(which, (str, int)) or isinstance(which, bool):
            raise TypeError(f'which should be "latest", "best", a step or a name, is {which!r}')
        selection = Selection.parse(only, exclude, rename)
        name = from_leader(self._ranks, "choice of a checkpoint", lambda: name_of(which, *self._known()))
        record = resume(self._run, self._parts, selection, name=name, strict=strict)
        if record is not None:
            self._progress, self._metrics = record.progress, {}
            self._body.end()
            self._triggers.restart()
        elif self._init_from is not None:
            start_from(self._init_from, self._ranks, self._parts, selection, strict=strict)
        self._is_resumed = True
        return self._progress.step

    def start_at(self, step: int, *, epoch: int = 0) -> None:
        """So many steps, and whole epochs, were done elsewhere: what follows is counted on from there. In the place of
        `resume`, in a directory without checkpoints. Every rank; not collective."""
        if self._holds_checkpoints:
            raise RuntimeError(f"{self._run.store.url} holds checkpoints: resume() goes on from them")
        self._progress = Progress(step, epoch)
        self._is_resumed = True

    def step(
        self, *, epoch_ends: bool = False, at: Progress | None = None, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """One more training step is done; saves if that is due. Every rank, after each optimizer step. With an
        ``Accelerator`` it may be called after each batch: where gradients are only accumulated, no step is done.

        Args:
            epoch_ends: whether it was the last of its epoch.
            at: what is done by now, where somebody else counts, to whom several steps may be one, or none.
            metrics: those of this step, if there are any: as `report` takes them, but known before it is saved.

        Raises:
            SaveFailed: on all ranks at the same step, where a save failed since. Training may go on if it is caught.
            KeyError, TypeError: as in `report`.
        """
        self._require_ready()
        if self._accelerator is not None and not self._accelerator.sync_gradients and not epoch_ends:
            return
        if metrics:
            self._body.report(self._numbers(metrics))
        before = self._progress
        self._progress, self._metrics = at or Progress(before.step + 1, before.epoch + epoch_ends), {}
        reported, asked = self._body.end()
        ends = self._progress.epoch > before.epoch
        reasons = [*self._triggers.due(self._progress, epoch_ends=ends, before=before), *asked]
        if reported is not None and self._is_best(reported):
            reasons.append("best")
        if reasons:
            self._save(*dict.fromkeys(reasons))
        if any(asked.values()):
            self._run.settle()
        self._run.raise_failure()

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left until ``total`` are done, from 1: resumes, saves when due, closes at the end.

        A step whose body raised, or was left with ``break``, does not count as done and is not saved, not by `close`
        either: what there is then is no state of a step.
        """
        if isinstance(total, bool) or not isinstance(total, int) or total < 0:
            raise ValueError(f"steps({total!r}): should be the number of steps to train for in all")
        if not self._is_resumed:
            self.resume()
        while self._progress.step < total and not self._triggers.should_stop:
            self._body.begin(self._progress.step + 1)
            try:
                yield self._progress.step + 1
            except GeneratorExit:
                self._body.leave()
                raise
            self.step()
        self.close()

    def report(self, metrics: Mapping[str, Any]) -> None:
        """These are the metrics of the step that runs (in `steps`), else of the last step that is done. Collective.

        What is saved of that step, now or later, is labelled with them. What is not saved, is now, if it is a new
        best. Rank 0's values decide. NaN and infinities are never best.

        Raises:
            KeyError: where a metric of ``save_best`` is missing; the message names the nearest.
            TypeError: where it is no number.
            SaveFailed: as in `step`.
        """
        self._require_ready()
        self._body.require_whole()
        numbers = self._numbers(metrics)
        if self._body.is_open:
            self._body.report(numbers)
            return
        is_best = self._is_best(numbers)
        if self._run.saved == self._progress and self._run.record is not None:
            self._run.relabel(self._run.record.with_metrics(self._metrics, ("best",) if is_best else ()))
        elif is_best:
            self._save("best")
        self._run.raise_failure()

    def save(self, reason: str = "asked", *, wait: bool = False) -> None:
        """What is done so far is being saved, or already was; with ``wait`` it is durable. Collective.

        In the body of `steps` that is so when the body ends, for the step that runs.

        Raises:
            SaveFailed: on all ranks, where the save before it failed; with ``wait``, this one.
        """
        if not isinstance(reason, str) or not reason:
            raise TypeError(f"reason should be a word, is {reason!r}")
        self._body.require_whole()
        if self._body.is_open:
            self._body.ask(reason, wait=wait)
            return
        self._save(reason)
        if wait:
            self._run.settle()

    def prepare(self) -> None:
        """The ranks have agreed on who writes what of the state as it is now, which the first save would have them do:
        once all of it is there, such as the moments of the optimizer. Nothing where rank 0 writes all. Collective.

        Raises:
            RankFailure: on all ranks, where the state of one cannot be stored, or they do not hold it whole and alike.
        """
        self._require_ready()
        self._saver.prepare()

    def wait(self, timeout: timedelta | None = None) -> None:
        """The save in flight is durable, within ``timeout`` (of the checkpointer, if None). Collective.

        Raises:
            SaveFailed: on all ranks, if it failed.
            TimeoutError: where it did not end in time; it goes on.
        """
        self._run.settle(timeout)

    def wait_staged(self) -> None:
        """Weights may be changed: none is being copied any more. Optimizers, and ``load_state_dict`` of the modules in
        ``state``, wait by themselves; whoever changes them otherwise (``p.data.clamp_()``) calls this before. Not
        collective."""
        self._stager.wait_staged()

    def close(self) -> None:
        """All is saved that should be, durable, and the directory is free. Collective. Safe to call twice.

        Raises:
            SaveFailed: on all ranks, if the last save failed.
        """
        try:
            if self._save_last and not self._run.is_closed:
                if self._body.is_open:
                    _log.warning("%s; it is not saved", self._body.left_words())
                elif self._progress.step > 0:
                    self._save("last")
            if not self._run.is_closed:
                self._triggers.end()
        finally:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._end()  # what the failed step left of the state is not worth keeping

    @property
    def should_stop(self) -> bool:
        """Whether all ranks agreed to stop after this step; its state is saved then. Not collective."""
        return self._triggers.should_stop

    @property
    def latest(self) -> Record | None:
        """The newest committed checkpoint. Not collective; one listing of the directory."""
        records = scan(self._run.store).records
        return records[-1] if records else None

    @property
    def best(self) -> Record | None:
        """The best committed checkpoint by the first metric of ``save_best``. Not collective; one listing."""
        return best_of(*self._known())

    def _require_ready(self) -> None:
        if self._run.is_closed:
            raise RuntimeError(
                "this checkpointer is closed: steps() closes it at its end, so report() and save() before"
            )
        if self._holds_checkpoints and not self._is_resumed:
            raise RuntimeError(
                f"{self._run.store.url} holds checkpoints: call resume() before the first step or save, or give a new "
                "run a directory of its own"
            )

    def _save(self, *reasons: str) -> None:
        self._require_ready()
        self._saver.save(self._progress, reasons, self._metrics)

    def _end(self) -> None:
        try:
            self._run.close()
        finally:
            self._stager.close()

    def _numbers(self, metrics: Mapping[str, Any]) -> dict[str, float | None]:
        if not isinstance(metrics, Mapping) or not all(isinstance(key, str) for key in metrics):
            raise TypeError(f"metrics are a dict of names and numbers, got {metrics!r}")
        return self._judge.numbers(metrics)

    def _is_best(self, numbers: Mapping[str, float | None]) -> bool:
        self._run.collect()  # a save in flight may be the best so far, which its record will say
        verdict = self._judge.judge(numbers)
        self._metrics = {**self._metrics, **verdict.metrics}
        return verdict.is_best

    def _known(self) -> tuple[list[Record], tuple[Metric, ...]]:
        return scan(self._run.store).records, self._best_by.metrics

"""The specified hook: checkpoints for MMEngine's runner, and for any that has a few of its attributes."""

from __future__ import annotations

import inspect
import logging
import os
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from distckpt import hook_words, layout, message_hub
from distckpt.best import AUTO, DEFAULT_GREATER_KEYS, DEFAULT_LESS_KEYS, AutoMetric, BestBy, parse_keys, parse_metrics
from distckpt.contest import Contest, Verdict
from distckpt.errors import DistckptError
from distckpt.fetching import make_ready
from distckpt.linked_keeping import LAST, is_periodic
from distckpt.places import Place, is_url, open_place
from distckpt.progress import Progress
from distckpt.ranks import from_leader
from distckpt.ranks.process_group import detect
from distckpt.retention import BEST
from distckpt.runner_run import RunnerRun
from distckpt.runner_state import check_strategy, is_built, optimizer_of, to_histories
from distckpt.schedule import Schedule
from distckpt.sharded_runner import ShardedRunner
from distckpt.triggers import Triggers
from distckpt.words import check_flags, refuse_unknown

_log = logging.getLogger("distckpt")


class CheckpointHook:
    """Saves checkpoints of a runner periodically, at the end, and when a metric is the best so far.

    Each is one file that ``torch.load(weights_only=True)`` opens. It exists once its ``.committed`` record does; what
    is the best is a hard link to it. Nothing is deleted before the newer one is durable, nor what this run did not
    write.

    A runner has ``work_dir``, ``model``, ``epoch``, ``iter``, ``max_epochs``, ``max_iters`` and ``logger``, and may
    have ``optim_wrapper`` or ``optimizer``, ``param_schedulers``, ``message_hub``, ``call_hook``, ``cfg``, ``seed``,
    ``experiment_name``, ``train_dataloader``, as MMEngine's has. Every rank calls each method at the same point.

    Args:
        interval: the period in epochs, or iterations; -1 means never. A duration such as ``"15min"``, or a list, too.
        by_epoch: whether epochs are counted, or iterations.
        save_optimizer, save_param_scheduler: whether their state is saved.
        out_dir: the directory in which one that is called as ``work_dir`` is gets the files; None means ``work_dir``.
            With a backend, or where it is a URL, they are written to ``work_dir`` and copied there.
        max_keep_ckpts: how many periodic files are kept; -1 means all.
        save_last: whether the last state is saved in any case.
        save_best, rule, greater_keys, less_keys: by which metrics files are the best; ``"auto"`` means the first.
        file_client_args, backend_args: as MMEngine has them; ``{"backend": "fsspec", ...}`` is for all file systems of
            fsspec, with their storage options.
        filename_tmpl: how files are called, with one ``{}`` for the epoch or iteration.
        published_keys: after training the last and the best are published, with these keys only.
        save_begin: the epoch or iteration at which saving begins.
        async_save: whether training goes on while a file is written.
        sync_buffers: how buffers are made equal over ranks before a save: ``"mean"``, ``"broadcast"`` or False.
        timeout: how long a rank waits for another, or for a save, before it gives up.
        max_keep_best, keep_every, keep_for, keep_bytes: as `Checkpointer` has them.
        format: ``"pth"``, or ``"sharded"``: every rank writes its part of what is cut over ranks (FSDP), into the
            directories of `Checkpointer`. See `distckpt.sharded_runner`.

    Raises:
        TypeError, ValueError, AssertionError, KeyError: naming the word that is wrong; for a word of another library,
            ours.
    """

    priority = "VERY_LOW"

    _default_greater_keys = DEFAULT_GREATER_KEYS
    _default_less_keys = DEFAULT_LESS_KEYS

    def __init__(
        self,
        interval: int = -1,
        by_epoch: bool = True,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        out_dir: str | os.PathLike[str] | None = None,
        max_keep_ckpts: int = -1,
        save_last: bool = True,
        save_best: str | list[str] | None = None,
        rule: str | list[str] | None = None,
        greater_keys: Sequence[str] | None = None,
        less_keys: Sequence[str] | None = None,
        file_client_args: dict[str, Any] | None = None,
        filename_tmpl: str | None = None,
        backend_args: dict[str, Any] | None = None,
        published_keys: str | Sequence[str] | None = None,
        save_begin: int = 0,
        **kwargs: Any,
    ) -> None:
        refuse_unknown(kwargs, [*inspect.signature(CheckpointHook).parameters, *hook_words.OURS], "CheckpointHook")
        if file_client_args is not None:
            _log.warning('"file_client_args" will be deprecated in future. Please use "backend_args" instead')
            if backend_args is not None:
                raise ValueError('"file_client_args" and "backend_args" cannot be set at the same time.')
        check_flags(
            by_epoch=by_epoch,
            save_optimizer=save_optimizer,
            save_param_scheduler=save_param_scheduler,
            save_last=save_last,
        )
        self.interval, self.by_epoch, self.save_begin = interval, by_epoch, save_begin
        self.save_optimizer, self.save_param_scheduler = save_optimizer, save_param_scheduler
        self.save_last, self.max_keep_ckpts = save_last, max_keep_ckpts
        self.file_client_args, self.backend_args = file_client_args, backend_args
        self.args = kwargs
        self._schedule = Schedule.parse(interval, begin=save_begin)
        self.filename_tmpl = hook_words.parse_template(filename_tmpl, by_epoch=by_epoch)
        self.published_keys = hook_words.parse_published_keys(published_keys)
        self._asked_dir = self.out_dir = hook_words.parse_out_dir(out_dir)
        self._extras = hook_words.Extras.parse(max_keep_ckpts, kwargs)
        self.greater_keys = parse_keys(greater_keys, self._default_greater_keys, "greater_keys")
        self.less_keys = parse_keys(less_keys, self._default_less_keys, "less_keys")
        self._best_words = dict(save_best=save_best, rule=rule, greater_keys=greater_keys, less_keys=less_keys)
        metrics = parse_metrics(save_best, rule, greater_keys, less_keys)
        self._contest = Contest(BestBy(metrics, self._extras.max_keep_best))
        self.save_best = [save_best] if isinstance(save_best, str) else save_best
        self.best_ckpt_path: str | None
        self.best_ckpt_path_dict: dict[str, str | None]
        if self._has_one_best:
            self.best_ckpt_path = None
        elif save_best is not None:
            self.best_ckpt_path_dict = {}
        self.last_ckpt: str | None = None
        self.keep_ckpt_ids: deque[int] = deque()
        if self._extras.is_sharded and (filename_tmpl or published_keys or file_client_args or backend_args):
            raise ValueError(
                'format="sharded": filename_tmpl, published_keys, file_client_args and backend_args are for files, and '
                "each checkpoint is a directory then; distckpt.export makes a file of it"
            )
        self._opened: tuple[Any, RunnerRun, Triggers] | None = None
        self._sharded: ShardedRunner | None = None
        self._resumed_count = 0

    @property
    def key_indicators(self) -> list[str]:
        """The metrics of ``save_best``; ``"auto"`` until the first report says which one that is."""
        asked = self._contest.best_by.asked
        return [AUTO] if isinstance(asked, AutoMetric) else [one.name for one in asked]

    @property
    def rules(self) -> list[str | None]:
        """The rule of each of `key_indicators`."""
        asked = self._contest.best_by.asked
        return [asked.rule] if isinstance(asked, AutoMetric) else [one.rule for one in asked]

    def get_triggered_stages(self) -> list[str]:
        """The methods that a runner of MMEngine will call."""
        return [
            *("before_run", "after_load_checkpoint", "before_train", "after_train_iter"),
            *("after_train_epoch", "before_val_epoch", "after_val_epoch", "after_train"),
        ]

    def before_run(self, runner: Any) -> None:
        """``last_checkpoint``, from which the runner may resume, says a file that is whole, if there is one. Where it
        was moved, damaged or lost, it says the newest other one, with a warning. Where copies are made elsewhere, what
        it says there is fetched if there is none here, or the run has gone on in another directory since.

        Raises:
            TypeError: where the runner's strategy keeps its state to itself (DeepSpeed, ColossalAI).
            NoCheckpoint, DamagedCheckpoint, RankFailure: on all ranks, where what should be there is not, is not whole,
                or cannot be fetched.
        """
        check_strategy(runner)
        if self._extras.is_sharded or not getattr(runner, "_resume", False):
            return
        work_dir = str(runner.work_dir)
        place = self._place(work_dir)
        has_loaded = getattr(runner, "_has_loaded", False)
        mirror = None if has_loaded or getattr(runner, "_load_from", None) is not None else place.mirror
        from_leader(
            detect(self._extras.timeout),
            "look at last_checkpoint",
            lambda: make_ready(work_dir, place.directory, mirror, self.filename_tmpl),
        )
        if mirror is not None and getattr(runner, "strategy", None) is not None:
            runner.load_or_resume()  # a FlexibleRunner has looked already, when nothing was there yet

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """The logs in ``checkpoint`` are of the type that MMEngine resumes. Not collective."""
        to_histories(checkpoint)

    def before_train(self, runner: Any) -> None:
        """The directory is this run's, and what it holds is known: the best so far, and what is to be kept.

        Raises:
            ValueError, ImportError: where there is no such backend, it cannot be written to, or its package is missing.
            DirectoryInUse, RankFailure: on all ranks, as with `Checkpointer`.
        """
        work_dir = str(runner.work_dir)
        if self._extras.is_sharded and is_url(self._asked_dir or ""):
            raise ValueError(f'format="sharded": out_dir should be a directory, is the URL {self._asked_dir!r}')
        place = self._place(work_dir)
        self.out_dir, self.file_client, self.file_backend = place.out_dir, place.client, place.backend
        runner.logger.info(f"Checkpoints will be saved to {self.out_dir}.")
        if self.by_epoch and type(getattr(runner, "train_loop", None)).__name__ == "IterBasedTrainLoop":
            runner.logger.warning("by_epoch=True in a loop of iterations saves once, at its end; use by_epoch=False")
        if self._extras.is_sharded:
            self._sharded = ShardedRunner(runner, place.directory, **self._sharded_words())
            return
        opened = self._open(runner, work_dir, place)
        self._resumed_count = self._count(Progress(runner.iter, runner.epoch))
        ids = message_hub.recall(runner, message_hub.KEEP_CKPT_IDS)
        self.keep_ckpt_ids = deque(ids if isinstance(ids, list) else [], maxlen=max(0, self.max_keep_ckpts))
        for metric in self.key_indicators:
            self._set_best_path(metric, self._best_told(runner, metric)[1])
        is_only = self._has_one_best
        self._tell_best(runner, opened.standing(lambda one: message_hub.recall_best(runner, one, is_only=is_only)))
        opened.catch_up()

    def after_train_epoch(self, runner: Any) -> None:
        """The state is saved, with buffers equal on all ranks, if the epoch that ends is one at which to save.

        Raises:
            SaveFailed: on all ranks, where a save failed.
        """
        if self._sharded is not None:
            self._sharded.after_train_epoch()
        elif self.by_epoch:
            self._save_if_due(runner, Progress(runner.iter, runner.epoch + 1), runner.max_epochs)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        """As `after_train_epoch`, for the iteration that ends."""
        if self._sharded is not None:
            self._sharded.after_train_iter()
        elif not self.by_epoch:
            self._save_if_due(runner, Progress(runner.iter + 1, runner.epoch), runner.max_iters)

    def before_val_epoch(self, runner: Any) -> None:
        """Validation begins. Not collective."""
        if self._sharded is not None:
            self._sharded.before_val_epoch()

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, Any]) -> None:
        """What was validated is saved, or linked where it was saved just now, if it is the best by a metric.

        Rank 0's metrics decide. Outside of training nothing happens.

        Raises:
            KeyError, TypeError, ValueError: on all ranks, where a metric is missing, no number, or has no rule.
            SaveFailed: on all ranks, where a save failed.
        """
        if self._sharded is not None:
            self._sharded.after_val_epoch(metrics)
            return
        judged = self._opened is not None and bool(self.save_best)
        verdict = self._require_open()[0].judge(metrics) if judged else None
        if verdict is not None and verdict.wins:
            self._save_best(runner, verdict)
        elif not (judged and verdict or metrics):
            runner.logger.warning(
                "Since `metrics` is an empty dict, the behavior to save the best checkpoint will be skipped in this "
                "evaluation."
            )
        if judged:
            self._require_open()[0].run.raise_failure()

    def after_train(self, runner: Any) -> None:
        """The last state is saved, also where training ended early; what is to be published is; the directory is free.

        Raises:
            SaveFailed: on all ranks, where a save failed.
            RankFailure: on all ranks, where something could not be published, or copied.
        """
        if self._sharded is not None:
            self._sharded.after_train()
            self._sharded = None
        if self._opened is None:
            return
        opened, triggers = self._require_open()
        try:
            if self.save_last:
                self._save_end(runner, opened)
            opened.run.settle()
            opened.catch_up()
            triggers.end()
            if self.published_keys is not None:
                opened.publish(self._to_publish(opened), self.published_keys)
        finally:
            self._opened = None
            opened.close()

    def _save_if_due(self, runner: Any, progress: Progress, total: int) -> None:
        opened, triggers = self._require_open()
        reasons = triggers.due(progress, epoch_ends=self.by_epoch)
        count = self._count(progress)
        if self.save_last and count == total:
            reasons.append(LAST)
        if triggers.should_stop and hasattr(runner, "train_loop"):
            runner.train_loop.stop_training = True
        if reasons:
            runner.logger.info(f"Saving checkpoint at {count} {'epochs' if self.by_epoch else 'iterations'}")
            self._save(runner, progress, tuple(dict.fromkeys(reasons)), {})
        opened.run.raise_failure()

    def _save_best(self, runner: Any, verdict: Verdict) -> None:
        opened, _ = self._require_open()
        progress = Progress(runner.iter, runner.epoch)
        name = self._name(progress)
        paths = {metric: opened.path(layout.best_file(metric, name)) for metric in verdict.wins}
        before = {metric: self._best_told(runner, metric) for metric in verdict.tops}
        self._tell_best(runner, {metric: (verdict.wins[metric], paths[metric]) for metric in verdict.tops})
        last = opened.last
        is_there = last is not None and (last.name, last.progress.step) == (name, progress.step)
        try:
            if last is not None and is_there and self._extras.async_save:
                opened.link(last, verdict.wins)
            else:
                # Once more, as MMEngine does: its readers expect that the last file names the best.
                known = last.reasons if last is not None and is_there else ()
                self._save(runner, progress, tuple(dict.fromkeys((*known, BEST))), verdict.wins)
        except DistckptError:
            self._tell_best(runner, before)
            raise
        for metric, value in verdict.wins.items():
            runner.logger.info(f"The best checkpoint with {value:0.4f} {metric} is saved to {paths[metric]}.")

    def _save_end(self, runner: Any, opened: RunnerRun) -> None:
        """What no trigger saved since training began, or was resumed, is saved for being the last."""
        progress = Progress(runner.iter, runner.epoch)
        last = opened.last
        if self._count(progress) == self._resumed_count:
            return
        if last is None or last.name != self._name(progress):
            self._save(runner, progress, (LAST,), {})
        elif last.reasons == (BEST,):
            self._tell_last(runner, opened, last.name)
            opened.promote(last)

    def _save(self, runner: Any, progress: Progress, reasons: tuple[str, ...], wins: Mapping[str, float]) -> None:
        opened, triggers = self._require_open()
        # A validation may come before the optimizer was built.
        has_optimizer = reasons != (BEST,) or is_built(runner)
        if self.save_optimizer and has_optimizer:
            optimizer_of(runner)  # the same on every rank, so each raises by itself
        # A best off the interval is resumed from only where there is something to resume from already.
        is_resumed_from = reasons != (BEST,) or message_hub.recall(runner, message_hub.LAST_CKPT) is not None
        count = self._count(progress)
        if is_periodic(reasons) and self.max_keep_ckpts > 0 and count not in self.keep_ckpt_ids:
            self.keep_ckpt_ids.append(count)
            message_hub.tell(runner, message_hub.KEEP_CKPT_IDS, list(self.keep_ckpt_ids))
        if is_resumed_from:
            self._tell_last(runner, opened, self._name(progress))
        opened.save(
            runner,
            progress,
            reasons,
            name=self._name(progress),
            wins=wins,
            is_resumed_from=is_resumed_from,
            save_optimizer=self.save_optimizer and has_optimizer,
            save_param_scheduler=self.save_param_scheduler and has_optimizer,
        )
        triggers.restart()

    def _place(self, work_dir: str) -> Place:
        words = {"file_client_args": self.file_client_args, "backend_args": self.backend_args}
        return open_place(work_dir, self._asked_dir, words, self._extras.timeout)

    def _open(self, runner: Any, work_dir: str, place: Place) -> RunnerRun:
        if self._opened is not None:
            known, opened, _ = self._opened
            if known is runner and opened.place.out_dir == place.out_dir:
                return opened
            opened.close()
        if getattr(runner, "message_hub", None) is not None:
            continues = message_hub.recall(runner, message_hub.RUN) or ""
        else:
            continues = None if runner.iter or runner.epoch else ""
        opened = RunnerRun(work_dir, place, self._contest, self._extras, by_epoch=self.by_epoch, continues=continues)
        self._opened = (runner, opened, Triggers(self._schedule, opened.run, by_epoch=self.by_epoch))
        opened.reserve(runner)
        return opened

    def _sharded_words(self) -> dict[str, Any]:
        """What `ShardedRunner` takes."""
        return dict(
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            interval=self.interval,
            by_epoch=self.by_epoch,
            save_begin=self.save_begin,
            save_last=self.save_last,
            **self._best_words,
            **{word: one for word, one in {**hook_words.OURS, **self.args}.items() if word != "format"},
            max_keep_ckpts=self.max_keep_ckpts,
        )

    def _require_open(self) -> tuple[RunnerRun, Triggers]:
        if self._opened is None:
            raise RuntimeError("before_train() comes before every save, and after_train() after the last")
        return self._opened[1:]

    def _to_publish(self, opened: RunnerRun) -> list[str | None]:
        best = [self.best_ckpt_path] if self._has_one_best else list(getattr(self, "best_ckpt_path_dict", {}).values())
        newest = opened.newest() if self.save_last else None
        return [None if newest is None else opened.path(newest.name), *best]

    def _tell_last(self, runner: Any, opened: RunnerRun, name: str) -> None:
        self.last_ckpt = opened.path(name)
        message_hub.tell(runner, message_hub.LAST_CKPT, self.last_ckpt)
        message_hub.tell(runner, message_hub.RUN, opened.id)

    def _tell_best(self, runner: Any, best: Mapping[str, Sequence[Any]]) -> None:
        for metric, (score, path) in best.items():
            score_key, path_key = message_hub.best_keys(metric, is_only=self._has_one_best)
            message_hub.tell(runner, score_key, score)
            message_hub.tell(runner, path_key, path)
            self._set_best_path(metric, path)

    def _best_told(self, runner: Any, metric: str) -> tuple[Any, Any]:
        score_key, path_key = message_hub.best_keys(metric, is_only=self._has_one_best)
        return message_hub.recall(runner, score_key), message_hub.recall(runner, path_key)

    def _set_best_path(self, metric: str, path: str | None) -> None:
        if self._has_one_best:
            self.best_ckpt_path = path
        else:
            self.best_ckpt_path_dict[metric] = path

    @property
    def _has_one_best(self) -> bool:
        return len(self.key_indicators) == 1

    def _count(self, progress: Progress) -> int:
        return progress.epoch if self.by_epoch else progress.step

    def _name(self, progress: Progress) -> str:
        return self.filename_tmpl.format(self._count(progress))

"""The checkpoint callback of a Lightning ``Trainer``."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from distckpt.extras import require

require("lightning", extra="lightning", at_least="2.6")

# ruff: noqa: E402  # what these import is not there, or another, where the line above raises
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, Checkpoint, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import RestartStage
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn

from distckpt import layout, policy, rng
from distckpt.best import AutoMetric, parse_metrics
from distckpt.catalog import scan
from distckpt.checkpointer import Checkpointer
from distckpt.initialising import committed
from distckpt.integrations.lightning_parts import Hooked, Loaders, Loops, Metrics
from distckpt.manifest import Record
from distckpt.progress import Progress
from distckpt.ranks.process_group import detect
from distckpt.resuming import best_of, read_part
from distckpt.stores.local import LocalStore

_log = logging.getLogger("distckpt")

_MODEL = "model"
_SHARDING = (FSDPStrategy, ModelParallelStrategy)
_SUPPORTED = (SingleDeviceStrategy, DDPStrategy, *_SHARDING)
_KEPT_TO_ITSELF = ("DeepSpeed", "XLA")  # some of them are DDPStrategy, too
_CHANGE_PARTS = (BaseFinetuning, ModelPruning, StochasticWeightAveraging)


@dataclass
class _Fit:
    """What is known of the ``fit`` that runs.

    Attributes:
        is_open: whether its checkpointer is there.
        which: the checkpoint that it is to go on from, if it does not start ``elsewhere``.
        numbers: the random numbers that it goes on with.
        done: what was done the last time that it was counted.
        goes_on: whether its first epoch was begun before.
        is_whole: whether nothing has changed since then, as the epoch that was ended last was a whole one.
        logged: what was logged since then, and ``ended`` whether a validation or an epoch did.
    """

    loaders: Loaders | None = None
    is_open: bool = False
    which: str = "latest"
    elsewhere: bool = False
    numbers: rng.State | None = None
    done: Progress | None = None
    goes_on: bool = False
    is_whole: bool = False
    logged: dict[str, Any] = field(default_factory=dict)
    ended: bool = False
    has_validated: bool = False
    is_terminated: bool = False


class CheckpointCallback(Checkpoint):
    """Saves what training would lose, and goes on from it, bit for bit, when the same program is started again.

    ``Trainer(callbacks=[CheckpointCallback("runs/x", interval=1000, save_best="val_loss")])``, and nothing else.
    ``fit`` goes on from the newest checkpoint in the directory, in the middle of an epoch, too, with the position of
    the training data loaders and the random numbers of each rank. A save is made when a batch is done with all that
    belongs to it: validation, schedulers, hooks; where gradients are accumulated, after the last batch of a step,
    and none where training is stopped before. Steps are counted as ``trainer.global_step``.

    Metrics are what was logged in the validation, or in the training epoch, that has just ended. Where a validation
    ends while gradients are being accumulated, they go with the step that is done next.

    ``fit(ckpt_path=...)`` takes ``"best"``, a checkpoint in the directory, or the directory. A file of Lightning's is
    what a run starts from where the directory holds no checkpoint yet; later it is not read again. ``validate``,
    ``test`` and ``predict`` take the weights of the checkpoint that ``ckpt_path`` names.

    SIGTERM, and a file ``STOP`` in the directory, end ``fit`` after a save, at the same step on all ranks.

    Not as they were before are generators of validation loaders, torchmetrics that are not ``persistent()``, and what
    random transforms draw in worker processes. With ``reload_dataloaders_every_n_epochs`` the loaders of the epoch
    that goes on are those that are made first. ``on_train_epoch_start`` is not called for it again.

    Args:
        out_dir: the run's directory, on a file system that all ranks share. One run, one directory.
        words: those of `distckpt.Checkpointer`, without ``state`` and ``per_rank``.

    Raises:
        TypeError, ValueError: as `distckpt.Checkpointer` does. As ``fit`` begins, where the ``Trainer`` has another
            checkpoint callback, or a callback, strategy or loaders that this one cannot work with.
        ImportError: on import, where Lightning is missing or older than 2.6.
    """

    def __init__(self, out_dir: str | os.PathLike[str], **words: Any) -> None:
        given = {"out_dir": out_dir, **words}
        without = ("state", "per_rank", "unknown")
        policy.check_for(Checkpointer, given, who="CheckpointCallback", without=without)
        self.checkpointer: Checkpointer | None = None
        self._out_dir = Path(out_dir)
        self._words = {word: value for word, value in words.items() if word != "save_last"}
        self._saves_last = words.get("save_last", True)
        by = parse_metrics(*(words.get(word) for word in ("save_best", "rule", "greater_keys", "less_keys")))
        self._metrics = () if isinstance(by, AutoMetric) else by
        self._wrapped: list[tuple[object, str]] = []
        self._fit = _Fit()

    @property
    def best_model_path(self) -> str:
        """The best checkpoint by the first metric of ``save_best``; empty where there is none. What Lightning takes for
        ``ckpt_path="best"``."""
        record = self.checkpointer.best if self.checkpointer is not None else best_of(self._records(), self._metrics)
        return "" if record is None else str(self._out_dir / record.name)

    # Hooks of Lightning

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._check(trainer)
        self._unwrap()
        self._fit = _Fit()
        self._wrap(trainer._checkpoint_connector, "resume_start", self._choose_start, trainer)
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # mypy does not see it
            loop = trainer.fit_loop
            self._fit.loaders = Loaders(trainer)
            self._wrap(loop, "_load_combined_loader_states", self._attach)
            self._wrap(loop, "on_run_start", self._keep_numbers)
            self._wrap(loop.epoch_loop, "reset", self._keep_epoch)
            self._wrap(loop.epoch_loop, "on_advance_end", self._after_batch, trainer)
            self._wrap(loop, "on_advance_end", self._after_epoch, trainer)
            self._wrap(loop, "on_run_end", self._before_end, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fit.loaders is None:
            return
        loop = trainer.fit_loop
        if isinstance(loop._data_fetcher, _DataLoaderIterDataFetcher):
            raise TypeError("training_step(dataloader_iter) fetches what nobody else knows of: take batch, batch_idx")
        loops = Loops(trainer)
        state = {
            _MODEL: trainer.strategy.model,
            **_numbered("optimizer", trainer.optimizers),
            **_numbered("scheduler", [one.scheduler for one in trainer.lr_scheduler_configs]),
            "loops": loops,
            "loader": self._fit.loaders,
            "metrics": Metrics(trainer),
            "trainer": Hooked(trainer),
        }
        own = ("loader", "metrics")
        ckpt = Checkpointer(self._out_dir, state, per_rank=own, save_last=False, **self._words)
        self.checkpointer, self._fit.is_open = ckpt, True
        if threading.current_thread() is threading.main_thread():  # Lightning sets back what was there before
            signal.signal(signal.SIGTERM, self._terminate)
        if self._fit.elsewhere:
            ckpt.start_at(trainer.global_step, epoch=trainer.current_epoch)
        elif ckpt.resume(self._fit.which, strict=pl_module.strict_loading):
            self._fit.done, self._fit.numbers = _progress(trainer), rng.capture()
            self._fit.goes_on = loops.is_mid_epoch
            if self._fit.goes_on:
                self._fit.loaders.go_on()
                loop._restart_stage = RestartStage.RESTARTED_MID_EPOCH
                loop._resuming_from_checkpoint = True  # or it would begin to iterate once more
                trainer._logger_connector._first_loop_iter = False  # or it would begin the epoch's sums anew

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fit.is_open and self.checkpointer is not None:
            self.checkpointer.wait_staged()  # a callback may swap weights

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._fit.logged |= trainer._logger_connector.metrics["callback"]
            self._fit.has_validated = self._fit.ended = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit.logged |= trainer._logger_connector.metrics["callback"]
        self._fit.ended = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unwrap()
        if self._fit.is_open and self.checkpointer is not None:
            self._fit.is_open = False
            self.checkpointer.__exit__(type(exception), exception, None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unwrap()

    # Around Lightning's loops, which call no callback where a batch, or an epoch, is done with all that belongs to it

    def _after_batch(self, original: Callable[..., None], trainer: Trainer, *args: Any) -> None:
        original(*args)
        loop = trainer.fit_loop.epoch_loop
        if not self._fit.is_open or loop._num_ready_batches_reached() or loop._should_accumulate():
            return
        ckpt = self._step(trainer, epoch_ends=False)
        if loop.done and self._saves_last:  # what comes is the end of an epoch that has not ended
            ckpt.save("last")

    def _after_epoch(self, original: Callable[..., None], trainer: Trainer) -> None:
        original()
        if self._fit.is_open:
            self._fit.is_whole = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
            if self._fit.is_whole:
                self._step(trainer, epoch_ends=True)

    def _before_end(self, original: Callable[..., None], trainer: Trainer) -> None:
        if self._fit.is_open and self.checkpointer is not None:
            if self._fit.is_whole and self._saves_last and trainer.global_step:
                self.checkpointer.save("last")
            self._fit.is_open = False
            self.checkpointer.close()
        original()

    def _keep_epoch(self, original: Callable[..., None]) -> None:
        if not self._fit.goes_on:
            original()
        self._fit.goes_on = False

    def _keep_numbers(self, original: Callable[..., None]) -> None:
        original()
        if self._fit.numbers is not None:
            rng.apply(self._fit.numbers)  # others may have drawn in their on_train_start

    def _attach(self, original: Callable[..., None]) -> None:
        assert self._fit.loaders is not None
        self._fit.loaders.attach()
        original()

    def _choose_start(
        self,
        original: Callable[..., None],
        trainer: Trainer,
        checkpoint_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """In the place of Lightning's reading of ``ckpt_path``, where that is ours."""
        path, is_fit = checkpoint_path, trainer.state.fn == TrainerFn.FITTING
        if path is not None:
            place, holds = trainer.strategy.broadcast((self._place(path), is_fit and bool(self._records())))
            if place is not None:
                self._start_from(trainer, *place)
                path = None
            elif holds:
                _log.warning("%s holds checkpoints, which this run goes on from: %s is not read", self._out_dir, path)
                path = None
            else:
                self._fit.elsewhere = is_fit
        original(path, weights_only=weights_only)

    # What these do

    def _step(self, trainer: Trainer, *, epoch_ends: bool) -> Checkpointer:
        """What was done is counted, and saved if that is due."""
        assert self.checkpointer is not None
        ckpt, done = self.checkpointer, _progress(trainer)
        if done == self._fit.done or not done.step:
            return ckpt
        if self._fit.is_terminated:
            self._fit.is_terminated = False
            (self._out_dir / layout.STOP).touch()
        self._fit.done = done
        ckpt.step(at=done, metrics=self._take_metrics(trainer, epoch_ends=epoch_ends))
        if ckpt.should_stop:
            trainer.should_stop = True
            trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None
        return ckpt

    def _take_metrics(self, trainer: Trainer, *, epoch_ends: bool) -> dict[str, float]:
        """Those of what has ended since the last time, if that tells a metric of ``save_best``, or none is asked for.
        Rank 0's."""
        if not self._fit.ended:
            return {}
        logged, self._fit.logged, self._fit.ended = self._fit.logged, {}, False
        known, names = trainer.callback_metrics, {one.name for one in self._metrics}
        is_all_there = epoch_ends and (self._fit.has_validated or not trainer.enable_validation)
        told = {name: float(one) for name, one in {**known, **logged}.items() if name in logged or name in names}
        if names and not names & logged.keys():
            told = {}
        is_missing = is_all_there and bool(names) and not names & known.keys()
        told, is_missing, seen = trainer.strategy.broadcast((told, is_missing, sorted(known)))
        if is_missing:
            raise KeyError(f"save_best: none of {sorted(names)} was logged, but {seen}")
        return told

    def _records(self) -> list[Record]:
        return scan(LocalStore(self._out_dir)).records if self._out_dir.is_dir() else []

    def _terminate(self, *_: Any) -> None:
        self._fit.is_terminated = True

    def _place(self, path: str | os.PathLike[str]) -> tuple[str, str | None] | None:
        """As `distckpt.initialising.committed`; for the directory of this run, whatever it holds."""
        if Path(path).resolve() == self._out_dir.resolve():
            return str(path), None
        return committed(os.fspath(path))

    def _start_from(self, trainer: Trainer, root: str, name: str | None) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            read_part(root, detect(timedelta(minutes=15)), _MODEL, trainer.strategy.model, name=name)
        elif Path(root).resolve() != self._out_dir.resolve():
            raise ValueError(
                f"ckpt_path is of the run in {root}: construct CheckpointCallback with that directory to go on in it, "
                "or with init_from= to start from its weights"
            )
        elif name is not None:
            self._fit.which = name

    def _check(self, trainer: Trainer) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError("this is for the Trainer of the package lightning, not for that of pytorch_lightning")
        if others := [type(one).__name__ for one in trainer.checkpoint_callbacks if one is not self]:
            raise ValueError(f"a Trainer saves by one callback: take out {', '.join(others)}, or CheckpointCallback")
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # mypy does not see where they are set
        if changing := [type(one).__name__ for one in callbacks if isinstance(one, _CHANGE_PARTS)]:
            raise TypeError(
                f"{', '.join(changing)}: what it makes of optimizers, schedulers or weights as training goes on is not "
                "there where a run is taken up again; for averages take WeightAveraging"
            )
        strategy = trainer.strategy
        keeps = any(word in kind.__name__ for kind in type(strategy).__mro__ for word in _KEPT_TO_ITSELF)
        if keeps or not isinstance(strategy, _SUPPORTED):
            raise TypeError(
                f"{type(strategy).__name__} keeps its state to itself, or is not known here: CheckpointCallback works "
                f"with {', '.join(one.__name__ for one in _SUPPORTED)}"
            )
        if isinstance(strategy, _SHARDING) and self._words.get("format") == "full":
            raise ValueError(f'format="full": with {type(strategy).__name__} no rank has all; use format="sharded"')

    def _wrap(self, owner: object, name: str, around: Callable[..., None], *more: Any) -> None:
        """``around`` is called in the place of a method of Lightning's, with it."""
        original = getattr(owner, name)
        vars(owner)[name] = lambda *args, **words: around(original, *more, *args, **words)
        self._wrapped.append((owner, name))

    def _unwrap(self) -> None:
        while self._wrapped:
            owner, name = self._wrapped.pop()
            vars(owner).pop(name, None)


def _progress(trainer: Trainer) -> Progress:
    epochs: Any = trainer.fit_loop.epoch_progress.current
    return Progress(trainer.global_step, epochs.processed)


def _numbered(name: str, objects: Sequence[Any]) -> dict[str, Any]:
    return {f"{name}_{nth}" if nth else name: one for nth, one in enumerate(objects)}

"""Checkpoints for the ``Trainer`` of Hugging Face, as one of its callbacks."""

from __future__ import annotations

import copy
import inspect
import logging
import numbers
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from distckpt import layout, policy, rng, words
from distckpt.accelerator_state import PreparedLoader, refuse_unknown_state
from distckpt.best import AUTO
from distckpt.catalog import scan
from distckpt.checkpointer import Checkpointer
from distckpt.errors import StateMismatch
from distckpt.extras import require
from distckpt.initialising import committed
from distckpt.loader_position import LoaderPosition
from distckpt.progress import Progress
from distckpt.ranks import Ranks, from_leader
from distckpt.ranks.process_group import detect
from distckpt.resuming import name_of, read_part, start_from
from distckpt.selection import Selection
from distckpt.state import Parts
from distckpt.stores.local import LocalStore

require("transformers", extra="transformers", at_least="5.3")  # the error names the extra

from transformers import Trainer, TrainerCallback  # noqa: E402
from transformers import trainer as trainer_module  # noqa: E402

from distckpt.integrations.transformers_parts import LossesPart, TrainerPart, restore_callbacks  # noqa: E402

_log = logging.getLogger("distckpt")

_TIMES = ("_runtime", "_per_second", "_preparation_time")  # these say nothing of the model
_STATE_FILE = "trainer_state.json"  # by which Trainer knows a checkpoint, and where it was


class CheckpointCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Saves what ``Trainer`` trains with, when it is due, and goes on from the newest that is whole, in the middle of
    an epoch, too: the same command, started again, ends with the same weights, bit for bit.

    For ``Trainer(args=TrainingArguments(save_strategy="no", ...), callbacks=[CheckpointCallback("runs/x", ...)])``.
    ``trainer.train()`` resumes by itself, and so does ``resume_from_checkpoint=True``; the path of a checkpoint in
    ``out_dir`` means that one; a ``checkpoint-500`` that Trainer saved is resumed as Trainer does it. The state of a
    step is saved once it was logged and evaluated. What makes a model's folder complete for ``from_pretrained`` lies
    in ``out_dir/pretrained``, where `distckpt.export` finds it.

    Args:
        out_dir: the run's directory.
        load_best_at_end: whether the model has the best weights after training, by the first metric of ``save_best``.
        words: those of `Checkpointer`, but ``state`` and ``per_rank``. Names in ``save_best`` are those of Trainer's
            evaluation, with ``eval_`` before them or not. Where it is not given it is ``metric_for_best_model`` of the
            arguments of Trainer, by their ``greater_is_better``.

    Raises:
        TypeError, ValueError: naming the word that is wrong. When Trainer is constructed: where something of it cannot
            work with this.
    """

    def __init__(self, out_dir: str | os.PathLike[str], *, load_best_at_end: bool = False, **words_: Any) -> None:
        words.check_flags(load_best_at_end=load_best_at_end)
        policy.check_for(
            Checkpointer, {"out_dir": out_dir, **words_}, who="CheckpointCallback", without=("state", "per_rank")
        )
        if isinstance(names := words_.get("save_best"), (str, list)):
            words_["save_best"] = _evaluated(names) if isinstance(names, str) else [_evaluated(one) for one in names]
        self._out_dir = Path(out_dir)
        self._loads_best = load_best_at_end
        self._words = words_
        self._trainer: Any = None
        self._ckpt: Checkpointer | None = None
        self._position: Any = None
        self._told: dict[str, Any] | None = None
        self._folder = ""

    # What Trainer calls, on every rank.

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = _calling_trainer()
        self._refuse(trainer)
        if not self._words.get("save_best") and args.metric_for_best_model is not None:
            rule = "greater" if args.greater_is_better else "less"
            self._words |= {"save_best": _evaluated(args.metric_for_best_model), "rule": rule}
        if self._loads_best and (not self._words.get("save_best") or args.eval_strategy == "no"):
            raise ValueError("load_best_at_end needs save_best, and an eval_strategy other than no")
        self._trainer, trainer._distckpt = trainer, self
        kind = type(trainer)
        if not issubclass(kind, _Checkpointed):
            told = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
            trainer.__class__ = type(kind.__name__, (_Checkpointed, kind), told)

    def on_train_begin(self, args: Any, state: Any, control: Any, **called: Any) -> None:
        trainer = self._trainer
        if trainer is None:
            raise RuntimeError("a CheckpointCallback is given to Trainer(callbacks=[...]), not to add_callback()")
        parts = self._parts(called["train_dataloader"])
        self._ckpt = ckpt = Checkpointer(self._out_dir, parts, per_rank=["loader", "losses"], **self._words)
        self._at = Progress(state.global_step, self._epoch)
        shutil.rmtree(self._folder)  # it was read, and a process that is killed should leave nothing behind
        from_leader(self._ranks, f"write of {layout.PRETRAINED}", self._write_pretrained)
        if self._told is None and state.global_step:
            if from_leader(self._ranks, "look for checkpoints", lambda: ckpt.latest is not None):
                raise ValueError(
                    f"{self._out_dir} holds checkpoints: they are resumed from without resume_from_checkpoint"
                )
            ckpt.start_at(state.global_step, epoch=self._epoch)
            return
        step = ckpt.resume(self._name or "latest")
        if step != state.global_step:  # the newest was damaged, though not where its progress is
            raise _OlderOne(step)
        self._rng = rng.capture()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._metrics.clear()
        self._is_left = False

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._batches += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._batches += 1
        self._is_in_epoch = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._is_in_epoch = False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **_: Any) -> None:
        ours = {name: one for name, one in metrics.items() if name.startswith("eval_") and not name.endswith(_TIMES)}
        if self._ckpt is not None:
            self._metrics |= {name: one for name, one in ours.items() if isinstance(one, numbers.Real)}

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        ckpt, self._ckpt = self._ckpt, None
        if ckpt is not None:
            ckpt.close()
            if self._loads_best:
                self._load_best(ckpt)

    # What is done around a training.

    def train(self, train: Callable[..., Any], asked: str | bool | None, *args: Any, **more: Any) -> Any:
        """What ``train``, that of Trainer, returns, which goes on from what was ``asked`` for. Collective."""
        timeout = self._words.get("timeout", inspect.signature(Checkpointer).parameters["timeout"].default)
        self._ranks: Ranks = detect(timeout)
        self._metrics: dict[str, Any] = {}
        self._is_left = self._is_asked = False
        self._is_exact = False  # whether all that each rank has of its own is restored
        try:
            which = from_leader(self._ranks, "look at what to resume from", lambda: self._which(asked))
            while True:
                try:
                    with tempfile.TemporaryDirectory(prefix="distckpt-") as folder:
                        self._folder, self._told = folder, None
                        if which is not None and self._reads_progress(which):
                            asked = folder
                        return train(asked, *args, **more)
                except _OlderOne as older:
                    which = older.step
                    self._end()
        finally:
            self._end()
            self._ranks.close()

    def begins(self, epochs: int, batches: int) -> tuple[int, int]:
        """How many epochs, and batches of the next, training has behind it, if Trainer takes it for that many."""
        state = self._trainer.state
        if self._told is not None:
            if self._is_exact:
                epochs, batches = self._told["epoch"], self._told["batches"]
            restore_callbacks(self._trainer, state.stateful_callbacks)
        self._epoch, self._batches = epochs, batches
        is_over = self._told is not None and state.global_step >= state.max_steps
        return (state.num_train_epochs, 0) if is_over else (epochs, batches)

    def is_own(self, folder: object) -> bool:
        """Whether it is what Trainer was given in the place of one of its own checkpoints."""
        return self._told is not None and folder == self._folder

    def set_rng(self) -> None:
        """Whatever ran since the state was restored has drawn nothing. For an epoch that begins: of one that had begun
        a batch is fetched by now."""
        if not self._batches:
            rng.apply(self._rng)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Trainer does not make another loader that skips batches: the position of its own does that."""
        stock = trainer_module.skip_first_batches

        def skip(loader: Any, batches: int = 0) -> Any:
            if loader is not self._loader or not hasattr(self._position, "skip"):
                return stock(loader, batches)
            if self._is_exact:
                rng.apply(self._rng)
            else:
                self._position.skip(batches, epoch=self._epoch)
            return loader

        trainer_module.skip_first_batches = skip
        try:
            yield
        finally:
            trainer_module.skip_first_batches = stock

    def boundary(self) -> None:
        """A step is done, or an epoch, and was logged and evaluated. Saves if that is due. Collective."""
        ckpt, state, control = self._ckpt, self._trainer.state, self._trainer.control
        if ckpt is None:
            return
        has_all = getattr(self._loader, "end_of_dataloader", False) or state.epoch >= self._epoch + 1
        if self._is_in_epoch and (has_all or control.should_epoch_stop or control.should_training_stop):
            return  # the end of the epoch follows at once
        if not self._is_in_epoch and (has_all or not control.should_training_stop):
            self._epoch, self._batches, self._is_left = self._epoch + 1, 0, not has_all
        (metrics, self._metrics), at = (self._metrics, {}), Progress(state.global_step, self._epoch)
        if at != self._at:
            self._at = at
            ckpt.step(at=at, metrics=metrics)
        elif metrics:
            ckpt.report(metrics)
        if self._is_asked:
            ckpt.save()
            self._is_asked = False
        control.should_training_stop |= ckpt.should_stop

    def _refuse(self, trainer: Any) -> None:
        """Nothing of it is known not to work."""
        args = trainer.args
        if sum(isinstance(one, CheckpointCallback) for one in trainer.callback_handler.callbacks) > 1:
            raise ValueError("two CheckpointCallbacks would save every step twice: give Trainer one")
        if args.save_strategy != "no":
            raise ValueError(f'save_strategy should be "no" with a CheckpointCallback, is "{args.save_strategy.value}"')
        for word in ("ignore_data_skip", "auto_find_batch_size", "enable_jit_checkpoint"):
            if getattr(args, word, False):
                raise ValueError(f"{word} cannot be used with a CheckpointCallback: {_REFUSED[word]}")
        refuse_unknown_state(trainer.accelerator)
        if getattr(trainer.accelerator.parallelism_config, "sp_enabled", False):
            raise TypeError("how far a loader for sequence parallelism is, is not known here: use save_strategy")
        plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 1:
            raise TypeError('FSDP1 is not supported with Trainer: use fsdp_config={"version": 2}')

    def _which(self, asked: str | bool | None) -> str | None:
        """The name of our checkpoint that is asked for, ``"latest"``, or nothing where it is one of Trainer's."""
        if asked is None or isinstance(asked, bool):
            return "latest"
        if (Path(asked) / _STATE_FILE).is_file() or (found := committed(os.fspath(asked))) is None:
            return None
        root, name = found
        if Path(root) != self._out_dir.resolve():
            raise ValueError(
                f"resume_from_checkpoint: {asked} is of another run: init_from= starts from its weights, and out_dir "
                "is where a run goes on"
            )
        return name or "latest"

    def _reads_progress(self, which: str | int) -> bool:
        """Trainer finds in a folder of its kind how far that checkpoint is, if there is one. Collective."""
        store = LocalStore(self._out_dir)
        self._name = from_leader(self._ranks, "choice", lambda: name_of(which, scan(store).records, ()))
        progress = TrainerPart(self._trainer, self._where)
        try:
            is_there = read_part(self._out_dir, self._ranks, "trainer", progress, name=self._name)
        except StateMismatch as error:
            raise StateMismatch(
                f"{self._out_dir} holds checkpoints of a program without a Trainer: give this one an out_dir of its "
                "own, and init_from= that one"
            ) from error
        if is_there:
            self._told = progress.told
            self._is_exact = self._told["world_size"] == self._ranks.world_size
            Path(self._folder, _STATE_FILE).write_text(self._told["state"])
        return self._told is not None

    def _where(self) -> dict[str, int]:
        return {"epoch": self._epoch, "batches": self._batches, "world_size": self._ranks.world_size}

    def _parts(self, loader: Any) -> dict[str, Any]:
        trainer, self._loader = self._trainer, loader
        if hasattr(loader, "base_dataloader"):
            self._position = PreparedLoader(loader, trainer.accelerator, is_left=lambda: self._is_left)
        else:
            is_plain = isinstance(loader, DataLoader) and not hasattr(loader, "state_dict")
            self._position = LoaderPosition(loader) if is_plain else loader
        parts = {
            "model": trainer.model_wrapped,
            "optimizer": getattr(trainer.optimizer, "optimizer", trainer.optimizer),
            "scheduler": trainer.lr_scheduler,
            "scaler": trainer.accelerator.scaler,
            "trainer": TrainerPart(trainer, self._where),
            "losses": LossesPart(trainer),
            "loader": self._position,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _write_pretrained(self) -> None:
        target, trainer = self._out_dir / layout.PRETRAINED, self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        config: Any = copy.deepcopy(getattr(model, "config", None))
        if target.exists() or not hasattr(config, "save_pretrained"):
            return
        config.architectures = [type(model).__name__.removeprefix("FSDP")]
        # As trash, which the next save or start sweeps if this one is killed.
        draft = tempfile.mkdtemp(prefix=f"{layout.TRASH_PREFIX}{layout.PRETRAINED}-", dir=self._out_dir)
        try:
            for one in (config, getattr(model, "generation_config", None), trainer.processing_class):
                if one is not None:
                    one.save_pretrained(draft)
            Path(draft).chmod(0o755)
            Path(draft).rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _load_best(self, ckpt: Checkpointer) -> None:
        trainer = self._trainer
        name = from_leader(self._ranks, "choice of the best", lambda: best.name if (best := ckpt.best) else None)
        if name is None:
            _log.warning("%s: nothing was evaluated, so there is no best to load", self._out_dir)
            return
        path = str(self._out_dir / name)
        start_from(path, self._ranks, Parts({"model": trainer.model_wrapped}, ()), Selection(), strict=True)
        trainer.state.best_model_checkpoint = path

    def _end(self) -> None:
        """Of a training that did not come to its end nothing more is saved."""
        ckpt, self._ckpt = self._ckpt, None
        if ckpt is not None:
            ckpt.__exit__(*sys.exc_info())


_REFUSED = {
    "ignore_data_skip": "a loader goes on where it was, and reads nothing of what lies before",
    "auto_find_batch_size": "how far a loader is, is a number of batches of one size",
    "enable_jit_checkpoint": "the files SAVE and STOP in out_dir do what it does",
}


class _OlderOne(Exception):
    """What was resumed from is of another step than Trainer was told."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class _Checkpointed:
    """Goes before the class of a Trainer."""

    _distckpt: CheckpointCallback

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, *args: Any, **more: Any) -> Any:
        if self._distckpt not in self.callback_handler.callbacks:  # type: ignore[attr-defined]
            self.__class__ = type(self).__bases__[1]  # it was removed since
            return self.train(resume_from_checkpoint, trial, *args, **more)
        if trial is not None:
            raise ValueError("a search for hyperparameters is many runs, and a CheckpointCallback keeps one")
        return self._distckpt.train(super().train, resume_from_checkpoint, trial, *args, **more)  # type: ignore[misc]

    def _init_training_state(self, *args: Any, **more: Any) -> tuple[int, int]:
        return self._distckpt.begins(*super()._init_training_state(*args, **more))  # type: ignore[misc]

    def _load_from_checkpoint(self, folder: Any, *args: Any, **more: Any) -> None:
        if not self._distckpt.is_own(folder):
            super()._load_from_checkpoint(folder, *args, **more)  # type: ignore[misc]

    def _load_rng_state(self, folder: Any) -> None:
        if self._distckpt.is_own(folder):
            self._distckpt.set_rng()
        else:
            super()._load_rng_state(folder)  # type: ignore[misc]

    def _run_epoch(self, *args: Any, **more: Any) -> None:
        with self._distckpt.in_place():
            super()._run_epoch(*args, **more)  # type: ignore[misc]

    def _maybe_log_save_evaluate(self, *args: Any, **more: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **more)  # type: ignore[misc]
        self._distckpt.boundary()

    def _save_checkpoint(self, *args: Any, **more: Any) -> None:
        self._distckpt._is_asked = True  # by some other callback


def _evaluated(name: str) -> str:
    """The name that Trainer gives to a metric of an evaluation."""
    return name if name == AUTO or name.startswith("eval_") else f"eval_{name}"


def _calling_trainer() -> Any:
    """The Trainer that is being constructed: callbacks are told everything but whose they are."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if isinstance(one := frame.f_locals.get("self"), Trainer):
            return one
        frame = frame.f_back
    raise RuntimeError("a CheckpointCallback is given to Trainer(callbacks=[...])")

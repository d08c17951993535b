"""The checkpoints of a runner of MMEngine to which every rank writes its part."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from distckpt import rng
from distckpt.checkpointer import Checkpointer
from distckpt.loader_position import LoaderPosition
from distckpt.progress import Progress
from distckpt.runner_state import scheduler_states, to_plain


class ShardedRunner:
    """What ``CheckpointHook(format="sharded")`` does at each stage: directories of `Checkpointer` in ``out_dir``.

    No runner resumes from these by itself. So it begins as if there were none, and is then put where the newest is.
    Everything is collective.

    Args:
        runner: one of MMEngine, in its ``before_train``.
        words: those of `Checkpointer`.

    Raises:
        ValueError: where a hook of the runner would change what is saved.
        RuntimeError: where ``out_dir`` holds checkpoints and the runner was not told to resume.
        And what `Checkpointer` raises, and its ``resume``.
    """

    def __init__(
        self, runner: Any, out_dir: str, *, save_optimizer: bool, save_param_scheduler: bool, **words: Any
    ) -> None:
        _refuse_hooks(runner)
        self._runner = runner
        self._by_epoch = words["by_epoch"]
        self._numbers: Mapping[str, Any] | None = None
        self._loops = _Loops(runner)
        parts = {"model": runner.model, "loops": self._loops, "message_hub": _Hub(runner)}
        if isinstance(runner.train_dataloader, DataLoader):
            parts["loader"] = self._loops.position()
        if save_optimizer:
            parts |= _optimizers(runner)
        if save_param_scheduler and runner.param_schedulers is not None:
            parts["param_schedulers"] = _Schedulers(runner.param_schedulers)
        self._checkpointer = Checkpointer(out_dir, parts, format="sharded", **words)
        if getattr(runner, "_resume", False):
            self._resume()
        else:
            self._begin(out_dir)
        self._loops.begin()

    def after_train_iter(self) -> None:
        """One more iteration is done. The last of an epoch is done with the epoch: other hooks have not ended it."""
        done = Progress(self._runner.iter + 1, self._runner.epoch)
        if not self._by_epoch and not self._loops.is_end_of_epoch(done.step):
            self._step(done)

    def after_train_epoch(self) -> None:
        """One more epoch is done, as far as there are any."""
        if self._loops.has_epochs:
            self._step(Progress(self._runner.iter, self._runner.epoch + 1))

    def before_val_epoch(self) -> None:
        """Validation begins. It draws no random numbers of training's: a resume from what was saved before it goes on
        after it."""
        self._numbers = rng.capture()

    def after_val_epoch(self, metrics: Mapping[str, Any]) -> None:
        """What was validated is the best, or not."""
        if self._numbers is not None:
            rng.apply(self._numbers)
            self._numbers = None
        if metrics and self._loops.done is not None:
            self._checkpointer.report(metrics)

    def after_train(self) -> None:
        """The last state is saved, and all is durable."""
        self._checkpointer.close()

    def _resume(self) -> None:
        runner = self._runner
        if not self._checkpointer.resume():
            self._begin("")
            return
        runner.optim_wrapper.initialize_count_status(runner.model, runner.iter, runner.max_iters)
        for hook in runner.hooks:
            if hasattr(hook, "start_iter"):  # by which the time is estimated that is left
                hook.start_iter = runner.iter

    def _begin(self, out_dir: str) -> None:
        try:
            self._checkpointer.start_at(self._runner.iter, epoch=self._runner.epoch)
        except RuntimeError as error:
            self._checkpointer.close()  # the ranks part
            raise RuntimeError(
                f"{out_dir} holds checkpoints: resume=True goes on from the newest; a new training needs a work_dir of "
                "its own"
            ) from error

    def _step(self, done: Progress) -> None:
        self._loops.done = done
        self._checkpointer.step(at=done)
        if self._checkpointer.should_stop:
            self._runner.train_loop.stop_training = True


class _Loops:
    """How far training is, and the seed that its sampler draws the order of the data from.

    Attributes:
        has_epochs: whether the loop passes over the data again and again, and begins each pass anew.
        done: what was done when it was saved.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.has_epochs = type(runner.train_loop).__name__ != "IterBasedTrainLoop"
        self.done: Progress | None = None

    def is_end_of_epoch(self, iterations: int) -> bool:
        return self.has_epochs and iterations % len(self._runner.train_dataloader) == 0

    def position(self) -> LoaderPosition:
        """How far the loader is, from now on."""
        loader = self._runner.train_dataloader
        never_ends = type(self._sampler).__name__ == "InfiniteSampler"
        return LoaderPosition(loader, ahead=(lambda: 0) if never_ends else None, looks_ahead=False)

    def begin(self) -> None:
        """The loader is iterated over from where it is now: a loop of iterations began to when it was built, and reads
        what lies behind, but that is behind it already."""
        loop = self._runner.train_loop
        if self.has_epochs or not hasattr(loop, "dataloader_iterator"):
            return
        if hasattr(self._sampler, "_indices_of_rank"):
            self._sampler.indices = self._sampler._indices_of_rank()
        passes = loop._iter // len(self._runner.train_dataloader)
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(passes)
        iterator = type(loop.dataloader_iterator)(self._runner.train_dataloader)
        iterator._epoch = passes
        loop.dataloader_iterator = _Behind(iterator, loop._iter)

    def state_dict(self) -> dict[str, Any]:
        done = self.done or Progress(self._runner.iter, self._runner.epoch)
        return {"iter": done.step, "epoch": done.epoch, "seed": getattr(self._sampler, "seed", None)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.done = Progress(state["iter"], state["epoch"])
        loop = self._runner.train_loop
        loop._iter, loop._epoch = state["iter"], state["epoch"]
        if state["seed"] is not None and hasattr(self._sampler, "seed"):
            self._sampler.seed = state["seed"]

    @property
    def _sampler(self) -> Any:
        return getattr(self._runner.train_dataloader, "sampler", None)


class _Behind:
    """An iterator whose first ``count`` batches are behind it: who asks for these gets nothing."""

    def __init__(self, iterator: Iterator[Any], count: int) -> None:
        self._iterator = iterator
        self._count = count

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._count:
            self._count -= 1
            return None
        return next(self._iterator)


class _Hub:
    """What rank 0's message hub holds. Its logs are bytes here: as tensors, each rank would write some of its own."""

    def __init__(self, runner: Any) -> None:
        self._hub = runner.message_hub

    def state_dict(self) -> dict[str, Any]:
        told = self._hub.state_dict()
        logs = {
            name: {"log": _packed(one.data[0]), "count": _packed(one.data[1]), "max_length": int(one.max_length)}
            for name, one in told["log_scalars"].items()
        }
        left: list[str] = []
        known = {key: to_plain(one, key, left) for key, one in told["runtime_info"].items()}
        for key in {place.split(".")[0].split(" ")[0] for place in left}:
            del known[key]
        return {"log_scalars": logs, "runtime_info": known, "resumed_keys": dict(told["resumed_keys"])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        buffer = sys.modules["mmengine.logging"].HistoryBuffer
        logs = {
            name: buffer(np.frombuffer(told["log"]), np.frombuffer(told["count"]), told["max_length"])
            for name, told in state["log_scalars"].items()
        }
        self._hub.load_state_dict({**state, "log_scalars": logs})


def _packed(numbers: Any) -> bytes:
    return np.asarray(numbers, dtype=np.float64).tobytes()


class _Schedulers:
    """The states of all schedulers of a runner."""

    def __init__(self, schedulers: Any) -> None:
        self._schedulers = schedulers

    def state_dict(self) -> dict[str, Any]:
        return {"schedulers": scheduler_states(self._schedulers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _load(self._schedulers, state["schedulers"])


def _load(schedulers: Any, states: Any) -> None:
    if isinstance(schedulers, dict):
        for name, some in schedulers.items():
            _load(some, states[name])
        return
    for scheduler, state in zip(
        schedulers if isinstance(schedulers, list | tuple) else [schedulers], states, strict=True
    ):
        scheduler.load_state_dict(state)


def _optimizers(runner: Any) -> dict[str, Any]:
    """The optimizers in the wrapper, or wrappers, of ``runner``, and what scales their losses."""
    wrapper = runner.optim_wrapper
    wrappers = dict(wrapper.items()) if hasattr(wrapper, "optim_wrappers") else {"": wrapper}
    found = {}
    for name, one in wrappers.items():
        found[f"optimizer_{name}" if name else "optimizer"] = one.optimizer
        if hasattr(getattr(one, "loss_scaler", None), "state_dict"):
            found[f"scaler_{name}" if name else "scaler"] = one.loss_scaler
    return found


def _refuse_hooks(runner: Any) -> None:
    for hook in runner.hooks:
        if "before_save_checkpoint" in hook.get_triggered_stages():
            raise ValueError(
                f'format="sharded": {type(hook).__name__} changes what is saved in its before_save_checkpoint(), which '
                'only a .pth has: use format="pth", or train without this hook'
            )

"""What a Lightning ``Trainer`` has beside weights and optimizers, as parts of a state (see `distckpt.state.Parts`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from lightning import __version__
from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch.utils.data import DataLoader

from distckpt.loader_position import LoaderPosition

_log = logging.getLogger("distckpt")

_SAME_AS_MODEL = "same_as_model"


class Loops:
    """How far Lightning's loops are, between two batches: nothing is left for them to make up for after a load."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def is_mid_epoch(self) -> bool:
        """Whether an epoch began and did not end."""
        epochs: Any = self._trainer.fit_loop.epoch_progress.current
        return bool(epochs.ready > epochs.processed)

    def state_dict(self) -> dict[str, Any]:
        loop = self._trainer.fit_loop  # its own state_dict would ask the data loaders, too
        return {
            "loops": {
                "epoch_progress": loop.epoch_progress.state_dict(),
                **loop.epoch_loop.state_dict(prefix="epoch_loop."),
            },
            "loaders_of_epoch": loop._last_train_dl_reload_epoch,
            "accumulated": self._trainer.accumulate_grad_batches,  # a callback may change it as an epoch begins
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        loop = self._trainer.fit_loop
        loop.load_state_dict(dict(state["loops"]))
        inner = loop.epoch_loop
        for one in (loop, inner, inner.val_loop, inner.automatic_optimization, inner.manual_optimization):
            one.on_iteration_done()  # it is not restarting: that is for checkpoints from within a batch
        loop._last_train_dl_reload_epoch = state["loaders_of_epoch"]
        self._trainer.accumulate_grad_batches = state["accumulated"]


class Loaders:
    """How far the training data loaders are. Each rank has its own."""

    def __init__(self, trainer: Trainer) -> None:
        self._loop = trainer.fit_loop
        self._positions: list[Any] = []

    def attach(self) -> None:
        """The loaders that Lightning has made, and iterates over next, count from now on.

        Raises:
            TypeError: where there are several, and it is not known how far each is.
        """
        combined = self._loop._combined_loader
        assert combined is not None
        loaders = combined.flattened
        if len(loaders) > 1 and None in map(sized_len, loaders):
            raise TypeError("how far several training data loaders are is not known where one of them has no length")
        self._positions = [one for one in map(self._position, loaders) if one is not None]

    def go_on(self) -> None:
        """Lightning's next batch is the next one of the epoch that was begun."""
        combined, fetcher = self._loop._combined_loader, self._loop._data_fetcher
        assert combined is not None and fetcher is not None
        for loader in combined.flattened:
            _set_sampler_epoch(loader, self._loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        iter(fetcher)

    def state_dict(self) -> dict[str, Any]:
        return {"loaders": [one.state_dict() for one in self._positions]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for position, told in zip(self._positions, state["loaders"], strict=True):
            position.load_state_dict(told)

    def _position(self, loader: Any) -> Any:
        if isinstance(loader, DataLoader):
            return LoaderPosition(loader, ahead=self._unseen, looks_ahead=sized_len(loader) is None)
        if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
            return loader
        _log.warning(
            "how far a %s is cannot be told, as it is no DataLoader and has no state_dict: a run that goes on in the "
            "middle of an epoch reads its data from the beginning",
            type(loader).__name__,
        )
        return None

    def _unseen(self) -> int | None:
        """As ``ahead`` of `LoaderPosition`. A loader that is at its end where others are not is in that epoch still:
        Lightning finds it out when it asks for the next batch."""
        if self._loop.epoch_loop._num_ready_batches_reached():
            return None
        return len(getattr(self._loop._data_fetcher, "batches", ()))


class Metrics:
    """The metrics that the ``Trainer`` has, and those that ``self.log(on_epoch=True)`` is summing up. Each rank has its
    own. Not those of torchmetrics: their own ``persistent()`` says whether they are saved, with the model."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        results = self._trainer.fit_loop.epoch_loop._results
        sums = {
            key: {name: getattr(one, name) for name in ("value", "cumulated_batch_size") if hasattr(one, name)}
            for key, one in results.items()
            if one.is_tensor and one.meta.on_epoch and not one.has_reset
        }
        return {"known": dict(self._trainer._logger_connector._callback_metrics), "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._trainer._logger_connector._callback_metrics = dict(state["known"])
        self._trainer.fit_loop.epoch_loop._results = _Resumed(state["sums"])


class _Resumed(_ResultCollection):
    """Results that go on from ``sums``, each when it is logged the next time."""

    def __init__(self, sums: Mapping[str, Any]) -> None:
        super().__init__(training=True)
        self._sums = dict(sums)

    def __setitem__(self, key: str, metric: Any) -> None:
        super().__setitem__(key, metric)
        for name, value in self._sums.pop(key, {}).items():
            setattr(metric, name, value)


class Hooked:
    """What callbacks, the precision plugin, the data module and the hooks ``on_save_checkpoint`` have to keep.

    The hooks are given a dict as Lightning has it, with ``state_dict``, ``callbacks``, ``epoch`` and ``global_step``.
    What they leave in it of the model's weights is not saved twice; what they change of these has no effect.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._data: Any = trainer.datamodule  # type: ignore[attr-defined]  # mypy does not see where that is set

    def state_dict(self) -> dict[str, Any]:
        trainer, weights = self._trainer, self._weights()
        told: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "state_dict": weights,
            "callbacks": call._call_callbacks_state_dict(trainer),
        }
        kept = {"precision": trainer.precision_plugin.state_dict()}
        if self._data is not None:
            kept["data"] = call._call_lightning_datamodule_hook(trainer, "state_dict")
        call._call_callbacks_on_save_checkpoint(trainer, told)
        call._call_lightning_module_hook(trainer, "on_save_checkpoint", told)
        here = {id(one) for one in weights.values()}
        same = [key for key, one in told.items() if one is weights or _holds_only(one, here)]
        hooks = {key: one for key, one in told.items() if key not in same}
        return {**kept, "hooks": hooks, _SAME_AS_MODEL: same}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        trainer = self._trainer
        told = {
            "pytorch-lightning_version": __version__,
            **state["hooks"],
            **dict.fromkeys(state[_SAME_AS_MODEL], self._weights()),
        }
        call._call_lightning_module_hook(trainer, "on_load_checkpoint", told)
        if self._data is not None and state.get("data"):
            call._call_lightning_datamodule_hook(trainer, "load_state_dict", state["data"])
        call._call_callbacks_on_load_checkpoint(trainer, told)
        call._call_callbacks_load_state_dict(trainer, told)
        if state["precision"]:
            trainer.precision_plugin.load_state_dict(state["precision"])

    def _weights(self) -> dict[str, Any]:
        if isinstance(self._trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            return {}  # no rank has them whole
        return dict(self._trainer.lightning_module.state_dict())


def _holds_only(value: Any, known: set[int]) -> bool:
    return isinstance(value, dict) and bool(value) and all(id(one) in known for one in value.values())

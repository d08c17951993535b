"""What a ``Trainer`` of Hugging Face has beside weights and optimizers, as parts of a state."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerState
from transformers.trainer_callback import ExportableState, TrainerControl


class TrainerPart:
    """What Trainer and its callbacks know of a training, and how far it is.

    Attributes:
        told: what was loaded.

    Args:
        where: how far it is, in the words of who asks.
    """

    def __init__(self, trainer: Any, where: Callable[[], Mapping[str, int]]) -> None:
        self._trainer = trainer
        self._where = where
        self.told: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        state = self._trainer.state
        told = {one.name: getattr(state, one.name) for one in dataclasses.fields(TrainerState)}
        told["stateful_callbacks"] = TrainerState(stateful_callbacks=_stateful(self._trainer)).stateful_callbacks
        # As text: a history of ten thousands of logs is looked at value by value else, while training waits.
        text = json.dumps(told, default=lambda one: one.item())  # numbers of NumPy and torch, too
        return {"state": text, **self._where()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.told = dict(state)


class LossesPart:
    """What each rank has summed up and not logged yet."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        loss = trainer._tr_loss.item()
        return {"loss": loss, "logged_at": trainer._globalstep_last_logged, "flos": trainer.current_flos}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        trainer = self._trainer
        trainer._tr_loss.fill_(state["loss"])
        trainer._total_loss_scalar = -state["loss"]  # which is of this call of train() alone
        trainer._globalstep_last_logged, trainer.current_flos = state["logged_at"], state["flos"]


def restore_callbacks(trainer: Any, saved: Mapping[str, Any]) -> None:
    """Other callbacks, such as those for early stopping, go on where they were."""
    left = {name: list(one) if isinstance(one, list) else [one] for name, one in saved.items()}
    for callback in _stateful(trainer):
        if told := left.get(type(callback).__name__):
            vars(callback).update(told.pop(0)["attributes"])


def _stateful(trainer: Any) -> list[Any]:
    """The callbacks that have a state; the control is none, as what it says is of one step."""
    found = [one for one in trainer.callback_handler.callbacks if isinstance(one, ExportableState)]
    return [one for one in found if not isinstance(one, TrainerControl)]

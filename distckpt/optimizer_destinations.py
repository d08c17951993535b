"""Where the state of an optimizer is read to, on the devices and the ranks of its parameters, and how it takes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distckpt.formats.placements import spread_beside
from distckpt.formats.shards import is_spread
from distckpt.formats.stand_ins import NewMemory, is_stand_in
from distckpt.optimizers import live_parameters, tensors_in

_STEP = "step"  # it stays on the host, and as it is, unless the optimizer wants it otherwise


class IntoOptimizer:
    """What goes into one optimizer.

    Args:
        saved: its state by number, of as many parameters as it has.
        memory: what the state is read into.
        placements: by number, how tensors are spread that are not spread like their parameters; ``None`` where no
            parameter was spread.
        dtypes: of the parameters, as they were; ``None`` where nobody knows.

    Raises:
        ValueError: where ``placements`` are none.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        saved: Any,
        memory: NewMemory,
        placements: Mapping[int, Mapping[str, Sequence[str]]] | None = None,
        dtypes: Sequence[torch.dtype | None] = (),
    ) -> None:
        self._optimizer = optimizer
        self._parameters = list(live_parameters(optimizer))
        self._are_kept = [
            dtype in (None, one.dtype)
            for one, dtype in zip(self._parameters, dtypes or [None] * len(self._parameters), strict=True)
        ]
        numbers = list(chain.from_iterable(group["params"] for group in saved["param_groups"]))
        for live, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            self._take_group(live, group, memory)
        for number, parameter in zip(numbers, self._parameters, strict=True):
            told = None if placements is None else placements.get(number, {})
            self._take(parameter, saved["state"].get(number, {}), told, memory)
        self.state = memory.replaced(saved)
        for group in self.state["param_groups"]:
            group["params"] = Positions(group["params"])
        self._numbers = numbers

    @property
    def converted(self) -> Iterator[int]:
        """Which parameters have another dtype than they had, so that their state takes another one, too."""
        for nth, parameter in enumerate(self._parameters):
            casts = [one for name, one in self._state_of(nth).items() if _is_cast(name, one, parameter.dtype)]
            if not self._are_kept[nth] and any(one.is_floating_point() for one in casts):
                yield nth

    def put_in(self) -> None:
        """The optimizer holds the state. torch casts it to the dtype of the parameters; here it keeps its own, as
        moments of 32 bits do not fit into the 16 of their parameters, unless these had another dtype then."""
        self._optimizer.load_state_dict(self.state)
        if getattr(self._optimizer.load_state_dict, "__func__", None) is not Optimizer.load_state_dict:
            return  # it has a rule of its own
        for nth, parameter in enumerate(self._parameters):
            live = self._optimizer.state.get(parameter, {})
            for name, value in self._state_of(nth).items():
                if isinstance(value, str):  # of which torch makes the name of a generator
                    live[name] = value
                elif self._is_put_back(nth, name, value) and _is_alike(live.get(name), value):
                    live[name] = value.to(parameter.device)

    def _state_of(self, nth: int) -> Mapping[str, Any]:
        state = self.state["state"].get(self._numbers[nth])
        return state if isinstance(state, dict) else {}

    def _is_put_back(self, nth: int, name: str, value: Any) -> bool:
        if not _is_cast(name, value, self._parameters[nth].dtype):
            return False
        return self._are_kept[nth] or not value.is_floating_point()

    def _take_group(self, live: Mapping[str, Any], saved: Mapping[str, Any], memory: NewMemory) -> None:
        for key, value in saved.items():
            if is_stand_in(value) and isinstance(here := live.get(key), Tensor):  # a learning rate, say
                memory.take(value, device=here.device, like=here)

    def _take(
        self, parameter: Tensor, state: Any, placements: Mapping[str, Sequence[str]] | None, memory: NewMemory
    ) -> None:
        held = self._optimizer.state.get(parameter, {})
        for path, value in tensors_in(state):
            words = None if placements is None else placements.get(path)
            if not is_stand_in(value) or (path == _STEP and not words):
                continue
            live = held.get(path)
            if isinstance(live, Tensor) and live.shape == value.shape:
                memory.take(value, device=parameter.device, like=live)
            elif is_spread(parameter) and _is_spread_otherwise(parameter, value, placements, path):
                memory.give(value, spread_beside(parameter, words, value.shape, value.dtype))
            else:
                like = parameter if words is None else None
                memory.take(value, device=parameter.device, like=like)


def _is_spread_otherwise(
    parameter: Tensor, value: Tensor, placements: Mapping[str, Sequence[str]] | None, path: str
) -> bool:
    """Whether it is spread, but not just like its parameter. What is no number was not spread by chance, where nobody
    knows: an optimizer derives it from what is."""
    if placements is None:
        return value.shape != parameter.shape and value.ndim > 0
    return bool(placements.get(path))


def _is_cast(name: str, value: Any, dtype: torch.dtype) -> bool:
    """Whether torch would cast it to the ``dtype`` of a parameter."""
    is_number = isinstance(value, Tensor) and dtype.is_floating_point
    return is_number and name != _STEP and value.dtype is not dtype


def _is_alike(live: Any, value: Tensor) -> bool:
    return isinstance(live, Tensor) and live.shape == value.shape


class Positions(list[int]):
    """The numbers of the parameters of one group: torch looks each of its moments up in them, which in a list of
    thousands takes longer than to load all else."""

    def __init__(self, numbers: Iterable[int]) -> None:
        super().__init__(numbers)
        self._known = frozenset(self)

    def __contains__(self, number: object) -> bool:
        return number in self._known

"""Where the state of an optimizer is read to, on the devices and the ranks of its parameters, and how it takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distckpt.formats.placements import spread_beside
from distckpt.formats.shards import is_spread
from distckpt.formats.spread import Spread
from distckpt.formats.stand_ins import NewMemory, is_stand_in
from distckpt.optimizer_views import View, is_here, live_parameters, load
from distckpt.optimizers import tensors_in

_STEP = "step"  # it stays on the host, and as it is, unless the optimizer wants it otherwise


class IntoOptimizer:
    """What goes into one optimizer.

    Attributes:
        state: what its ``load_state_dict`` is given.

    Args:
        saved: its state by number, of as many parameters as it has.
        memory: what the state is read into.
        placements: by number, how tensors are spread that are not spread like their parameters; ``None`` where no
            parameter was spread.
        dtypes: which the parameters had; ``None`` for one of which nobody knows. Asked for only if it matters.

    Raises:
        ValueError: where ``placements`` are none.
    """

    def __init__(
        self,
        optimizer: Optimizer | View,
        saved: Any,
        memory: NewMemory,
        placements: Mapping[int, Mapping[str, Sequence[str]]] | None,
        dtypes: Callable[[], Sequence[torch.dtype | None]],
    ) -> None:
        self._optimizer = optimizer
        self._parameters = list(live_parameters(optimizer))
        self._numbers = list(chain.from_iterable(group["params"] for group in saved["param_groups"]))
        self._cast: dict[int, list[str]] = {}  # of which parameters torch would change which state
        self._were: Sequence[torch.dtype | None] = ()
        left = {number for nth, number in enumerate(self._numbers) if not is_here(optimizer, nth)}
        saved = {**saved, "state": {number: one for number, one in saved["state"].items() if number not in left}}
        for live, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            _take_group(live, group, memory)
        for nth, (number, parameter) in enumerate(zip(self._numbers, self._parameters, strict=True)):
            told = None if placements is None else placements.get(number, {})
            self._take_all(nth, parameter, saved["state"].get(number), told, memory)
        if self._cast:
            self._were = dtypes()
        self.state = memory.replaced(saved)
        for group in self.state["param_groups"]:
            group["params"] = Positions(group["params"])

    @property
    def converted(self) -> Iterator[int]:
        """Which parameters have another dtype than they had, so that their state takes another one, too."""
        for nth, names in self._cast.items():
            state = self.state["state"][self._numbers[nth]]
            if not self._is_as_it_was(nth) and any(_is_floating(state[name]) for name in names):
                yield nth

    def put_in(self) -> list[str]:
        """The optimizer holds the state. torch casts it to the dtype of the parameters; here it keeps its own, as
        moments of 32 bits do not fit into the 16 of their parameters, unless these had another dtype then.

        Returns:
            As `distckpt.optimizer_views.load`.
        """
        exactly = {}
        for nth, names in self._cast.items():
            state = self.state["state"][self._numbers[nth]]
            exactly[nth] = [name for name in names if self._is_as_it_was(nth) or not _is_floating(state[name])]
        return load(self._optimizer, self.state, exactly)

    def _is_as_it_was(self, nth: int) -> bool:
        return self._were[nth] in (None, self._parameters[nth].dtype)

    def _take_all(
        self,
        nth: int,
        parameter: Tensor,
        state: Any,
        placements: Mapping[str, Sequence[str]] | None,
        memory: NewMemory,
    ) -> None:
        if not isinstance(state, dict):
            return
        held = self._optimizer.state.get(parameter, {})
        can_cast, dtype = parameter.dtype.is_floating_point, parameter.dtype
        for name, value in state.items():
            if isinstance(value, Tensor):
                if name != _STEP and can_cast and value.dtype is not dtype:
                    self._cast.setdefault(nth, []).append(name)
                _take(parameter, name, value, held.get(name), placements, memory)
            elif isinstance(value, str):  # of which torch makes the name of a generator
                self._cast.setdefault(nth, []).append(name)
            else:
                for path, inner in tensors_in(value, name):
                    _take(parameter, path, inner, None, placements, memory)


def _take_group(live: Mapping[str, Any], saved: Mapping[str, Any], memory: NewMemory) -> None:
    for key, value in saved.items():
        if is_stand_in(value) and isinstance(here := live.get(key), Tensor):  # a learning rate, say
            memory.take(value, device=here.device, like=here)


def _take(
    parameter: Tensor,
    path: str,
    value: Tensor,
    live: Any,
    placements: Mapping[str, Sequence[str]] | None,
    memory: NewMemory,
) -> None:
    is_known = placements is not None and not isinstance(parameter, Spread)  # which has no placements
    words = placements.get(path) if placements is not None and is_known else None
    if not is_stand_in(value) or (path == _STEP and not words):
        return
    if isinstance(live, Tensor) and live.shape == value.shape:
        memory.take(value, device=parameter.device, like=live)
    elif is_spread(parameter) and _is_spread_otherwise(parameter, value, words, is_known=is_known):
        memory.give(value, spread_beside(parameter, words, value.shape, value.dtype))
    else:
        memory.take(value, device=parameter.device, like=parameter if words is None else None)


def _is_spread_otherwise(parameter: Tensor, value: Tensor, words: Sequence[str] | None, *, is_known: bool) -> bool:
    """Whether it is spread, but not just like its parameter. Where nobody knows, whatever is no single number is: an
    optimizer derives it from what is spread."""
    return bool(words) if is_known else value.shape != parameter.shape and value.ndim > 0


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class Positions(list[int]):
    """The numbers of the parameters of one group: torch looks each of its moments up in them, which in a list of
    thousands takes longer than to load all else."""

    def __init__(self, numbers: Iterable[int]) -> None:
        super().__init__(numbers)
        self._known = frozenset(self)

    def __contains__(self, number: object) -> bool:
        return number in self._known

"""Optimizers of which each rank has a part, seen as if there was one for the whole: by all parameters, as they were
before they were flattened or shared out, and with what this rank has of their state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distckpt.flat_parameters import Original, originals_in
from distckpt.formats.spread import Range

_STATE, _GROUPS, _PARAMS = "state", "param_groups", "params"
_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"  # not imported: that takes long

_ONE = ", with which it is one flat parameter"


class View(Protocol):
    """An optimizer in the whole."""

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]:
        """With all parameters."""
        ...

    @property
    def state(self) -> Mapping[Tensor, Any]:
        """What is here of the state of parameters that are whole here."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """As that of an optimizer. No collective.

        Raises:
            TypeError: naming state of which it cannot be said what it is in the whole.
        """
        ...

    def is_here(self, nth: int) -> bool:
        """See `is_here`."""
        ...

    def load(self, state: dict[str, Any], exactly: Mapping[int, Sequence[str]]) -> list[str]:
        """See `load`."""
        ...


def seen(optimizer: Optimizer, modules: Iterable[nn.Module]) -> Optimizer | View:
    """``optimizer``, as it is in the whole."""
    is_zero = any(kind.__module__ == _ZERO for kind in type(optimizer).__mro__)
    if is_zero and isinstance(getattr(optimizer, "optim", None), Optimizer):  # overlap_with_ddp= has another
        return _SharedOut(optimizer)
    by_owner: dict[int, list[Original]] = {}
    for module in modules:
        for original, _ in originals_in(module):
            by_owner.setdefault(id(original.owner), []).append(original)
    if by_owner and any(id(one) in by_owner for one in live_parameters(optimizer)):
        return _Flattened(optimizer, by_owner)
    return optimizer


def live_parameters(optimizer: Optimizer | View) -> Iterator[Tensor]:
    """The parameters of ``optimizer``, in the order of its groups."""
    return chain.from_iterable(group[_PARAMS] for group in optimizer.param_groups)


def is_here(optimizer: Optimizer | View, nth: int) -> bool:
    """Whether this rank has state of that parameter, if there is any."""
    return isinstance(optimizer, Optimizer) or optimizer.is_here(nth)


def has_order(optimizer: Optimizer | View) -> bool:
    """Whether its parameters are in the order in which they were given to it."""
    return not isinstance(optimizer, _Flattened) or optimizer.has_order


def load(optimizer: Optimizer | View, state: dict[str, Any], exactly: Mapping[int, Sequence[str]]) -> list[str]:
    """``optimizer`` holds the state, by number.

    Args:
        exactly: by how-manieth of the parameters, what of its state stays as it is. torch casts it to the dtype of the
            parameter.

    Returns:
        What is not as it was, as there is one of it for several parameters.
    """
    if not isinstance(optimizer, Optimizer):
        return optimizer.load(state, exactly)
    optimizer.load_state_dict(state)
    if getattr(optimizer.load_state_dict, "__func__", None) is not Optimizer.load_state_dict:
        return []  # it has a rule of its own
    numbers = _numbers(state)
    parameters = list(live_parameters(optimizer))
    for nth, names in exactly.items():
        parameter = parameters[nth]
        live, given = optimizer.state.get(parameter, {}), state[_STATE][numbers[nth]]
        for name in names:
            if name in live:
                value = given[name]
                live[name] = value.to(parameter.device) if isinstance(value, Tensor) else value
    return []


def _numbers(state: Mapping[str, Any]) -> list[Any]:
    return list(chain.from_iterable(group[_PARAMS] for group in state[_GROUPS]))


class _SharedOut:
    """A ``ZeroRedundancyOptimizer``: each rank has the state of some parameters, whole."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        mine = {id(one) for one in live_parameters(optimizer.optim)}
        self._is_here = [id(one) in mine for one in live_parameters(optimizer)]

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]:
        groups: Sequence[Mapping[str, Any]] = self._optimizer.param_groups
        return groups

    @property
    def state(self) -> Mapping[Tensor, Any]:
        state: Mapping[Tensor, Any] = self._optimizer.optim.state
        return state

    def state_dict(self) -> dict[str, Any]:
        given = self._optimizer.optim.state_dict()
        number_of = {id(one): number for number, one in enumerate(live_parameters(self))}
        mine = zip(_numbers(given), live_parameters(self._optimizer.optim), strict=True)
        state = {number_of[id(one)]: given[_STATE][number] for number, one in mine if number in given[_STATE]}
        groups = [{**group, _PARAMS: [number_of[id(one)] for one in group[_PARAMS]]} for group in self.param_groups]
        return {**given, _STATE: state, _GROUPS: groups}

    def is_here(self, nth: int) -> bool:
        return self._is_here[nth]

    def load(self, state: dict[str, Any], exactly: Mapping[int, Sequence[str]]) -> list[str]:
        self._optimizer.load_state_dict(state)  # which casts nothing
        return []


class _Flattened:
    """An optimizer of parameters that FSDP1 flattened: of the state of each, this rank has a range."""

    state: Mapping[Tensor, Any] = {}

    def __init__(self, optimizer: Optimizer, by_owner: Mapping[int, Sequence[Original]]) -> None:
        self._optimizer = optimizer
        self._by_owner = by_owner
        self._of = [by_owner.get(id(one), ()) for one in live_parameters(optimizer)]
        self._places = [(nth, original) for nth, of in enumerate(self._of) for original in of or (None,)]
        self._known: dict[tuple[int, str, int], tuple[Tensor, Range]] = {}

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]:
        return [
            {**group, _PARAMS: [tensor for one in group[_PARAMS] for tensor in self._seen(one)]}
            for group in self._optimizer.param_groups
        ]

    def _seen(self, parameter: Tensor) -> Sequence[Tensor]:
        of = self._by_owner.get(id(parameter))
        return [parameter] if of is None else [original.tensor for original in of]

    @property
    def has_order(self) -> bool:
        return all(original is None or original.is_all for _, original in self._places)

    def state_dict(self) -> dict[str, Any]:
        given = self._optimizer.state_dict()
        numbers = _numbers(given)
        state = {}
        for number, (nth, original) in enumerate(self._places):
            if numbers[nth] in given[_STATE] and self.is_here(number):
                mine = given[_STATE][numbers[nth]]
                state[number] = mine if original is None else self._parts(nth, original, mine)
        groups, at = [], 0
        for group, whole in zip(given[_GROUPS], self.param_groups, strict=True):
            inside = range(at, at := at + len(whole[_PARAMS]))
            groups.append({**group, _PARAMS: [*inside]})
        return {**given, _STATE: state, _GROUPS: groups}

    def is_here(self, nth: int) -> bool:
        # Where a parameter has no element here, an optimizer leaves what it may have of its state as it is.
        _, original = self._places[nth]
        return original is None or not original.is_all or bool(len(original.tensor.elements))

    def _parts(self, nth: int, original: Original, state: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._part(nth, name, original, value) for name, value in state.items()}

    def _part(self, nth: int, name: str, original: Original, value: Any) -> Any:
        """What of ``value`` is of that parameter; the same object, if it is the same tensor as the last time."""
        if not isinstance(value, (Tensor, dict, list, tuple)) or (isinstance(value, Tensor) and not value.ndim):
            return value
        if not isinstance(value, Tensor) or value.shape != (original.size,):
            told = f"the shape {tuple(value.shape)}" if isinstance(value, Tensor) else "several values"
            raise TypeError(
                f"{name} of {original.name} has {told}, and the part of the parameter that is here has "
                f"{original.size} elements: nobody knows what it is in the whole, which FullyShardedDataParallel "
                "(FSDP1) has cut. Wrap the model in torch.distributed.fsdp.fully_shard instead"
            )
        key = nth, name, id(original)
        before, known = self._known.get(key, (None, None))
        if known is None or before is not value:
            known = original.tensor.of(value[original.begin : original.begin + len(original.tensor.elements)])
            self._known[key] = value, known
        return known

    def load(self, state: dict[str, Any], exactly: Mapping[int, Sequence[str]]) -> list[str]:
        self._known.clear()
        numbers = _numbers(state)
        of_each: list[list[tuple[Original | None, Mapping[str, Any] | None]]] = [[] for _ in self._of]
        kept: dict[int, list[str]] = {}
        for number, (nth, original) in enumerate(self._places):
            of_each[nth].append((original, state[_STATE].get(numbers[number])))
            kept.setdefault(nth, []).extend(exactly.get(number, ()))
        found, told = {}, list[str]()
        for nth, held in enumerate(of_each):
            if any(one for _, one in held):
                found[nth] = _joined(held, told)
        groups, at = [], 0
        for group, live in zip(state[_GROUPS], self._optimizer.param_groups, strict=True):
            inside = range(at, at := at + len(live[_PARAMS]))
            groups.append({**group, _PARAMS: type(group[_PARAMS])(inside)})
        left = {nth: [name for name in dict.fromkeys(of) if name in found[nth]] for nth, of in kept.items() if of}
        load(self._optimizer, {**state, _STATE: found, _GROUPS: groups}, left)
        return told


def _joined(held: Sequence[tuple[Original | None, Mapping[str, Any] | None]], told: list[str]) -> Mapping[str, Any]:
    """The state of what an optimizer has, of the originals that it consists of; ``told`` is what that makes another."""
    first, state = next(one for one in held if one[1] is not None)
    if first is None or state is None:
        return state or {}
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(chain.from_iterable(one or () for _, one in held)):
        values = [(original, one[name]) for original, one in held if original is not None and one and name in one]
        parts = [(original, value) for original, value in values if isinstance(value, Range)]
        joined[name] = _elements(parts, first) if parts else _one_of(name, values, told)
    told += [
        f"{original.name} (there is nothing of it, so it has zeros, as {first.name} has something{_ONE})"
        for original, one in held
        if original is not None and one is None
    ]
    return joined


def _elements(values: Sequence[tuple[Original, Range]], first: Original) -> Tensor:
    if first.is_all:
        return values[0][1].elements
    whole = values[0][1].elements.new_zeros(first.size)
    for original, value in values:
        whole[original.begin : original.begin + len(value.elements)].copy_(value.elements)
    return whole


def _one_of(name: str, values: Sequence[tuple[Original, Any]], told: list[str]) -> Any:
    """The largest of numbers that should be one: an optimizer counts the steps that it took."""
    original, value = max(values, key=lambda one: one[1]) if len(values) > 1 and _are_numbers(values) else values[0]
    for other, another in values:
        if another is not value and not torch.equal(torch.as_tensor(another), torch.as_tensor(value)):
            told.append(f"{other.name} (its {name} was {another}, and is {value} as that of {original.name}{_ONE})")
    return value


def _are_numbers(values: Sequence[tuple[Original, Any]]) -> bool:
    return all(isinstance(one, (int, float)) or (isinstance(one, Tensor) and not one.ndim) for _, one in values)

"""The state of optimizers by the names of parameters, so that it means the same however a model is cut or grouped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from distckpt.wrappers import canonical_keys

_STATE, _GROUPS, _PARAMS = "state", "param_groups", "params"


def parameter_names(optimizer: Optimizer, modules: Mapping[str, nn.Module]) -> list[str]:
    """What each parameter of ``optimizer`` is called, in the order of its groups: as in the module that has it, with
    the name of that part of the state before it where several do. One that no module has is called by its number."""
    ours = [parameter for group in optimizer.param_groups for parameter in group[_PARAMS]]
    wanted = {id(parameter) for parameter in ours}
    found: dict[int, tuple[str, str]] = {}
    for part, module in modules.items():
        names = {key: one for key, one in module.named_parameters() if id(one) in wanted}
        for key, canonical in canonical_keys(module, names).items():
            found.setdefault(id(names[key]), (part, canonical))
    is_one = len({part for part, _ in found.values()}) == 1
    return [
        f"unnamed.{number}" if (name := found.get(id(one))) is None else name[1] if is_one else ".".join(name)
        for number, one in enumerate(ours)
    ]


def by_name(state: Any, names: list[str]) -> Any:
    """The ``state_dict`` of an optimizer, with names where it has numbers. What has another form is left as it is."""
    if not _has_form(state):
        return state
    numbers = list(chain.from_iterable(group[_PARAMS] for group in state[_GROUPS]))
    if len(numbers) != len(names):
        return state
    name_of = dict(zip(numbers, names, strict=True))
    return {
        **state,
        _STATE: {name_of.get(key, key): one for key, one in state[_STATE].items()},
        _GROUPS: [{**group, _PARAMS: [name_of[one] for one in group[_PARAMS]]} for group in state[_GROUPS]],
    }


def is_by_name(state: Any) -> bool:
    """Whether that is what `by_name` makes."""
    return _has_form(state) and all(type(one) is str for group in state[_GROUPS] for one in group[_PARAMS])


def by_number(saved: Any, optimizer: Optimizer, names: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What ``load_state_dict`` of ``optimizer`` is to be given; and what of it does not fit, for people.

    Groups may be others than those that were saved: the values of a group are those that all of its parameters had.
    """
    group_of = {name: group for group in saved[_GROUPS] for name in group[_PARAMS]}
    wrong: list[str] = []
    groups: list[dict[str, Any]] = []
    number = 0
    for live in optimizer.param_groups:
        mine = names[number : number + len(live[_PARAMS])]
        wrong += [f"{name} (in no group)" for name in mine if name not in group_of]
        values, differing = _values_of([group_of[name] for name in mine if name in group_of])
        wrong += [f"{key} of the group of {mine[0]}, whose parameters had several" for key in differing]
        kept = {key: value for key, value in live.items() if key != _PARAMS}
        groups.append({**kept, **values, _PARAMS: list(range(number, number + len(mine)))})
        number += len(mine)
    known = set(names)
    wrong += [f"{name} (not there any more)" for name in group_of if name not in known]
    state = {nth: saved[_STATE][name] for nth, name in enumerate(names) if name in saved[_STATE]}
    state |= {key: one for key, one in saved[_STATE].items() if not isinstance(key, str)}
    return {**saved, _STATE: state, _GROUPS: groups}, wrong


def _values_of(groups: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What all of these groups have in common beside their parameters; and the keys of which they have several."""
    distinct = list({id(group): group for group in groups}.values())
    if not distinct:
        return {}, []
    first = {key: value for key, value in distinct[0].items() if key != _PARAMS}
    differing = [key for key, value in first.items() if any(not _same(value, one.get(key)) for one in distinct[1:])]
    return {key: value for key, value in first.items() if key not in differing}, differing


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return bool(one == other)


def _has_form(state: Any) -> bool:
    if not isinstance(state, dict) or not isinstance(state.get(_STATE), dict):
        return False
    groups = state.get(_GROUPS)
    return isinstance(groups, list) and all(
        isinstance(one, dict) and isinstance(one.get(_PARAMS), list) for one in groups
    )


def live_parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    """The parameters of ``optimizer``, in the order of its groups."""
    return chain.from_iterable(group[_PARAMS] for group in optimizer.param_groups)

"""The state of optimizers by the names of parameters, so that it means the same however a model is cut or grouped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from distckpt.flat_parameters import parameters_of
from distckpt.formats.placements import describe
from distckpt.formats.shards import is_spread
from distckpt.optimizer_views import View, live_parameters
from distckpt.wrappers import canonical_keys

_STATE, _GROUPS, _PARAMS = "state", "param_groups", "params"
_PLACEMENTS = "placements"
_OF_PARAMETERS = (_PARAMS, "param_names")  # what a group says of its parameters, and not of itself


@dataclass(frozen=True)
class Member:
    """A parameter of an optimizer.

    Attributes:
        name: what it is called, see `members_of`.
        places: where the state of modules has it: the part and the key of each of its names.
        short: which of its keys are those of no other parameter, whatever the part.
    """

    name: str
    places: Sequence[tuple[str, str]] = ()
    short: Sequence[str] = ()

    @property
    def others(self) -> Iterator[str]:
        """What it may be called in a checkpoint of a program that ties or groups parameters otherwise."""
        yield from self.short
        for part, key in self.places:
            yield f"{part}.{key}"


def members_of(optimizer: Optimizer | View, modules: Mapping[str, nn.Module]) -> list[Member]:
    """The parameters of ``optimizer``, in the order of its groups.

    Each is called as in the module that has it, by the first of its names there, with the name of that part of the
    state before it where the optimizer has parameters of several. One that no module has is called by its number.
    """
    ours = list(live_parameters(optimizer))
    wanted = {id(one) for one in ours}
    found: dict[int, list[tuple[str, str]]] = {}
    for part, module in modules.items():
        names = {key: id(one) for key, one in parameters_of(module).items() if id(one) in wanted}
        for key, canonical in canonical_keys(module, names).items():
            found.setdefault(names[key], []).append((part, canonical))
    has_one_part = len({places[0][0] for places in found.values()}) == 1
    # Without its part, the same key may be that of several.
    times = Counter(key for places in found.values() for key in {key for _, key in places})
    return [_member(nth, found.get(id(one), ()), times, has_one_part=has_one_part) for nth, one in enumerate(ours)]


def _member(nth: int, places: Sequence[tuple[str, str]], times: Mapping[str, int], *, has_one_part: bool) -> Member:
    if not places:
        return Member(f"unnamed.{nth}")
    name = places[0][1] if has_one_part else ".".join(places[0])
    return Member(name, places, [key for _, key in places if times[key] == 1])


def by_name(state: Any, optimizer: Optimizer | View, members: Sequence[Member]) -> Any:
    """The ``state_dict`` of ``optimizer``, with names where it has numbers: of parameters; and of groups, which are
    called like the first parameter in them, so that those of other ranks are others. What has another form is left as
    it is.

    Where parameters are spread over ranks, it says how their state is that is not spread like them.
    """
    if not _has_form(state):
        return state
    numbers = list(chain.from_iterable(group[_PARAMS] for group in state[_GROUPS]))
    if len(numbers) != len(members):
        return state
    name_of = {number: member.name for number, member in zip(numbers, members, strict=True)}
    named = {name_of.get(key, key): one for key, one in state[_STATE].items()}
    groups = {}
    for nth, group in enumerate(state[_GROUPS]):
        inside = [name_of[one] for one in group[_PARAMS]]
        values = {key: value for key, value in group.items() if key not in _OF_PARAMETERS}
        groups[inside[0] if inside else _empty(nth)] = {**values, _PARAMS: inside}
    told = _placements(named, optimizer, members)
    return {**state, _STATE: named, _GROUPS: groups} | ({} if told is None else {_PLACEMENTS: told})


def is_by_name(state: Any) -> bool:
    """Whether that is what `by_name` makes."""
    if not isinstance(state, dict) or not isinstance(state.get(_STATE), dict):
        return False
    groups = state.get(_GROUPS)
    return isinstance(groups, dict) and all(map(_is_group, groups.values()))


@dataclass
class Numbered:
    """What `by_number` makes.

    Attributes:
        state: what ``load_state_dict`` is to be given.
        placements: by the number of a parameter, how its state is spread that is not spread like it; ``None`` where
            the parameters were not spread.
        missing: parameters that the checkpoint has in no group.
        unexpected: parameters of the checkpoint that there are none of here.
        differing: values of a group of which its parameters had several: it keeps its own.
        kept: values of a group that the checkpoint has none of: it keeps its own.
    """

    state: dict[str, Any]
    placements: Mapping[int, Mapping[str, Sequence[str]]] | None = None
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def by_number(saved: Any, optimizer: Optimizer | View, members: Sequence[Member]) -> Numbered:
    """What ``optimizer`` is to be given of ``saved``, which is `by_name`.

    Groups may be others than those that were saved: the values of a group are those that all of its parameters had.
    """
    group_of = {name: group for group in saved[_GROUPS].values() for name in group[_PARAMS]}
    names = [_called(member, group_of) for member in members]
    numbered = Numbered({})
    groups: list[dict[str, Any]] = []
    number = 0
    for nth, live in enumerate(optimizer.param_groups):
        inside = range(number, number + len(live[_PARAMS]))
        known = {name: group_of[name] for one in inside if (name := names[one]) in group_of}
        if not inside and (empty := saved[_GROUPS].get(_empty(nth))) is not None:
            known = {_empty(nth): empty}
        called = members[number].name if inside else _empty(nth)
        groups.append({**_values(live, known, called, numbered), _PARAMS: [*inside]})
        number += len(inside)
    numbered.missing = [member.name for member, name in zip(members, names, strict=True) if name not in group_of]
    taken = set(names)
    numbered.unexpected = [name for name in group_of if name not in taken]
    found = {nth: saved[_STATE][name] for nth, name in enumerate(names) if name in saved[_STATE]}
    of_nobody = {key: one for key, one in saved[_STATE].items() if key not in group_of}
    rest = {key: value for key, value in saved.items() if key != _PLACEMENTS}
    numbered.state = {**rest, _STATE: found | of_nobody, _GROUPS: groups}
    if (placements := saved.get(_PLACEMENTS)) is not None:
        numbered.placements = {nth: placements[name] for nth, name in enumerate(names) if name in placements}
    return numbered


def _called(member: Member, known: Mapping[str, Any]) -> str:
    if member.name in known:
        return member.name
    return next((name for name in member.others if name in known), member.name)


def _values(
    live: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]], called: str, numbered: Numbered
) -> dict[str, Any]:
    """The values of a group here, whose parameters were in the groups ``known``, by their names."""
    values = {key: value for key, value in live.items() if key != _PARAMS}
    if not known:
        return values
    named: dict[int, tuple[str, Mapping[str, Any]]] = {}
    for name, group in known.items():
        named.setdefault(id(group), (name, group))
    (first_name, first), *_ = groups = list(named.values())
    for key in dict.fromkeys(chain.from_iterable(group for _, group in groups)):
        if key in _OF_PARAMETERS:
            continue
        other = next(((name, one.get(key)) for name, one in groups if not _same(one.get(key), first.get(key))), None)
        if other is None:
            values[key] = first[key]
        else:
            told = f"{_word(first.get(key))} of {first_name}, {_word(other[1])} of {other[0]}"
            numbered.differing.append(f"{key} of the group of {called} ({told})")
    absent = [key for key in values if key not in _OF_PARAMETERS and not any(key in group for _, group in groups)]
    numbered.kept += [f"{key} of the group of {called}" for key in absent]
    return values


def _word(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else ascii(value)[:40]


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)
    except (ValueError, RuntimeError):  # arrays, and what has some in it
        return False


def _empty(nth: int) -> str:
    """The name of a group without parameters, of which only its place is known."""
    return f"empty.{nth}"


def _has_form(state: Any) -> bool:
    if not isinstance(state, dict) or not isinstance(state.get(_STATE), dict):
        return False
    groups = state.get(_GROUPS)
    return isinstance(groups, list) and all(map(_is_group, groups))


def _is_group(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get(_PARAMS), list)


def _placements(
    state: Mapping[Any, Any], optimizer: Optimizer | View, members: Sequence[Member]
) -> dict[str, dict[str, list[str]]] | None:
    """How the tensors of ``state`` are spread that are not spread like their parameters; ``None`` where no parameter
    is spread."""
    told: dict[str, dict[str, list[str]]] = {}
    is_any_spread = False
    for member, parameter in zip(members, live_parameters(optimizer), strict=True):
        if not is_spread(parameter):
            continue
        is_any_spread = True
        found = {}
        for path, tensor in tensors_in(state.get(member.name, {})):
            if is_spread(tensor) != (tensor.shape == parameter.shape):
                found[path] = describe(tensor)
        if found:
            told[member.name] = found
    return told if is_any_spread else None


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in the state of one parameter, each with its keys, and its places in lists, with dots between."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (dict, list, tuple)):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_in(one, f"{path}.{key}" if path else str(key))

"""One state of what several ranks knew of it: where each has other layers, or other experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Place = tuple[object, ...]


def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is in any of ``states``; where several have a value for a key, the first one's. In the order of the first.

    Dicts are merged key by key. Groups of parameters, by the names of the parameters in them: each is in one group, as
    in the first state that has it.
    """
    first: dict[str, Any] = dict(states[0])
    for other in states[1:]:
        first = _with(first, other)
    return first


def places_in(state: Mapping[str, Any], place: Place = ()) -> Iterator[Place]:
    """What `merged` takes from ``state``, if no state before has it: each key with those around it, and each name of a
    parameter with those around its group. Of two states with the same places the first one is enough."""
    for key, value in state.items():
        here = (*place, key)
        yield here
        if isinstance(value, dict):
            yield from places_in(value, here)
            if key == "param_groups" and _are_groups(value):
                yield from ((*here, "params", name) for group in value.values() for name in group["params"])


def _with(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(one)
    for key, value in other.items():
        if key not in both:
            both[key] = value
        elif key == "param_groups" and _are_groups(both[key]) and _are_groups(value):
            both[key] = _grouped(both[key], value)
        elif isinstance(value, dict) and isinstance(both[key], dict):
            both[key] = _like(both[key], _with(both[key], value))
    return both


def _like(one: dict[str, Any], both: dict[str, Any]) -> dict[str, Any]:
    """``both``, of the type of ``one``."""
    if type(one) is dict:
        return both
    same = type(one)()
    same.update(both)
    return same


def _are_groups(value: Any) -> bool:
    """Whether these are groups of parameters by name, see `distckpt.optimizers.by_name`."""
    return isinstance(value, dict) and all(isinstance(one, dict) and "params" in one for one in value.values())


def _grouped(groups: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The groups, and of the others what has names that are in none of these."""
    known = {name for group in groups.values() for name in group["params"]}
    found = dict(groups)
    for called, group in more.items():
        new = [name for name in group["params"] if name not in known]
        if new:
            found[new[0]] = {**group, "params": new}
        elif not group["params"]:
            found.setdefault(called, group)
    return found

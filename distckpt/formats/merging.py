"""One state of what several ranks knew of it: where each has other layers, or other experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is in any of ``states``; where several have a value for a key, the first one's. In the order of the first.

    Dicts are merged key by key. Groups of parameters, by the names of the parameters in them.
    """
    first: dict[str, Any] = dict(states[0])
    for other in states[1:]:
        first = _with(first, other)
    return first


def _with(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(one)
    for key, value in other.items():
        if key not in both:
            both[key] = value
        elif key == "param_groups" and isinstance(value, list):
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


def _grouped(groups: list[Any], more: list[Any]) -> list[Any]:
    """The groups, and of the others what has names that are in none of these."""
    known = {name for group in groups for name in group["params"]}
    found = list(groups)
    for group in more:
        if new := [name for name in group["params"] if name not in known]:
            found.append({**group, "params": new})
    return found

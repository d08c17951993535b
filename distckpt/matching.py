"""A checkpoint laid beside the objects that it is for: what fits, what does not, and what is put in."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distckpt import rng
from distckpt.destinations import IntoModule, Positions, take_beside
from distckpt.errors import StateMismatch
from distckpt.formats import Snapshot
from distckpt.formats.stand_ins import NewMemory
from distckpt.manifest import Record
from distckpt.optimizers import by_number, is_by_name
from distckpt.selection import Selection
from distckpt.state import RNG, Parts
from distckpt.wrappers import canonical_keys

# A model of another kind misses thousands of keys; the first few say so, and each nearest name costs a search.
_SHOWN = 20


@dataclass
class Report:
    """What a restore finds when it lays a checkpoint beside the objects that it is for.

    Attributes:
        in_place: those of ``loaded`` that are read straight into live tensors.
    """

    loaded: list[str] = field(default_factory=list)
    in_place: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return not (self.missing or self.unexpected or self.wrong_shape)

    @property
    def inexact(self) -> set[str]:
        """The parts that are not, whole, what they were in the checkpoint."""
        names = (*self.missing, *self.wrong_shape, *self.converted, *self.left)
        return {re.split("[ .]", name, maxsplit=1)[0] for name in names}

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} loaded"]
        for title, names in (
            ("missing in the checkpoint", self.missing),
            ("in the checkpoint alone", self.unexpected),
            ("of another shape", self.wrong_shape),
            ("converted", self.converted),
        ):
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                lines.append(f"{len(names)} {title}: {', '.join(names[:_SHOWN])}{more}")
        return "; ".join(lines)


@dataclass(frozen=True)
class Matched:
    """State that fits, not yet put in; see `distckpt.restoring.Fitted`.

    Attributes:
        ready: what puts each part in, once the targets are filled.
        targets: stand-ins, and the tensors that they are read into: live ones, and new ones that ``ready`` puts in.
    """

    parts: Parts
    ready: Mapping[str, Callable[[], object]]
    targets: Sequence[tuple[Tensor, Tensor]]
    rng_state: Mapping[str, Any] | None
    report: Report

    def exactness(self, record: Record) -> str:
        """How exact a resume from ``record`` is, in one line for people."""
        report = self.report
        whole = [name for name in self.ready if name not in report.inexact]
        rest = [name for name in (*self.parts.shared, *self.parts.own) if name not in whole]
        (whole if self.rng_state is not None else rest).append(f"{RNG} of {record.world_size} ranks")
        told = f"resumed {record.name} (step {record.progress.step}, epoch {record.progress.epoch})"
        told += f"  exact: {', '.join(whole) or 'nothing'}"
        told += f"  not exact: {', '.join(rest)}" if rest else ""
        return told if report.is_whole and not report.converted else f"{told}  ({report})"

    def apply(self) -> None:
        """The objects hold the state. The random number generators are set last."""
        for put_in in self.ready.values():
            put_in()
        if self.rng_state is not None:
            rng.apply(self.rng_state)


def match(parts: Parts, snapshot: Snapshot, selection: Selection, *, strict: bool, is_same_world: bool) -> Matched:
    """What would be put where. Changes nothing. Takes memory for what is not read into live tensors.

    Raises:
        StateMismatch: with the whole report, if ``strict`` and anything is missing, unexpected or misshapen; or where
            ``selection`` cannot be what is meant.
    """
    report = Report()
    memory = NewMemory()
    into: list[IntoModule] = []
    ready: dict[str, Callable[[], object]] = {}
    live = parts.shared | (parts.own if is_same_world else {})
    saved = {**snapshot.shared, **{name: one for name, one in snapshot.own.items() if name != RNG}}
    for name in parts.own if not is_same_world else ():
        report.left.append(name)
    for name, part in live.items():
        if not selection.takes_part(name):
            report.left.append(name)
        elif name not in saved:
            report.missing.append(f"{name} (the whole part{_nearest(name, saved)})")
        elif isinstance(part, nn.Module):
            into.append(_match_module(name, part, saved[name], selection, report, memory))
            ready[name] = into[-1].put_in
        elif word := selection.word_for_keys_of(name):
            raise StateMismatch(f"{word}= names keys of {name}, which is no module: it is taken whole or not at all")
        elif isinstance(part, torch.optim.Optimizer) and is_by_name(saved[name]):
            state, wrong = by_number(saved[name], part, parts.names_in(part))
            report.wrong_shape += [f"{name}: {one}" for one in wrong]
            ready[name] = partial(part.load_state_dict, _loadable(part, state, memory))
            report.loaded.append(name)
        elif misfit := _misfit(name, part, saved[name]):
            report.wrong_shape.append(misfit)
        else:
            ready[name] = partial(part.load_state_dict, _loadable(part, saved[name], memory))
            report.loaded.append(name)
    report.unexpected += [
        f"{name} (the whole part)"
        for name in saved
        if name not in parts.shared and name not in parts.own and selection.takes_part(name)
    ]
    if strict and not report.is_whole:
        raise StateMismatch(
            f"the checkpoint does not fit: {report}. Nothing of it was put in. Use only=, exclude= or rename= to say "
            "what is meant, or strict=False to take what fits"
        )
    has_rng = is_same_world and RNG in snapshot.own and selection.takes_part(RNG)
    if selection.only is not None and report.is_whole and not report.loaded and not has_rng:
        raise StateMismatch(f"only= takes nothing: {', '.join(selection.only)}; there are {', '.join(live)}")
    rng_state = snapshot.own[RNG] if has_rng else None
    targets = [*(pair for one in into for pair in one.targets), *memory.targets]
    return Matched(parts, ready, targets, rng_state, report)


def _loadable(part: Any, saved: Any, memory: NewMemory) -> Any:
    """What ``load_state_dict`` of ``part`` is to be given."""
    if not isinstance(part, torch.optim.Optimizer):
        return memory.replaced(saved)
    take_beside(part, saved, memory)
    state = memory.replaced(saved)
    for group in state["param_groups"]:
        group["params"] = Positions(group["params"])
    return state


def _match_module(
    name: str, module: nn.Module, saved: Any, selection: Selection, report: Report, memory: NewMemory
) -> IntoModule:
    if not isinstance(saved, dict):
        raise StateMismatch(f"{name} is a module here, and a {type(saved).__name__} in the checkpoint")
    live = module.state_dict()
    keys = canonical_keys(module, live)
    found = _without_foreign_prefix(_renamed(name, saved, selection), set(keys.values()))
    into = IntoModule(module, live, memory)
    for key, canonical in keys.items():
        if not selection.takes(name, canonical):
            report.left.append(f"{name}.{canonical}")
        elif canonical not in found:
            near = _nearest(canonical, found) if len(report.missing) < _SHOWN else ""
            report.missing.append(f"{name}.{canonical}{near}")
        elif not _fits(key, live[key], found[canonical]):
            report.wrong_shape.append(
                f"{name}.{canonical} ({_shape(found[canonical])} there, {_shape(live[key])} here)"
            )
        else:
            report.loaded.append(f"{name}.{canonical}")
            if into.take(key, found[canonical]):
                report.in_place.append(report.loaded[-1])
            if _is_converted(live[key], found[canonical]):
                there, here = (str(one.dtype).removeprefix("torch.") for one in (found[canonical], live[key]))
                report.converted.append(f"{name}.{canonical} ({there} there, {here} here)")
    known = set(keys.values())
    unexpected = [key for key in found if key not in known and selection.takes(name, key)]
    report.unexpected += [f"{name}.{key}{_nearest(key, known)}" for key in unexpected[:_SHOWN]]
    report.unexpected += [f"{name}.{key}" for key in unexpected[_SHOWN:]]
    return into


def _renamed(name: str, saved: dict[str, Any], selection: Selection) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in saved.items():
        if (called := selection.renamed(key)) in renamed:
            raise StateMismatch(f"rename= makes {name}.{called} of two keys of the checkpoint, one of them {key}")
        renamed[called] = value
    return renamed


def _misfit(name: str, part: Any, saved: Any) -> str:
    if isinstance(part, torch.optim.Optimizer):
        here = [len(group["params"]) for group in part.param_groups]
        there = [len(group["params"]) for group in saved.get("param_groups", [])] if isinstance(saved, dict) else []
        if here != there:
            return f"{name} (groups of {there} parameters there, of {here} here)"
    return ""


def _without_foreign_prefix(saved: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Keys that another library saved from inside wrappers lose their prefixes, where ours have none."""
    for prefix in ("module.", "_orig_mod.") * 2:
        if saved and all(key.startswith(prefix) for key in saved) and not any(one.startswith(prefix) for one in known):
            saved = {key.removeprefix(prefix): value for key, value in saved.items()}
    return saved


def _fits(key: str, live: Any, found: Any) -> bool:
    if type(live) is Tensor and type(found) is Tensor and live.shape == found.shape:
        return True
    if key.rpartition(".")[2] == "_extra_state":
        return True  # what get_extra_state returned, whatever it is
    if isinstance(live, Tensor) and isinstance(found, Tensor) and nn.parameter.is_lazy(live):
        return True  # takes the shape that it is given
    return bool(_shape(live) == _shape(found))


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor) and not nn.parameter.is_lazy(value):
        return tuple(value.shape)
    return "anything"


def _is_converted(live: Any, found: Any) -> bool:
    return isinstance(live, Tensor) and isinstance(found, Tensor) and live.dtype != found.dtype


def _nearest(name: str, among: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(among), n=1, cutoff=0.8)
    return f", there is {close[0]}" if close else ""

"""A checkpoint laid beside the objects that it is for: what fits, what does not, and what is put in."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distckpt import rng
from distckpt.errors import StateMismatch
from distckpt.formats import Snapshot
from distckpt.manifest import Record
from distckpt.state import RNG, Parts, canonical_keys

# A model of another kind misses thousands of keys; the first few say so, and each nearest name costs a search.
_SHOWN = 20


@dataclass(frozen=True)
class Selection:
    """Which of a checkpoint's contents are wanted, and how their keys are called here.

    Attributes:
        only, exclude: patterns, as in a shell, of parts (``"optimizer"``) or of keys in them (``"model.head.*"``).
        rename: regular expressions for keys of modules in the checkpoint, and what replaces them.
    """

    only: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    rename: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, only: object, exclude: object, rename: object) -> Selection:
        """The user's words, checked.

        Raises:
            TypeError, ValueError: naming the word.
        """
        wanted = _patterns(only, "only")
        names = {} if rename is None else rename
        if not isinstance(names, Mapping) or not all(isinstance(one, str) for pair in names.items() for one in pair):
            raise TypeError(f"rename should be a dict of regular expressions and replacements, is {rename!r}")
        for pattern, replacement in names.items():
            try:
                re.sub(pattern, replacement, "")
            except (re.error, IndexError) as error:  # IndexError: a group that is not there
                raise ValueError(
                    f"rename: {pattern!r} is no regular expression, or {replacement!r} no replacement for it: {error}"
                ) from error
        return cls(wanted, _patterns(exclude, "exclude") or (), dict(names))

    def takes_part(self, part: str) -> bool:
        """Whether anything of that part is wanted."""
        if any(fnmatch.fnmatchcase(part, pattern) for pattern in self.exclude):
            return False
        return self.only is None or any(
            fnmatch.fnmatchcase(part, pattern) or pattern.startswith(f"{part}.") for pattern in self.only
        )

    def takes(self, part: str, key: str) -> bool:
        """Whether that key of that part is wanted."""
        if any(fnmatch.fnmatchcase(f"{part}.{key}", pattern) for pattern in self.exclude):
            return False
        return self.only is None or any(
            fnmatch.fnmatchcase(part, pattern) or fnmatch.fnmatchcase(f"{part}.{key}", pattern) for pattern in self.only
        )

    def word_for_keys_of(self, part: str) -> str | None:
        """The word, ``only`` or ``exclude``, that names single keys of that part; ``None`` where neither does."""
        for word, patterns in (("only", self.only or ()), ("exclude", self.exclude)):
            if any(pattern.startswith(f"{part}.") for pattern in patterns):
                return word
        return None

    def renamed(self, key: str) -> str:
        """What the key of a module in the checkpoint is called here."""
        for pattern, replacement in self.rename.items():
            key = re.sub(pattern, replacement, key)
        return key


@dataclass
class Report:
    """What a restore finds when it lays a checkpoint beside the objects that it is for."""

    loaded: list[str] = field(default_factory=list)
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
    """State that fits, not yet put in."""

    parts: Parts
    ready: Mapping[str, Any]
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
        for name, state in self.ready.items():
            part = self.parts.shared.get(name, self.parts.own.get(name))
            if isinstance(part, nn.Module):
                part.load_state_dict(state, strict=False)
            elif part is not None:
                part.load_state_dict(state)
        if self.rng_state is not None:
            rng.apply(self.rng_state)


def match(parts: Parts, snapshot: Snapshot, selection: Selection, *, strict: bool, is_same_world: bool) -> Matched:
    """What would be put where. Changes nothing.

    Raises:
        StateMismatch: with the whole report, if ``strict`` and anything is missing, unexpected or misshapen; or where
            ``selection`` cannot be what is meant.
    """
    report = Report()
    ready: dict[str, Any] = {}
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
            ready[name] = _match_module(name, part, saved[name], selection, report)
        elif word := selection.word_for_keys_of(name):
            raise StateMismatch(f"{word}= names keys of {name}, which is no module: it is taken whole or not at all")
        else:
            report.wrong_shape += (wrong := _misfit(name, part, saved[name]))
            if not wrong:
                ready[name] = saved[name]
                report.loaded.append(name)
    report.unexpected += [
        f"{name} (the whole part)"
        for name in saved
        if name not in parts.shared and name not in parts.own and selection.takes_part(name)
    ]
    if strict and not report.is_whole:
        raise StateMismatch(
            f"the checkpoint does not fit: {report}. Nothing was changed. Use only=, exclude= or rename= to say what "
            "is meant, or strict=False to take what fits"
        )
    has_rng = is_same_world and RNG in snapshot.own and selection.takes_part(RNG)
    if selection.only is not None and report.is_whole and not report.loaded and not has_rng:
        raise StateMismatch(f"only= takes nothing: {', '.join(selection.only)}; there are {', '.join(live)}")
    return Matched(parts, ready, snapshot.own[RNG] if has_rng else None, report)


def _match_module(name: str, module: nn.Module, saved: Any, selection: Selection, report: Report) -> dict[str, Any]:
    if not isinstance(saved, dict):
        raise StateMismatch(f"{name} is a module here, and a {type(saved).__name__} in the checkpoint")
    live = module.state_dict()
    keys = canonical_keys(module, live)
    found = _without_foreign_prefix(_renamed(name, saved, selection), set(keys.values()))
    ready: dict[str, Any] = copy.copy(live)  # with the versions of its modules, which some need to read their state
    ready.clear()
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
            ready[key] = found[canonical]
            report.loaded.append(f"{name}.{canonical}")
            if (here := _dtype(live[key])) and (there := _dtype(found[canonical])) and here != there:
                report.converted.append(f"{name}.{canonical} ({there} there, {here} here)")
    known = set(keys.values())
    unexpected = [key for key in found if key not in known and selection.takes(name, key)]
    report.unexpected += [f"{name}.{key}{_nearest(key, known)}" for key in unexpected[:_SHOWN]]
    report.unexpected += [f"{name}.{key}" for key in unexpected[_SHOWN:]]
    return ready


def _renamed(name: str, saved: dict[str, Any], selection: Selection) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in saved.items():
        if (called := selection.renamed(key)) in renamed:
            raise StateMismatch(f"rename= makes {name}.{called} of two keys of the checkpoint, one of them {key}")
        renamed[called] = value
    return renamed


def _misfit(name: str, part: Any, saved: Any) -> list[str]:
    if isinstance(part, torch.optim.Optimizer):
        here = [len(group["params"]) for group in part.param_groups]
        there = [len(group["params"]) for group in saved.get("param_groups", [])] if isinstance(saved, dict) else []
        if here != there:
            return [f"{name} (groups of {there} parameters there, of {here} here)"]
    return []


def _without_foreign_prefix(saved: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Keys that another library saved from inside wrappers lose their prefixes, where ours have none."""
    for prefix in ("module.", "_orig_mod.") * 2:
        if saved and all(key.startswith(prefix) for key in saved) and not any(one.startswith(prefix) for one in known):
            saved = {key.removeprefix(prefix): value for key, value in saved.items()}
    return saved


def _fits(key: str, live: Any, found: Any) -> bool:
    if key.rpartition(".")[2] == "_extra_state":
        return True  # what get_extra_state returned, whatever it is
    if isinstance(live, Tensor) and isinstance(found, Tensor) and nn.parameter.is_lazy(live):
        return True  # takes the shape that it is given
    return bool(_shape(live) == _shape(found))


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor) and not nn.parameter.is_lazy(value):
        return tuple(value.shape)
    return "anything"


def _dtype(value: Any) -> str | None:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else None


def _nearest(name: str, among: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(among), n=1, cutoff=0.8)
    return f", there is {close[0]}" if close else ""


def _patterns(value: object, word: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, Collection) or not all(isinstance(one, str) for one in listed):
        raise TypeError(f"{word} should be a name or a list of names, is {value!r}")
    return tuple(listed)

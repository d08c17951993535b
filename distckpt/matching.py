"""A checkpoint laid beside the objects that it is for: what fits, what does not, and what is put in."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distckpt import rng
from distckpt.destinations import IntoModule, has_stand_ins, take_like
from distckpt.errors import StateMismatch
from distckpt.flat_parameters import state_of
from distckpt.formats import Snapshot
from distckpt.formats.stand_ins import NewMemory, is_stand_in
from distckpt.manifest import Record
from distckpt.optimizer_destinations import IntoOptimizer
from distckpt.optimizer_views import View, has_order
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
        unplaced: what of the checkpoint has no place here; each with a word about what there is instead.
        differing: values of a group of an optimizer of which its parameters had several.
        kept: values of a group that the checkpoint has none of, so that it keeps its own.
    """

    loaded: list[str] = field(default_factory=list)
    in_place: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unplaced: dict[str, str] = field(default_factory=dict)
    wrong_shape: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def has_all(self) -> bool:
        """Whether all that is here is in the checkpoint, and fits."""
        return not (self.missing or self.wrong_shape or self.differing)

    @property
    def is_whole(self) -> bool:
        return self.has_all and not self.unplaced

    @property
    def inexact(self) -> set[str]:
        """The parts that are not, whole, what they were in the checkpoint."""
        names = (*self.missing, *self.wrong_shape, *self.differing, *self.converted, *self.kept, *self.left)
        return {re.split("[ .]", name, maxsplit=1)[0] for name in names}

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} loaded"]
        for title, names in (
            ("missing in the checkpoint", self.missing),
            ("in the checkpoint alone", [f"{name}{near}" for name, near in self.unplaced.items()]),
            ("of another shape", self.wrong_shape),
            ("of which there were several", self.differing),
            ("converted", self.converted),
            ("not in the checkpoint, so they are as they were", self.kept),
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
        is_strict: whether anything that is missing, misshapen, or has no place on any rank is an error.
    """

    parts: Parts
    ready: Mapping[str, Callable[[], object]]
    targets: Sequence[tuple[Tensor, Tensor]]
    rng_state: Mapping[str, Any] | None
    report: Report
    is_strict: bool

    @property
    def unplaced(self) -> Sequence[str]:
        """See `distckpt.restoring.Fitted`."""
        return list(self.report.unplaced)

    @property
    def is_fit(self) -> bool:
        """See `distckpt.restoring.Fitted`."""
        return self.report.has_all or not self.is_strict

    def judge(self, unplaced: Collection[str]) -> None:
        """See `distckpt.restoring.Fitted`."""
        known = frozenset(unplaced)
        for name in [name for name in self.report.unplaced if name not in known]:
            del self.report.unplaced[name]
        if self.is_strict and not self.report.is_whole:
            raise StateMismatch(
                f"the checkpoint does not fit: {self.report}. Nothing of it was put in. Use only=, exclude= or rename= "
                "to say what is meant, or strict=False to take what fits"
            )

    def exactness(self, record: Record) -> str:
        """How exact a resume from ``record`` is, in one line for people."""
        report = self.report
        whole = [name for name in self.ready if name not in report.inexact]
        rest = [name for name in (*self.parts.shared, *self.parts.own) if name not in whole]
        (whole if self.rng_state is not None else rest).append(f"{RNG} of {record.world_size} ranks")
        told = f"resumed {record.name} (step {record.progress.step}, epoch {record.progress.epoch})"
        told += f"  exact: {', '.join(whole) or 'nothing'}"
        told += f"  not exact: {', '.join(rest)}" if rest else ""
        return told if report.is_whole and not (report.converted or report.kept) else f"{told}  ({report})"

    def apply(self) -> None:
        """The objects hold the state. The random number generators are set last."""
        for put_in in self.ready.values():
            put_in()
        if self.rng_state is not None:
            rng.apply(self.rng_state)


def match(parts: Parts, snapshot: Snapshot, selection: Selection, *, strict: bool, is_same_world: bool) -> Matched:
    """What would be put where. Changes nothing. Takes memory for what is not read into live tensors.

    `Matched.judge` is to be asked whether it fits, once it is known what other ranks have a place for.

    Raises:
        StateMismatch: where ``selection`` cannot be what is meant, or a part is of another kind.
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
        elif isinstance(part, torch.optim.Optimizer):
            if (one := _match_optimizer(name, part, parts, snapshot, selection, report, memory)) is not None:
                ready[name] = partial(_put_in, name, one, report)
                report.loaded.append(name)
        else:
            if has_stand_ins(saved[name]):
                take_like(part.state_dict(), saved[name], memory)
            ready[name] = partial(part.load_state_dict, memory.replaced(saved[name]))
            report.loaded.append(name)
    for name in saved:
        if name not in parts.shared and name not in parts.own and selection.takes_part(name):
            report.unplaced[f"{name} (the whole part)"] = ""
    has_rng = is_same_world and RNG in snapshot.own and selection.takes_part(RNG)
    if selection.only is not None and report.is_whole and not report.loaded and not has_rng:
        raise StateMismatch(f"only= takes nothing: {', '.join(selection.only)}; there are {', '.join(live)}")
    rng_state = snapshot.own[RNG] if has_rng else None
    targets = [*(pair for one in into for pair in one.targets), *memory.targets]
    return Matched(parts, ready, targets, rng_state, report, strict)


def _put_in(name: str, into: IntoOptimizer, report: Report) -> None:
    report.converted += [f"{name}.{one}" for one in into.put_in()]


def _match_optimizer(
    name: str,
    optimizer: torch.optim.Optimizer,
    parts: Parts,
    snapshot: Snapshot,
    selection: Selection,
    report: Report,
    memory: NewMemory,
) -> IntoOptimizer | None:
    """What goes into it, or None where it is of other groups."""
    saved: Any = snapshot.shared.get(name, snapshot.own.get(name))
    placements = None
    whole = parts.whole(optimizer)
    if is_by_name(saved):
        numbered = by_number(_with_names(saved, snapshot, selection), whole, parts.members_in(optimizer))
        state, placements = numbered.state, numbered.placements
        report.missing += [f"{name}.{one}{_nearest(one, numbered.unexpected)}" for one in numbered.missing[:_SHOWN]]
        report.missing += [f"{name}.{one}" for one in numbered.missing[_SHOWN:]]
        report.unplaced |= {f"{name}.{one}": "" for one in numbered.unexpected}
        report.differing += [f"{name}.{one}" for one in numbered.differing]
        report.kept += [f"{name}.{one}" for one in numbered.kept]
    elif misfit := _misfit(name, whole, saved):
        report.wrong_shape.append(misfit)
        return None
    else:
        state = saved

    def dtypes() -> list[torch.dtype | None]:
        modules = {part: state for part, state in snapshot.shared.items() if isinstance(state, dict)}
        places = [one.places[0] if one.places else ("", "") for one in parts.members_in(optimizer)]
        there = [modules.get(part, {}).get(key) for part, key in places]
        return [one.dtype if isinstance(one, Tensor) else None for one in there]

    try:
        into = IntoOptimizer(whole, state, memory, placements, dtypes)
    except ValueError as error:
        raise StateMismatch(f"{name}: {error}") from error
    report.converted += [
        f"{name}.{parts.members_in(optimizer)[nth].name} (its parameter has another type than it had)"
        for nth in into.converted
    ]
    return into


def _with_names(saved: dict[str, Any], snapshot: Snapshot, selection: Selection) -> dict[str, Any]:
    """The state of an optimizer by the names that parameters have here."""
    if not selection.rename:
        return saved
    modules = {part: state for part, state in snapshot.shared.items() if isinstance(state, dict)}

    def renamed(name: str) -> str:
        part, _, key = name.partition(".")
        if key in modules.get(part, ()) and not any(name in keys for keys in modules.values()):
            return f"{part}.{selection.renamed(key)}"  # it has parameters of several parts
        return selection.renamed(name)

    groups = [{**group, "params": [*map(renamed, group["params"])]} for group in saved["param_groups"].values()]
    found = {"param_groups": {(group["params"] or [f"empty.{nth}"])[0]: group for nth, group in enumerate(groups)}}
    for key in ("state", "placements"):
        if key in saved:
            found[key] = {renamed(name): one for name, one in saved[key].items()}
    return saved | found


def _match_module(
    name: str, module: nn.Module, saved: Any, selection: Selection, report: Report, memory: NewMemory
) -> IntoModule:
    if not isinstance(saved, dict):
        raise StateMismatch(f"{name} is a module here, and a {type(saved).__name__} in the checkpoint")
    live = state_of(module)
    keys = canonical_keys(module, live)
    found = _without_foreign_prefix(_renamed(name, saved, selection), set(keys.values()))
    into = IntoModule(module, live, memory)
    for key, canonical in keys.items():
        if is_stand_in(live[key]) and selection.takes(name, canonical):
            raise StateMismatch(
                f"{name}.{canonical} is on the meta device, where nothing can be put: call to_empty(device=...) of the "
                "model before, and make its optimizer after that"
            )
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
    for nth, key in enumerate(unexpected):
        report.unplaced[f"{name}.{key}"] = _nearest(key, known) if nth < _SHOWN else ""
    return into


def _renamed(name: str, saved: dict[str, Any], selection: Selection) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in saved.items():
        if (called := selection.renamed(key)) in renamed:
            raise StateMismatch(f"rename= makes {name}.{called} of two keys of the checkpoint, one of them {key}")
        renamed[called] = value
    return renamed


def _misfit(name: str, part: torch.optim.Optimizer | View, saved: Any) -> str:
    if not has_order(part):
        return (
            f'{name} (it was not saved with format="sharded", so it knows parameters by number, which those have none '
            "of that FullyShardedDataParallel flattened without use_orig_params=True)"
        )
    here = [len(group["params"]) for group in part.param_groups]
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    there = [len(group["params"]) for group in groups] if isinstance(groups, list) else []
    if here != there or not isinstance(saved.get("state"), dict):
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

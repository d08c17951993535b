"""The state of a training program: what its parts hold, by name, read without side effects.

A *part* is any object with ``state_dict`` and ``load_state_dict``.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distckpt import rng
from distckpt.accelerator_state import is_accelerator, prepared_by
from distckpt.flat_parameters import cut_in, is_wrapped, state_of
from distckpt.loader_position import LoaderPosition
from distckpt.optimizer_views import View, live_parameters, seen
from distckpt.optimizers import Member, members_of
from distckpt.optimizers import by_name as named
from distckpt.wrappers import canonical_keys

RNG = "rng"

_NOTHING = object()
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_RESERVED = {RNG, "state", "manifest", "claim"}


class Parts:
    """The parts of one training program.

    Args:
        state: the objects, by name, or an ``Accelerator``. Of a ``DataLoader`` its position is taken.
        per_rank: names of the parts that each rank has of its own; ``None`` means those that one can iterate over
            and that are no modules: data loaders and samplers. The others are equal on all ranks.
    """

    def __init__(self, state: Any, per_rank: Collection[str] | None = None) -> None:
        if is_accelerator(state):
            prepared = prepared_by(state)
            state, per_rank = prepared.parts, prepared.own.union(per_rank or ())
        if not isinstance(state, Mapping) or not state:
            raise TypeError(
                "state should be a dict of names and objects with state_dict, or an Accelerator, is "
                f"{type(state).__name__}"
            )
        state = {name: _with_position(part) for name, part in state.items()}
        for name, part in state.items():
            _check_part(name, part)
        if per_rank is not None:
            if isinstance(per_rank, str) or not isinstance(per_rank, Collection):
                raise TypeError(f"per_rank should be a list of names in state, is {per_rank!r}")
            if unknown := set(per_rank) - set(state):
                raise ValueError(f"per_rank names {sorted(unknown)}; in state there are {sorted(state)}")
        own = {name for name, part in state.items() if _is_iterable(part)} if per_rank is None else set(per_rank)
        self.shared = {name: part for name, part in state.items() if name not in own}
        self.own = {name: part for name, part in state.items() if name in own}
        self._members: dict[int, tuple[list[weakref.ref[Tensor]], list[Member]]] = {}
        self._views: dict[int, View] = {}
        self._wrapped = [part for part in self.modules.values() if is_wrapped(part)]  # looking again takes long

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The parts that are modules."""
        return {name: part for name, part in self.shared.items() if isinstance(part, nn.Module)}

    def whole(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | View:
        """``optimizer``, as it is in the whole; see `distckpt.optimizer_views`."""
        view = seen(optimizer, self._wrapped)
        if isinstance(view, torch.optim.Optimizer):
            return view
        before = self._views.get(id(optimizer))  # which remembers what it has seen
        if before is None or not _are_same(live_parameters(before), live_parameters(view)):
            self._views[id(optimizer)] = view
        return self._views[id(optimizer)]

    def members_in(self, optimizer: torch.optim.Optimizer) -> list[Member]:
        """Its parameters; see `distckpt.optimizers.members_of`. Costs next to nothing where they are the same as the
        last time."""
        whole = self.whole(optimizer)
        ours = list(live_parameters(whole))
        before, members = self._members.get(id(optimizer), ([], []))
        if not _are_same((one() for one in before), ours):
            members = members_of(whole, self.modules)
            self._members[id(optimizer)] = [weakref.ref(one) for one in ours], members
        return members

    def require_names(self) -> None:
        """The parameters of optimizers whose state is known by their names have some, as far as that is known before
        their state is.

        Raises:
            TypeError: naming an optimizer that has others.
        """
        for name, part in self.shared.items():
            if isinstance(part, torch.optim.Optimizer) and type(part).state_dict is torch.optim.Optimizer.state_dict:
                _require_names(name, self.members_in(part))

    def require_whole(self) -> None:
        """None is an optimizer of parameters that FSDP1 has cut into pieces, whose state no rank has whole.

        Raises:
            TypeError: naming one.
        """
        cut = {id(owner) for module in self._wrapped for owner in cut_in(module)}
        for name, part in self.shared.items():
            is_optimizer = isinstance(part, torch.optim.Optimizer)
            if cut and is_optimizer and any(id(one) in cut for one in live_parameters(part)):
                raise TypeError(
                    f"state[{name!r}] has parameters that FullyShardedDataParallel (FSDP1) has cut into pieces, and of "
                    'its state each rank has a piece: use format="sharded"'
                )

    def capture_shared(self, *, is_leader: bool, by_name: bool = False, needs_names: bool = False) -> dict[str, Any]:
        """The state of the shared parts: references, no copies. Collective for parts whose ``state_dict`` is.

        Keys of modules have no prefixes of wrappers. Nothing is initialised, stepped or changed.

        Args:
            by_name: whether the state of optimizers is known by names of parameters, and not by their numbers.
            needs_names: whether they need some, as other ranks have others: a number says nothing of what it is there.

        Raises:
            TypeError: where they need some and have none.
        """
        captured = {}
        for name, part in self.shared.items():
            is_named = by_name and isinstance(part, torch.optim.Optimizer)
            whole = self.whole(part) if is_named else part
            if whole is part and hasattr(part, "consolidate_state_dict"):  # which gathers on the leader
                part.consolidate_state_dict(0)
                if not is_leader:
                    continue
            state = captured[name] = _state_of(whole, is_cut=by_name and any(part is one for one in self._wrapped))
            if is_named:
                captured[name] = named(state, whole, self.members_in(part))
                if needs_names and captured[name] is not state:
                    _require_names(name, self.members_in(part))
        return captured

    def capture_own(self) -> dict[str, Any]:
        """The state of this rank's own parts and of its random number generators."""
        return {**{name: _state_of(part) for name, part in self.own.items()}, RNG: rng.capture()}


def _are_same(ours: Iterable[Tensor | None], others: Iterable[Tensor]) -> bool:
    return all(one is other for one, other in zip_longest(ours, others, fillvalue=_NOTHING))


def _state_of(part: Any, *, is_cut: bool = False) -> Any:
    if not isinstance(part, nn.Module):
        return part.state_dict()
    state = state_of(part) if is_cut else part.state_dict()
    names = canonical_keys(part, state)
    return {names[key]: value for key, value in state.items()}


def _require_names(name: str, members: Sequence[Member]) -> None:
    if unnamed := [nth for nth, member in enumerate(members) if not member.places]:
        raise TypeError(
            f"state[{name!r}] has parameters that are in no module of state ({len(unnamed)} of {len(members)}, the "
            f"first is number {unnamed[0]}), so that no name says whether other ranks have the same: add the module "
            "that has them, or a torch.nn.ParameterList of them, to state; where each rank has others, name the "
            'optimizer in per_rank; where all have the same and none is cut over ranks, format="full" does, too'
        )


def _with_position(part: Any) -> Any:
    """``part``, or where it is a data loader that does not know how far it is, what does."""
    is_loader = isinstance(part, DataLoader) and not hasattr(part, "state_dict")
    return LoaderPosition(part) if is_loader else part


def _is_iterable(part: Any) -> bool:
    if isinstance(part, LoaderPosition):
        return True
    return hasattr(type(part), "__iter__") and not isinstance(part, nn.Module)


def _check_part(name: object, part: Any) -> None:
    if not isinstance(name, str) or _NAME.fullmatch(name) is None or name in _RESERVED:
        raise ValueError(
            f"{name!r} is no name of a part of the state: it names a file, so letters, digits and _ only, and none "
            f"of {', '.join(sorted(_RESERVED))}"
        )
    for method in ("state_dict", "load_state_dict"):
        if not callable(getattr(part, method, None)):
            raise TypeError(f"state[{name!r}] is a {type(part).__name__}, which has no {method}()")

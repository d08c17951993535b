"""The state of a training program: what its parts hold, by name, read without side effects.

A *part* is any object with ``state_dict`` and ``load_state_dict``.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distckpt import rng
from distckpt.accelerator_state import is_accelerator, prepared_by
from distckpt.loader_position import LoaderPosition
from distckpt.optimizers import Member, live_parameters, members_of
from distckpt.optimizers import by_name as named
from distckpt.wrappers import canonical_keys

RNG = "rng"

_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"  # not imported: that takes long

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
        _check_optimizers(state)
        if per_rank is not None:
            if isinstance(per_rank, str) or not isinstance(per_rank, Collection):
                raise TypeError(f"per_rank should be a list of names in state, is {per_rank!r}")
            if unknown := set(per_rank) - set(state):
                raise ValueError(f"per_rank names {sorted(unknown)}; in state there are {sorted(state)}")
        own = {name for name, part in state.items() if _is_iterable(part)} if per_rank is None else set(per_rank)
        self.shared = {name: part for name, part in state.items() if name not in own}
        self.own = {name: part for name, part in state.items() if name in own}
        self._members: dict[int, tuple[list[weakref.ref[Tensor]], list[Member]]] = {}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The parts that are modules."""
        return {name: part for name, part in self.shared.items() if isinstance(part, nn.Module)}

    def members_in(self, optimizer: torch.optim.Optimizer) -> list[Member]:
        """Its parameters; see `distckpt.optimizers.members_of`. Costs next to nothing where they are the same as the
        last time."""
        ours = list(live_parameters(optimizer))
        seen, members = self._members.get(id(optimizer), ([], []))
        if len(seen) != len(ours) or any(one() is not live for one, live in zip(seen, ours, strict=True)):
            members = members_of(optimizer, self.modules)
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
            if hasattr(part, "consolidate_state_dict"):  # ZeroRedundancyOptimizer: gathers on the leader
                part.consolidate_state_dict(0)
                if not is_leader:
                    continue
            state = captured[name] = _state_of(part)
            if by_name and isinstance(part, torch.optim.Optimizer):
                captured[name] = named(state, part, self.members_in(part))
                if needs_names and captured[name] is not state:
                    _require_names(name, self.members_in(part))
        return captured

    def capture_own(self) -> dict[str, Any]:
        """The state of this rank's own parts and of its random number generators."""
        return {**{name: _state_of(part) for name, part in self.own.items()}, RNG: rng.capture()}


def _state_of(part: Any) -> Any:
    state = part.state_dict()
    if not isinstance(part, nn.Module):
        return state
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


def _check_optimizers(state: Mapping[str, Any]) -> None:
    """None has parameters of which each rank has a piece that says nothing of where it lies in the whole."""
    cut = set()
    for part in state.values():
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if _is_cut_by_fsdp1(module):
                cut |= {id(one) for one in module.parameters()}
    for name, part in state.items():
        if cut and isinstance(part, torch.optim.Optimizer) and any(id(one) in cut for one in live_parameters(part)):
            raise TypeError(
                f"state[{name!r}] has parameters that FullyShardedDataParallel (FSDP1) has cut into pieces, and of its "
                "state each rank has a piece that only the same ranks could use: wrap the model in "
                "torch.distributed.fsdp.fully_shard instead, whose pieces know where they belong"
            )


def _is_cut_by_fsdp1(module: nn.Module) -> bool:
    is_fsdp1 = any(kind.__module__ == _FSDP1 for kind in type(module).__mro__)
    return is_fsdp1 and getattr(getattr(module, "sharding_strategy", None), "name", "") != "NO_SHARD"


def _check_part(name: object, part: Any) -> None:
    if not isinstance(name, str) or _NAME.fullmatch(name) is None or name in _RESERVED:
        raise ValueError(
            f"{name!r} is no name of a part of the state: it names a file, so letters, digits and _ only, and none "
            f"of {', '.join(sorted(_RESERVED))}"
        )
    for method in ("state_dict", "load_state_dict"):
        if not callable(getattr(part, method, None)):
            raise TypeError(f"state[{name!r}] is a {type(part).__name__}, which has no {method}()")

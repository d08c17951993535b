"""Where the tensors of a checkpoint are read to: into live tensors themselves where that is right, else new ones."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from distckpt.flat_parameters import forget_gathered, is_hook, originals_in, without_hooks
from distckpt.formats.shards import cut_like, is_spread, local_of
from distckpt.formats.spread import Range
from distckpt.formats.stand_ins import NewMemory, is_stand_in

_PLAIN = (Tensor, nn.Parameter)
_FSDP2 = "torch.distributed.fsdp._fully_shard."


class IntoModule:
    """What goes into one module: its live tensors themselves where they fit, else what ``load_state_dict`` is given.

    What FSDP1 flattened never is: it would ask for whole parameters on all ranks, and wait for them.

    Attributes:
        targets: the live ones, each behind what stands for it.

    Args:
        live: its state, as `distckpt.flat_parameters.state_of` has it.
        memory: what is not read into a live tensor is read into this.
    """

    def __init__(self, module: nn.Module, live: dict[str, Any], memory: NewMemory) -> None:
        self.targets: list[tuple[Tensor, Tensor]] = []
        self._module = module
        self._live = live
        self._memory = memory
        self._state = copy.copy(live)  # with the versions of its modules, which some need to read their state
        self._state.clear()
        self._tensors, self._is_stock = _live_tensors(module)
        self._taken: dict[int, Tensor] = {}

    def take(self, key: str, found: Any) -> bool:
        """``found``, of the right shape, is to be under ``key``; whether it is read straight into what is there."""
        tensor = self._tensors.get(key)
        if tensor is None or not is_stand_in(found) or not self._is_live(key, tensor, found):
            self._state[key] = self._new(found, self._live[key])
            self._is_stock = False
            return False
        self.targets.append((found, tensor))
        self._state[key] = tensor
        return True

    def put_in(self) -> None:
        """The module holds what it takes, once that was read. A live tensor is copied to itself, which costs nothing,
        so that overrides and hooks see all keys."""
        state = self._state
        if flat := {key: one for key, one in self._live.items() if isinstance(one, Range)}:
            state = copy.copy(state)
            with torch.no_grad():
                for key in flat.keys() & state.keys():
                    if (given := state.pop(key)) is not flat[key]:
                        flat[key].elements.copy_(given.elements)
            forget_gathered(self._module)
        if not self._is_stock:
            with without_hooks(self._module):
                self._module.load_state_dict(state, strict=False)

    def _new(self, found: Any, live: Any) -> Any:
        if isinstance(found, Tensor) and isinstance(live, Tensor) and is_spread(live):
            return self._memory.take(found, like=live) if is_stand_in(found) else cut_like(found, live)
        return self._memory.replaced(found)

    def _is_live(self, key: str, tensor: Tensor, found: Tensor) -> bool:
        """Whether reading into ``tensor`` is what loading would come to: the state shows it as it is, and no other of
        the checkpoint's tensors goes to the same memory."""
        shown = self._live[key]
        if not isinstance(shown, Tensor) or shown.dtype != tensor.dtype or tensor.dtype != found.dtype:
            return False
        address = local_of(tensor).data_ptr()
        if local_of(shown).data_ptr() != address:
            return False
        return self._taken.setdefault(address, found) is found or not local_of(tensor).numel()


def take_like(live: Any, saved: Any, memory: NewMemory) -> None:
    """What ``saved`` has where ``live``, a tree of the same form, has a tensor that is spread over ranks, has
    ``memory`` that is spread alike."""
    if isinstance(saved, Tensor):
        if is_stand_in(saved) and isinstance(live, Tensor) and is_spread(live):
            memory.take(saved, like=live)
    elif isinstance(saved, dict) and isinstance(live, dict):
        for key, one in saved.items():
            take_like(live.get(key), one, memory)
    elif isinstance(saved, (list, tuple)) and isinstance(live, (list, tuple)):
        for here, there in zip(live, saved, strict=False):
            take_like(here, there, memory)


def has_stand_ins(value: Any) -> bool:
    """Whether a tensor in ``value`` is still to be read."""
    if isinstance(value, dict):
        return any(map(has_stand_ins, value.values()))
    return any(map(has_stand_ins, value)) if isinstance(value, (list, tuple)) else is_stand_in(value)


def _live_tensors(module: nn.Module) -> tuple[dict[str, Tensor], bool]:
    """The parameters and buffers, by key of ``state_dict``, that ``load_state_dict`` would do no more to than copy
    into them; and whether that is all it would do.

    Not those of modules that load in a way of their own, by an override or a hook, nor of the modules inside of them.
    """
    found: dict[str, Tensor] = {}
    is_all = _loads_whole_as_stock(module)
    pending = [(module, "", is_all)]
    while pending:
        one, prefix, is_stock = pending.pop()
        is_stock = is_stock and _loads_as_stock(one)
        is_all = is_all and is_stock
        if is_stock:
            held = chain(one._parameters.items(), one._buffers.items())
            found.update({prefix + name: tensor for name, tensor in held if tensor is not None and _is_plain(tensor)})
        pending += [(child, f"{prefix}{name}.", is_stock) for name, child in one._modules.items() if child is not None]
    found.update({key: original.tensor for original, keys in originals_in(module) for key in keys})
    return found, is_all


def _loads_whole_as_stock(module: nn.Module) -> bool:
    return _is_of_module(module.load_state_dict, nn.Module.load_state_dict)


def _loads_as_stock(module: nn.Module) -> bool:
    hooks = chain(module._load_state_dict_pre_hooks.values(), module._load_state_dict_post_hooks.values())
    if not all(map(_does_nothing, hooks)):
        return False
    return _is_of_module(module._load_from_state_dict, nn.Module._load_from_state_dict)


def _is_of_module(method: Any, stock: Any) -> bool:
    return getattr(method, "__func__", None) is stock


def _does_nothing(hook: Any) -> bool:
    """Whether it is ours, or one of FSDP2: these bring parameters back that ``state_dict()`` has brought back by then,
    and look at those that were replaced, which none is. Or one of FSDP1, which does not run. torch wraps what was
    registered."""
    if is_hook(hook):
        return True
    registered = getattr(hook, "hook", hook)
    return getattr(registered, "is_of_distckpt", False) or getattr(registered, "__module__", "").startswith(_FSDP2)


def _is_plain(tensor: Tensor) -> bool:
    """Whether its elements are numbers in memory, each in its own place, which may be overwritten."""
    tensor = local_of(tensor)
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return False
    if tensor.is_meta or tensor.is_conj() or tensor.is_neg() or tensor.is_inference():
        return False
    return tensor.is_contiguous() or not _may_overlap(tensor)


def _may_overlap(tensor: Tensor) -> bool:
    reach = 0
    for stride, extent in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if extent > 1:
            if stride <= reach:
                return True
            reach += stride * (extent - 1)
    return False

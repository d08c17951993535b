"""What FSDP1 (``FullyShardedDataParallel``) made of parameters, seen as what they were: by their own names and shapes.

FSDP1 lays the parameters of a module end to end and cuts that into pieces of one size, so that a rank has a range of
the elements of some. Its own ``state_dict`` puts all of them together on every rank, which is a collective that takes
the memory of the whole model. Here nobody waits for another rank, and nothing is copied: what a rank has of a parameter
is told as boxes of it, in the memory that the optimizer works on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from distckpt.formats.spread import Range

# Not imported: that takes long, and few programs have it.
_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"
_HOOKS = "torch.distributed.fsdp._state_dict_utils"
_HOOKED = (
    *("_state_dict_pre_hooks", "_state_dict_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


@dataclass(frozen=True)
class Original:
    """A parameter as it was before it was flattened.

    Attributes:
        name: in the module that was wrapped.
        owner: what an optimizer has in its place: the flat parameter, or the parameter itself, as a range of it.
        is_all: whether the owner stands for nothing else.
        size: how many elements the owner has here, padding among them.
        begin: where in these its own begin that are here.
        tensor: what is here of it.
    """

    name: str
    owner: Tensor
    is_all: bool
    size: int
    begin: int
    tensor: Range


def is_wrapped(module: nn.Module) -> bool:
    """Whether FSDP1 is in it anywhere."""
    return any(map(_is_wrapper, module.modules()))


def originals_in(module: nn.Module) -> list[tuple[Original, Sequence[str]]]:
    """All that were flattened, each with its keys in ``module.state_dict()``, were none of it wrapped by FSDP1. The
    same objects in each call, as long as they lie in the same memory.

    Raises:
        TypeError: naming one of which it cannot be said what is here.
    """
    handles = [handle for one in module.modules() for handle in _flat(one)]
    if not handles:
        return []
    paths: defaultdict[int, list[str]] = defaultdict(list)
    for path, one in module.named_modules(remove_duplicate=False):  # one may be reached by several paths
        paths[id(one)].append(f"{path}." if path else "")
    found: list[tuple[Original, Sequence[str]]] = []
    for handle in handles:
        names = _names(handle.flat_param)
        for nth, original in enumerate(_originals(handle)):
            found.append((original, [path + name for one, name in names[nth] for path in paths[id(one)]]))
    return found


def cut_in(module: nn.Module) -> Iterator[Tensor]:
    """What an optimizer has of parameters in ``module`` that no rank has whole."""
    for one in module.modules():
        for handle in _flat(one):
            if handle.uses_sharded_strategy:
                yield from (original.owner for original in _originals(handle))


def state_of(module: nn.Module) -> dict[str, Any]:
    """``module.state_dict()``; where FSDP1 flattened parameters, each is there as what this rank has of it. No
    collective. Hooks of FSDP1 do not run; those of others see parameters as they are on this rank."""
    if not is_wrapped(module):
        return module.state_dict()
    flat = {key: original.tensor for original, keys in originals_in(module) for key in keys}
    with without_hooks(module):
        state = module.state_dict()
    for key in [key for key in state if key.rpartition(".")[2] == "_flat_param"]:
        del state[key]
    for key, tensor in flat.items():
        state[key] = tensor
    return state


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters, each by all of its keys; what was flattened as in `originals_in`."""
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return found | {key: original.tensor for original, keys in originals_in(module) for key in keys}


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """The hooks of FSDP1 around ``state_dict`` and ``load_state_dict`` do not run."""
    held: list[tuple[Any, Mapping[Any, Any]]] = []
    for one in filter(_is_wrapper, module.modules()):
        for name in _HOOKED:
            held.append(((hooks := getattr(one, name)), dict(hooks)))
    try:
        for hooks, all_of_them in held:
            for key in [key for key, hook in all_of_them.items() if is_hook(hook)]:
                del hooks[key]
        yield
    finally:
        for hooks, all_of_them in held:
            hooks.clear()
            hooks.update(all_of_them)


def is_hook(hook: Any) -> bool:
    """Whether it is one of FSDP1. torch wraps what was registered."""
    return getattr(getattr(hook, "hook", hook), "__module__", "") == _HOOKS


def forget_gathered(module: nn.Module) -> None:
    """What FSDP1 put together of the parameters before they became others is not used any more."""
    for one in module.modules():
        for handle in _flat(one):
            if hasattr(handle.flat_param, "_full_param_padded") and not handle.needs_unshard():
                handle.reshard(True)
                handle._prefetched = False


def _is_wrapper(module: nn.Module) -> bool:
    return "_fsdp_wrapped_module" in module._modules and any(kind.__module__ == _FSDP1 for kind in type(module).__mro__)


def _flat(module: nn.Module) -> Iterator[Any]:
    """The handle of what ``module`` flattened and of which nobody can see what it was. Where nothing is cut, the
    parameters that it keeps are what they were."""
    handle = module.__dict__.get("_handle")
    if handle is not None and _is_wrapper(module) and (handle.uses_sharded_strategy or not handle._use_orig_params):
        yield handle


_Memory = tuple[Any, ...]
_known: WeakKeyDictionary[Any, tuple[_Memory, list[Original]]] = WeakKeyDictionary()


def _originals(handle: Any) -> list[Original]:
    flat = handle.flat_param
    here: Tensor = getattr(flat, "_local_shard", flat.data)  # not there before the first forward
    memory = (here.data_ptr(), here.dtype, here.device, here.shape)
    known, found = _known.get(handle, (None, []))
    if known != memory:
        found = [_original(handle, flat, here, nth) for nth in range(flat._num_params)]
        _known[handle] = memory, found
    return found


def _original(handle: Any, flat: Any, here: Tensor, nth: int) -> Original:
    name, shape, part = flat._fqns[nth], flat._shapes[nth], flat._shard_param_infos[nth]
    if flat._param_extensions[nth] is not None:
        raise TypeError(
            f"{name} is cut by FullyShardedDataParallel (FSDP1) that was cut by tensor parallelism before: use "
            "torch.distributed.fsdp.fully_shard, whose pieces know where they belong"
        )
    at, count = (part.offset_in_shard, part.numel_in_shard) if part.in_shard else (0, 0)
    order = range(len(shape)) if flat._contiguities[nth] else _order(name, shape, flat._strides[nth])
    is_on_several = not handle.uses_sharded_strategy or "HYBRID" in handle._sharding_strategy.name
    begin = part.intra_param_start_idx or 0
    tensor = Range.cut(shape, order, begin, here[at : at + count], is_on_several=is_on_several)
    if handle._use_orig_params:
        return Original(name, flat._params[nth], True, count, 0, tensor)
    return Original(name, flat, False, len(here), at, tensor)


def _order(name: str, shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The dimensions as they lie in memory, that of the widest steps first."""
    order = sorted(range(len(shape)), key=lambda dim: (-strides[dim], -shape[dim]))
    step = 1
    for dim in reversed(order):
        if shape[dim] > 1 and strides[dim] != step:
            raise TypeError(f"{name} of {tuple(shape)} has elements with gaps between, its strides are {strides}")
        step *= shape[dim]
    return order


def _names(flat: Any) -> dict[int, list[tuple[nn.Module, str]]]:
    """The modules that each original parameter is in, and what it is called there."""
    names = {nth: [(one.module, one.param_name)] for nth, one in enumerate(flat._param_infos)}
    places = {(id(one.module), one.param_name): nth for nth, one in enumerate(flat._param_infos)}
    for one in flat._shared_param_infos:
        names[places[id(one.prim_module), one.prim_param_name]].append((one.module, one.param_name))
    return names

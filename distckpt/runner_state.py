"""What a runner's checkpoint holds: the keys of MMEngine, in types that ``torch.load(weights_only=True)`` reads."""

from __future__ import annotations

import os
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distckpt.flat_parameters import cut_in
from distckpt.progress import Progress

# Exactly these pass as they are; what is derived from them becomes one of them.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray)
_KEEP_TO_THEMSELVES = ("DeepSpeedStrategy", "ColossalAIStrategy")
_ARRAYS, _NO_TENSORS = "biufc", "gG"


def capture(
    runner: Any, progress: Progress, *, is_leader: bool, save_optimizer: bool, save_param_scheduler: bool
) -> dict[str, Any]:
    """The checkpoint of ``runner`` at ``progress``, as its own ``save_checkpoint`` builds it: references, no copies.

    Every rank builds one, so that an optimizer may gather its state, and calls the runner's hooks of
    ``before_save_checkpoint`` with it. They see the tensors that training goes on with.
    """
    checkpoint: dict[str, Any] = {
        "meta": _meta(runner, progress),
        "state_dict": module_of(runner.model).state_dict(),
    }
    hub = getattr(runner, "message_hub", None)
    if hub is not None:
        checkpoint["message_hub"] = hub.state_dict()
    if save_optimizer:
        checkpoint["optimizer"] = _optimizer_state(optimizer_of(runner), is_leader=is_leader)
    schedulers = getattr(runner, "param_schedulers", None)
    if save_param_scheduler and schedulers is None:
        runner.logger.warning(
            "`save_param_scheduler` is True but `param_schedulers` of the runner is None, so none are saved"
        )
    elif save_param_scheduler:
        checkpoint["param_schedulers"] = scheduler_states(schedulers)
    if hasattr(runner, "call_hook"):
        runner.call_hook("before_save_checkpoint", checkpoint=checkpoint)
    return checkpoint


def to_plain(value: Any, path: str, left: list[str]) -> Any:
    """``value`` in types that the restricted reader of ``torch.load`` knows; the places of others go to ``left``.

    Scalars of NumPy become numbers and its arrays tensors (of words: lists), a ``HistoryBuffer`` becomes the dict that
    `to_histories` turns back, and what is derived from dict, list, tuple, set, str or a number becomes that.
    """
    if isinstance(value, Tensor) or type(value) in _PLAIN or isinstance(value, torch.dtype | torch.device | torch.Size):
        return value
    if isinstance(value, np.longdouble):
        return float(value)
    if isinstance(value, np.generic):
        return to_plain(value.item(), path, left)
    if isinstance(value, np.ndarray):
        if value.dtype.isnative and value.dtype.kind in _ARRAYS and value.dtype.char not in _NO_TENSORS:
            return torch.from_numpy(np.array(value))
        return to_plain(value.tolist(), path, left)
    if _is_history(value):
        return _history_to_plain(value)
    if isinstance(value, dict):
        return _dict_to_plain(value, path, left)
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            built = tuple if kind is tuple else list if kind is list else set
            return built(to_plain(one, f"{path}.{nth}", left) for nth, one in enumerate(value))
    plain: Any
    for plain in (str, bytes, int, float):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    left.append(f"{path} ({type(value).__module__}.{type(value).__qualname__})")
    return value


def to_histories(checkpoint: Mapping[str, Any]) -> None:
    """The logs in ``checkpoint``, which a runner of MMEngine has loaded, are of the type that its hub resumes."""
    logging = sys.modules.get("mmengine.logging")
    hub = checkpoint.get("message_hub")
    if logging is None or not isinstance(hub, dict):
        return
    scalars = hub.get("log_scalars", {})
    for name, told in scalars.items():
        if type(told) is dict and told.keys() == {"log_history", "count_history", "max_length"}:
            log, count = (told[key].cpu().numpy() for key in ("log_history", "count_history"))
            scalars[name] = logging.HistoryBuffer(log, count, told["max_length"])


def module_of(model: nn.Module) -> nn.Module:
    """``model`` without the wrapper of DDP or of ``torch.compile``."""
    while True:
        if _is_wrapper(model):
            model = model.module  # type: ignore[assignment]
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def optimizer_of(runner: Any) -> Any:
    """What holds the optimizer's state.

    Raises:
        TypeError: where the runner has nothing that could, or each rank has a piece of it.
    """
    found = optimizer_in(runner)
    if not is_built(runner):
        raise TypeError(
            "`optim_wrapper` of the runner should be an `OptimWrapper`, or an optimizer, with state_dict(), "
            f"but got {type(found)}; save_optimizer=False saves without it"
        )
    cut = {id(one) for one in cut_in(runner.model)} if isinstance(runner.model, nn.Module) else set()
    if cut and any(id(one) in cut for one in _parameters_in(found)):
        raise TypeError(
            "each rank has a piece of the optimizer's state, as FullyShardedDataParallel (FSDP1) has cut its "
            'parameters, and no .pth holds that: distckpt.Checkpointer(format="sharded") does; save_optimizer=False '
            "saves without it"
        )
    return found


def check_strategy(runner: Any) -> None:
    """What trains can be read.

    Raises:
        TypeError: naming a strategy of MMEngine that keeps the state of training to itself.
    """
    kind = type(getattr(runner, "strategy", None))
    if any(one.__name__ in _KEEP_TO_THEMSELVES for one in kind.__mro__):
        raise TypeError(
            f"{kind.__name__} keeps the state of training to itself: use MMEngine's own CheckpointHook with it"
        )


def is_built(runner: Any) -> bool:
    """Whether the runner has an optimizer, and not only the plan of one."""
    return callable(getattr(optimizer_in(runner), "state_dict", None))


def optimizer_in(runner: Any) -> Any:
    """The runner's optimizer, or what it has in its place; None if nothing."""
    found = getattr(runner, "optim_wrapper", None)
    return getattr(runner, "optimizer", None) if found is None else found


def _parameters_in(optimizer: Any) -> Iterator[Tensor]:
    """Those of an optimizer, of what holds one, or of what holds several by name."""
    groups = getattr(optimizer, "param_groups", ())
    for group in chain.from_iterable(groups.values()) if isinstance(groups, dict) else groups:
        yield from group["params"]


def _meta(runner: Any, progress: Progress) -> dict[str, Any]:
    meta: dict[str, Any] = {"epoch": progress.epoch, "iter": progress.step}
    text = getattr(getattr(runner, "cfg", None), "pretty_text", None)
    if text is not None:
        meta["cfg"] = text
    for key in ("seed", "experiment_name"):
        if hasattr(runner, key):
            meta[key] = getattr(runner, key)
    meta["time"] = time.strftime("%Y%m%d_%H%M%S")
    # The runner's own way starts a process of git at each save.
    told = getattr(getattr(runner, "message_hub", None), "runtime_info", {})
    version = told.get("mmengine_version") or getattr(sys.modules.get("mmengine"), "__version__", None)
    if version is not None:
        meta["mmengine_version"] = version
    dataset = getattr(getattr(runner, "train_dataloader", None), "dataset", None)
    if dataset is not None and hasattr(dataset, "metainfo"):
        meta["dataset_meta"] = dataset.metainfo
    return meta


def _optimizer_state(optimizer: Any, *, is_leader: bool) -> Any:
    if hasattr(optimizer, "consolidate_state_dict"):  # ZeroRedundancyOptimizer: gathers on the leader
        optimizer.consolidate_state_dict(0)
        if not is_leader:
            return None
    return optimizer.state_dict()


def scheduler_states(schedulers: Any) -> Any:
    """The state of a scheduler, in a list, of those in a list, or of several such by name."""
    if isinstance(schedulers, dict):
        return {name: scheduler_states(some) for name, some in schedulers.items()}
    some = schedulers if isinstance(schedulers, list | tuple) else [schedulers]
    # Functions are code and no state: a scheduler that is loaded keeps its own.
    return [{key: one for key, one in scheduler.state_dict().items() if not callable(one)} for scheduler in some]


def _is_wrapper(model: nn.Module) -> bool:
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return True
    known = sys.modules.get("mmengine.model")
    return known is not None and bool(known.is_model_wrapper(model))


def _is_history(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("_log_history", "_count_history", "max_length"))


def _history_to_plain(value: Any) -> dict[str, Any]:
    return {
        "log_history": torch.from_numpy(np.array(value._log_history)),
        "count_history": torch.from_numpy(np.array(value._count_history)),
        "max_length": int(value.max_length),
    }


def _dict_to_plain(value: dict[Any, Any], path: str, left: list[str]) -> dict[Any, Any]:
    pairs = ((to_plain(key, path, left), to_plain(one, f"{path}.{key}", left)) for key, one in value.items())
    if not isinstance(value, OrderedDict):
        return dict(pairs)
    ordered: Any = OrderedDict(pairs)
    if hasattr(value, "_metadata"):
        ordered._metadata = to_plain(value._metadata, f"{path}._metadata", left)
    return ordered  # type: ignore[no-any-return]

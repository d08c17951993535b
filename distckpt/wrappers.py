"""Modules in modules that other libraries put there, and names without them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

_WRAPPED = {nn.parallel.DistributedDataParallel: "module", nn.DataParallel: "module"}
WRAPPED_NAMES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def canonical_keys(module: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """For each key of ``module``'s state: its name without the prefixes of DDP, torch.compile and other wrappers."""
    wrappers = {}
    for path, one in module.named_modules(remove_duplicate=False):  # one may be reached by several paths
        for kind, child in _WRAPPED.items():
            if isinstance(one, kind):
                wrappers[path] = child
        for child in WRAPPED_NAMES:
            if child in one._modules:
                wrappers[path] = child
    return {key: _strip(key, wrappers) if wrappers else key for key in keys}


def _strip(key: str, wrappers: Mapping[str, str]) -> str:
    path: list[str] = []
    kept: list[str] = []
    for segment in key.split("."):
        if wrappers.get(".".join(path)) != segment:
            kept.append(segment)
        path.append(segment)
    return ".".join(kept)

"""The copy of a rank's state into host memory, cut at one step."""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Stager:
    """Copies trees of tensors into host memory that it uses again for the next copy.

    Fresh memory is several times slower to copy into than memory that was touched before, so the second copy of the
    same state is the fast one. What it returned is overwritten by the next `copy`: one snapshot is alive at a time.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._used: dict[str, Tensor] = {}

    def copy(self, trees: Mapping[str, Any]) -> dict[str, Any]:
        """``trees``, with each tensor replaced by its copy on the host, and each other value by one that training
        cannot change. A tensor that stands in several places is copied once.

        Raises:
            TypeError: naming the place of a tensor that cannot be copied whole: sharded, sparse, or without data.
        """
        self._used = {}
        copies: dict[tuple[Any, ...], Tensor] = {}
        with torch.no_grad():
            staged = {part: self._copy(tree, part, copies) for part, tree in trees.items()}
        self._memory = self._used  # what is no longer in the state is let go
        return staged

    def _copy(self, value: Any, path: str, copies: dict[tuple[Any, ...], Tensor]) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value, path, copies)
        if isinstance(value, dict):
            copied = {key: self._copy(one, f"{path}.{key}", copies) for key, one in value.items()}
            return copied if type(value) in (dict, defaultdict) else _like(value, copied)
        if type(value) in (list, tuple, deque):
            listed = [self._copy(one, f"{path}.{nth}", copies) for nth, one in enumerate(value)]
            return deque(listed, value.maxlen) if isinstance(value, deque) else type(value)(listed)
        return copy.deepcopy(value)

    def _copy_tensor(self, tensor: Tensor, path: str, copies: dict[tuple[Any, ...], Tensor]) -> Tensor:
        if nn.parameter.is_lazy(tensor):
            raise TypeError(f"{path} cannot be saved: it has no shape yet; run the model once before")
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            raise TypeError(
                f"{path} is sharded over ranks (a DTensor), which the full format cannot hold: gather it in "
                "state_dict() (e.g. StateDictOptions(full_state_dict=True)) or leave it out"
            )
        if not _has_plain_memory(tensor):
            kind = f"{type(tensor).__name__} of {tensor.dtype}, {tensor.layout}"
            raise TypeError(f"{path} cannot be saved: it is a {kind}, on {tensor.device}")
        identity = (
            *(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device),
            *(tensor.is_conj(), tensor.is_neg()),
        )
        if identity in copies and tensor.numel():
            return copies[identity]
        # pop: another tensor's place may be spelled the same, as in {"a": {"b": x}, "a.b": y}
        host = self._memory.pop(path, None)
        if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        _fill(host, tensor)
        self._used[path] = copies[identity] = host
        return host


def _fill(host: Tensor, tensor: Tensor) -> None:
    """``host`` holds what ``tensor`` does.

    torch starts its OpenMP team for each large copy, which waits for cores that training, or a neighbour, is using:
    on a busy machine that took 3 to 40 times as long as one thread, which by itself copies at the speed of memory.
    """
    if tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        np.copyto(_bytes(host), _bytes(tensor))
    else:
        host.copy_(tensor)


def _bytes(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _has_plain_memory(tensor: Tensor) -> bool:
    """Not so where values lie in several tensors (sparse, quantized, subclasses that wrap others) or nowhere."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.numel() == 0 or tensor.data_ptr() != 0


def _like(value: dict[Any, Any], copied: dict[Any, Any]) -> Any:
    same = copy.copy(value)
    same.clear()
    same.update(copied)
    return same

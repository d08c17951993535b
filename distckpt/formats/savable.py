"""Which tensors can lie in a file whole, and which of them are one and the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from distckpt.formats.spread import Spread

_PLAIN = (Tensor, nn.Parameter)
_SPREAD = (DTensor, ShardedTensor, Spread)
_QUANTIZED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})


def is_savable(tensor: Tensor) -> bool:
    """Whether all elements of ``tensor`` lie in memory of its own, on whatever device.

    Not so where they lie in several tensors (sparse, quantized, nested, subclasses that wrap others), on several ranks,
    or nowhere.
    """
    if type(tensor) not in _PLAIN and (nn.parameter.is_lazy(tensor) or isinstance(tensor, _SPREAD)):
        return False
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.dtype in _QUANTIZED:
        return False
    return _address(tensor) != 0 or (tensor.numel() == 0 and not tensor.is_meta)


def check_savable(tensor: Tensor, path: str) -> None:
    """``tensor``, which stands at ``path`` of the state, can lie in a file whole.

    Raises:
        TypeError: naming ``path``, where it cannot: it is sharded, sparse, or without data.
    """
    if is_savable(tensor):
        return
    if nn.parameter.is_lazy(tensor):
        raise TypeError(f"{path} cannot be saved: it has no shape yet; run the model once before")
    if isinstance(tensor, _SPREAD):
        raise TypeError(
            f"{path} is sharded over ranks (a {type(tensor).__name__}), which a file of whole tensors cannot hold: "
            "gather it in state_dict() (e.g. StateDictOptions(full_state_dict=True)) or leave it out"
        )
    kind = f"{type(tensor).__name__} of {tensor.dtype}, {tensor.layout}"
    raise TypeError(f"{path} cannot be saved: it is a {kind}, on {tensor.device}")


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that read the same memory the same way: they are tied, and need to lie in a file once only.

    While they are alive; and tensors without elements have no memory that could be the same.
    """
    return (
        *(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device),
        *(tensor.is_conj(), tensor.is_neg()),
    )


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # inside of torch.func, a tensor stands for many
        return 0

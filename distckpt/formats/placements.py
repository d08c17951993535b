"""How a tensor is spread over ranks, in words that a checkpoint can hold, and new memory that is spread so."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.distributed.tensor as spread
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

_CUT = re.compile(r"shard ([0-9]{1,2})(?: of ([0-9]{1,9}))?")
_WHOLE = "replicate"


def describe(tensor: Tensor) -> list[str]:
    """One word for each dimension of the mesh that ``tensor`` is spread over; none where it is not."""
    return [_word(one) for one in tensor.placements] if isinstance(tensor, DTensor) else []


def spread_beside(parameter: Tensor, words: Sequence[str] | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """New memory on the ranks of ``parameter``, which is spread, for a tensor of another shape that belongs to it.

    It is spread as ``words`` say, which `describe` made. Where they are of another mesh, or there are none, it is cut
    where ``parameter`` is, in dimensions in which it is as large; else every rank has all of it.

    Raises:
        ValueError: where they are no such words.
    """
    if not isinstance(parameter, DTensor):
        raise ValueError(
            f"there is state of the shape {tuple(shape)} for a parameter of {tuple(parameter.shape)}, which nobody can "
            "cut as FullyShardedDataParallel (FSDP1) has cut that"
        )
    told = None if words is None else [_placement(word, len(shape)) for word in words]
    if told is None or len(told) != parameter.device_mesh.ndim:
        is_cut = told is None or any(not isinstance(one, Replicate) for one in told)
        told = [_beside(one, parameter, shape) if is_cut else Replicate() for one in parameter.placements]
    return spread.empty(shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=told)


def _beside(placement: Placement, parameter: Tensor, shape: torch.Size) -> Placement:
    if isinstance(placement, (Shard, _StridedShard)):
        dim = placement.dim
        if dim < len(shape) and shape[dim] == parameter.shape[dim]:
            return placement
    return Replicate()


def _word(placement: Placement) -> str:
    if isinstance(placement, _StridedShard):
        return f"shard {placement.dim} of {placement.split_factor}"
    if isinstance(placement, Shard):
        return f"shard {placement.dim}"
    return _WHOLE if isinstance(placement, Replicate) else str(placement)


def _placement(word: object, dims: int) -> Placement:
    if word == _WHOLE:
        return Replicate()
    told = _CUT.fullmatch(word) if isinstance(word, str) else None
    if told is None or int(told[1]) >= dims:
        raise ValueError(f"{ascii(word)[:40]} is no way to spread a tensor of {dims} dimensions")
    if told[2] is None:
        return Shard(int(told[1]))
    return _StridedShard(int(told[1]), split_factor=int(told[2]))

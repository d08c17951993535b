"""What this rank holds of a tensor that is spread over ranks: its boxes in the whole, and where each lies here."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

Extents = tuple[int, ...]
_Run = tuple[int, int]  # where a range of a dimension begins and ends


class Box(NamedTuple):
    """A part of a tensor.

    Attributes:
        offsets, sizes: in the whole tensor.
        begins: where it begins in the tensor that this rank has.
    """

    offsets: Extents
    sizes: Extents
    begins: Extents


def is_spread(tensor: Tensor) -> bool:
    """Whether its elements lie on several ranks."""
    return isinstance(tensor, DTensor)


def spread_of(tensor: Tensor) -> Hashable:
    """How its elements lie on several ranks; ``None`` where they are all here."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def local_of(tensor: Tensor) -> Tensor:
    """The elements of ``tensor`` that this rank has: the same memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # to_local() costs ten times as much


def boxes_of(tensor: Tensor) -> Sequence[Box]:
    """The boxes that this rank has of ``tensor``: one, where it was cut in the usual ways; none, where it has no
    element of one that has some. Costs next to nothing where another was cut alike.

    Raises:
        TypeError: where it is a sum over ranks that nobody has worked out.
    """
    if isinstance(tensor, DTensor):
        return _boxes(tuple(tensor.shape), tensor.device_mesh, tensor.placements)
    return _whole(tuple(tensor.shape))


def view_of(tensor: Tensor, box: Box) -> Tensor:
    """The elements of ``tensor`` in ``box``, one of its `boxes_of`: the same memory."""
    return narrowed(local_of(tensor), box.begins, box.sizes)


def narrowed(tensor: Tensor, begins: Extents, sizes: Extents) -> Tensor:
    """The box of ``tensor`` that begins there: the same memory."""
    if sizes == tensor.shape:
        return tensor
    for dim, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, begin, size)
    return tensor


@lru_cache(maxsize=4096)
def _whole(shape: Extents) -> Sequence[Box]:
    nowhere = (0,) * len(shape)
    return (Box(nowhere, shape, nowhere),)


@lru_cache(maxsize=4096)
def _boxes(shape: Extents, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Sequence[Box]:
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return ()
    return boxes_at(shape, tuple(mesh.shape), tuple(coordinate), placements)


def boxes_at(
    shape: Extents, mesh_shape: Extents, coordinate: Extents, placements: Sequence[Placement]
) -> Sequence[Box]:
    """The boxes that the rank at ``coordinate`` of the mesh has of a tensor of that shape.

    Offsets that torch reports are not asked for: where a `_StridedShard` stands alone they are wrong, as what a rank
    holds is no box then.
    """
    runs: list[list[_Run]] = [[(0, extent)] for extent in shape]
    for number, at, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if isinstance(placement, _StridedShard):
            pieces = _chunks(runs[placement.dim], int(placement.split_factor))
            runs[placement.dim] = _joined([run for piece in pieces for run in _chunks(piece, number)[at]])
        elif isinstance(placement, Shard):
            runs[placement.dim] = _chunks(runs[placement.dim], number)[at]
        elif not isinstance(placement, Replicate):
            raise TypeError(f"it has the placement {placement}, a sum that is not worked out yet: redistribute it")
    if 0 in shape:  # all of it, which is nothing, or nobody would have it
        return _whole(shape) if all(at == 0 for at in coordinate) else ()
    boxes = []
    for chosen in product(*map(_placed, runs)):
        offsets, sizes, begins = zip(*chosen, strict=True) if chosen else ((), (), ())
        boxes.append(Box(offsets, sizes, begins))
    return tuple(boxes)


def _chunks(runs: list[_Run], number: int) -> list[list[_Run]]:
    """As ``torch.chunk``: so many pieces of the same size, but that the last ones may be smaller, or empty."""
    count = sum(end - begin for begin, end in runs)
    size = -(-count // number)
    return [_slice(runs, nth * size, min((nth + 1) * size, count)) for nth in range(number)]


def _slice(runs: list[_Run], begin: int, end: int) -> list[_Run]:
    found = []
    at = 0
    for first, last in runs:
        low, high = max(begin - at, 0), min(end - at, last - first)
        if low < high:
            found.append((first + low, first + high))
        at += last - first
    return found


def _joined(runs: list[_Run]) -> list[_Run]:
    joined: list[_Run] = []
    for begin, end in runs:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined


def _placed(runs: list[_Run]) -> list[tuple[int, int, int]]:
    """Of each run: where it begins, how long it is, and where it lies among the others."""
    placed = []
    at = 0
    for begin, end in runs:
        placed.append((begin, end - begin, at))
        at += end - begin
    return placed


def new_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """New memory for a tensor of that dtype, spread over ranks as ``tensor`` is."""
    assert isinstance(tensor, DTensor), "others are not spread"
    local = torch.empty_like(tensor._local_tensor, dtype=dtype, memory_format=torch.contiguous_format)
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )

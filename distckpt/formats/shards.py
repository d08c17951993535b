"""What this rank holds of a tensor that is spread over ranks: its boxes in the whole, and where each lies here."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from distckpt.formats.spread import Box, Extents, Spread, of_shards

_PLAIN = (Tensor, nn.Parameter)  # asked for first, as most are: the others take longer to tell apart
_Run = tuple[int, int]  # where a range of a dimension begins and ends


def is_spread(tensor: Tensor) -> bool:
    """Whether its elements lie on several ranks."""
    return type(tensor) not in _PLAIN and isinstance(tensor, (DTensor, Spread, ShardedTensor))


def is_on_several(tensor: Tensor) -> bool:
    """Whether other ranks have what this rank has of it, too."""
    if isinstance(tensor, DTensor):
        sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
        return any(isinstance(placement, Replicate) and size > 1 for placement, size in sizes)
    return tensor.is_on_several if isinstance(tensor, Spread) else not isinstance(tensor, ShardedTensor)


def spread_of(tensor: Tensor) -> Hashable:
    """How its elements lie on several ranks; ``None`` where they are all here."""
    if type(tensor) in _PLAIN:
        return None
    if isinstance(tensor, DTensor):
        return tensor._spec.mesh, tensor._spec.placements
    tensor = unwrapped(tensor)
    return tensor.boxes if isinstance(tensor, Spread) else None


def unwrapped(tensor: Tensor) -> Tensor:
    """``tensor``, as a `Spread` where it is a ``ShardedTensor``: the same memory."""
    return of_shards(tensor) if isinstance(tensor, ShardedTensor) else tensor


def local_of(tensor: Tensor) -> Tensor:
    """The elements of ``tensor`` that this rank has: the same memory. Where they are several boxes that no tensor
    holds, those of the first; `views_of` has all."""
    if type(tensor) in _PLAIN:
        return tensor
    if isinstance(tensor, DTensor):
        return tensor._local_tensor  # to_local() costs ten times as much
    return tensor.local if isinstance(tensor, Spread) else tensor


def views_of(tensor: Tensor) -> Sequence[Tensor]:
    """The tensors in which all lies that this rank has of it: the same memory."""
    if type(tensor) in _PLAIN:
        return (tensor,)
    tensor = unwrapped(tensor)
    return tensor.views if isinstance(tensor, Spread) else (local_of(tensor),)


def is_without_memory(tensor: Tensor) -> bool:
    """Whether it is on the meta device."""
    if isinstance(tensor, ShardedTensor):  # which cannot be asked, if it has several shards here
        return any(view.is_meta for view in views_of(tensor))
    return tensor.is_meta


def boxes_of(tensor: Tensor) -> Sequence[Box]:
    """The boxes that this rank has of ``tensor``: one, where it was cut in the usual ways; none, where it has no
    element of one that has some. Costs next to nothing where another was cut alike.

    Raises:
        TypeError: where it is a sum over ranks that nobody has worked out, or is not cut as its placements say.
    """
    if isinstance(tensor, DTensor):
        here = tuple(tensor._local_tensor.shape)
        return _boxes(tuple(tensor.shape), here, tensor.device_mesh, tensor.placements)
    tensor = unwrapped(tensor)
    return tensor.boxes if isinstance(tensor, Spread) else _whole(tuple(tensor.shape))


def view_of(tensor: Tensor, box: Box) -> Tensor:
    """The elements of ``tensor`` in ``box``, one of its `boxes_of`: the same memory."""
    tensor = unwrapped(tensor)
    if isinstance(tensor, Spread):
        return tensor.views[box.begins[0]]
    return narrowed(local_of(tensor), box.begins, box.sizes)


def narrowed(tensor: Tensor, begins: Extents, sizes: Extents) -> Tensor:
    """The box of ``tensor`` that begins there: the same memory."""
    if sizes == tensor.shape:
        return tensor
    if 0 in sizes:  # which may be more than is here of what nobody has an element of
        return tensor.reshape(sizes)
    for dim, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, begin, size)
    return tensor


@lru_cache(maxsize=4096)
def _whole(shape: Extents) -> Sequence[Box]:
    nowhere = (0,) * len(shape)
    return (Box(nowhere, shape, nowhere),)


@lru_cache(maxsize=4096)
def _boxes(shape: Extents, here: Extents, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Sequence[Box]:
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return ()
    for is_left_to_right in (False, True):
        boxes = boxes_at(shape, tuple(mesh.shape), tuple(coordinate), placements, is_left_to_right=is_left_to_right)
        if 0 in shape or _extents(boxes) == (here if math.prod(here) else ()):
            return boxes
    raise TypeError(f"what this rank has of it has the shape {here}, which is not what {placements} of {shape} gives")


def _extents(boxes: Sequence[Box]) -> Extents:
    """The shape of a tensor that consists of them."""
    ends = [[begin + size for begin, size in zip(box.begins, box.sizes, strict=True)] for box in boxes]
    return tuple(map(max, zip(*ends, strict=True)))


class _Split(NamedTuple):
    """What is done to a dimension for one of the mesh: which of so many pieces is kept; of each of so many parts."""

    number: int
    at: int
    parts: int


def boxes_at(
    shape: Extents,
    mesh_shape: Extents,
    coordinate: Extents,
    placements: Sequence[Placement],
    *,
    is_left_to_right: bool = False,
) -> Sequence[Box]:
    """The boxes that the rank at ``coordinate`` of the mesh has of a tensor of that shape.

    Offsets that torch reports are not asked for: where a `_StridedShard` stands alone they are wrong, as what a rank
    holds is no box then.

    Args:
        is_left_to_right: what FSDP2 makes of a tensor that is sharded already is told as a `_StridedShard` to the left
            of what was done before. Where the pieces are uneven, going through the placements from the left, as torch
            does when it cuts a whole tensor by them, gives other pieces than FSDP2 has. They are, by default, those.
    """
    splits: list[list[_Split]] = [[] for _ in shape]
    for number, at, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if isinstance(placement, _StridedShard):
            splits[placement.dim].append(_Split(number, at, int(placement.split_factor)))
        elif isinstance(placement, Shard):
            splits[placement.dim].append(_Split(number, at, 1))
        elif not isinstance(placement, Replicate):
            raise TypeError(f"it has the placement {placement}, a sum that is not worked out yet: redistribute it")
    if 0 in shape:  # all of it, which is nothing, or nobody would have it
        return _whole(shape) if all(at == 0 for at in coordinate) else ()
    runs = [_runs(extent, of if is_left_to_right else _as_done(of)) for extent, of in zip(shape, splits, strict=True)]
    boxes = []
    for chosen in product(*map(_placed, runs)):
        offsets, sizes, begins = zip(*chosen, strict=True) if chosen else ((), (), ())
        boxes.append(Box(offsets, sizes, begins))
    return tuple(boxes)


def _as_done(splits: list[_Split]) -> list[_Split]:
    """In the order in which FSDP2 and others did it: each behind those that had made the parts that it tells of. As
    they are where there are no such."""
    ordered: list[_Split] = []
    for split in reversed(splits):
        made = [math.prod(one.number for one in ordered[:nth]) for nth in range(len(ordered) + 1)]
        if split.parts not in made:
            return splits
        ordered.insert(made.index(split.parts), split._replace(parts=1))
    return ordered


def _runs(extent: int, splits: Sequence[_Split]) -> list[_Run]:
    runs = [(0, extent)]
    for number, at, parts in splits:
        pieces = [_chunk(runs, parts, nth) for nth in range(parts)]
        runs = _joined([run for piece in pieces for run in _chunk(piece, number, at)])
    return runs


def _chunk(runs: list[_Run], number: int, at: int) -> list[_Run]:
    """As ``torch.chunk``: of so many pieces of the same size, but that the last ones may be smaller, or empty, one."""
    count = sum(end - begin for begin, end in runs)
    size = -(-count // number)
    return _slice(runs, at * size, min((at + 1) * size, count))


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
    if not isinstance(tensor, DTensor):
        spread = unwrapped(tensor)
        assert isinstance(spread, Spread), "others are not spread"
        return spread.again(dtype)
    local = torch.empty_like(tensor._local_tensor, dtype=dtype, memory_format=torch.contiguous_format)
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of ``tensor``, those of each element in a last dimension of their own, if it has several: the same
    memory, spread over ranks as it is."""
    tensor = unwrapped(tensor)
    shape = shape_in_bytes(tensor.shape, tensor.dtype)
    if isinstance(tensor, Spread):
        return tensor.seen_as(shape, _bytes_of)
    seen = _bytes_of(local_of(tensor))
    if not isinstance(tensor, DTensor):
        return seen
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        seen, tensor.device_mesh, tensor.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _bytes_of(local: Tensor) -> Tensor:
    local = local.detach().resolve_conj().resolve_neg()
    return (local if local.dtype.itemsize == 1 else local.unsqueeze(-1)).view(torch.uint8)


def shape_in_bytes(shape: Sequence[int], dtype: torch.dtype) -> Extents:
    """The shape of `bytes_of` a tensor."""
    return (*shape, dtype.itemsize) if dtype.itemsize > 1 else tuple(shape)


def cut_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """What this rank has of ``whole``, spread over ranks as ``tensor`` is, which has its shape."""
    cut = new_like(tensor, whole.dtype)
    for box in boxes_of(tensor):
        view_of(cut, box).copy_(narrowed(whole, box.offsets, box.sizes))
    return cut

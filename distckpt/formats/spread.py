"""Tensors of which this rank has some boxes that no placements tell of: what is left of a flattened tensor where FSDP1
cut it, and the shards of a ``ShardedTensor``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Extents = tuple[int, ...]


class Box(NamedTuple):
    """A part of a tensor.

    Attributes:
        offsets, sizes: in the whole tensor.
        begins: where it begins in the tensor that this rank has; of a `Spread`, which of its views it is.
    """

    offsets: Extents
    sizes: Extents
    begins: Extents


class Spread(Tensor):
    """A tensor whose elements lie on several ranks. It has the shape of the whole, and no memory but that of its views.

    Attributes:
        boxes: that this rank has of it.
        views: the elements of each, in the memory of the program.
        is_on_several: whether other ranks have the same boxes, too.
        again: makes what the program would have in the place of this one, of another dtype, in new memory.
    """

    boxes: Sequence[Box]
    views: Sequence[Tensor]
    is_on_several: bool
    again: Callable[[torch.dtype], Tensor]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # looking at it is cheap

    @classmethod
    def made(
        cls,
        shape: Sequence[int],
        like: Tensor,
        parts: Sequence[tuple[Extents, Extents, Tensor]],
        again: Callable[[torch.dtype], Tensor],
        *,
        is_on_several: bool = False,
    ) -> Self:
        """One of the dtype and on the device of ``like``.

        Args:
            parts: of each box its offsets, its sizes and its elements. None is empty, but that of a tensor without
                elements, which every rank has.
        """
        shape = torch.Size(shape)
        one: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        if 0 in shape:
            parts = [((0,) * len(shape), tuple(shape), torch.empty(shape, dtype=like.dtype, device=like.device))]
        one.boxes = tuple(Box(offsets, sizes, (nth,)) for nth, (offsets, sizes, _) in enumerate(parts))
        one.views = tuple(view for _, _, view in parts)
        one.is_on_several = is_on_several
        one.again = again
        return one

    @property
    def local(self) -> Tensor:
        """What there is here: all of it, where that is one box; nothing, where there is none."""
        return self.views[0] if self.views else torch.empty(0, dtype=self.dtype, device=self.device)

    def seen_as(self, shape: Extents, see: Callable[[Tensor], Tensor]) -> Spread:
        """One of that shape, of whose elements ``see`` has a last dimension more: the same memory."""
        views = [see(view) for view in self.views]
        more = len(shape) - self.ndim
        parts = [
            ((*box.offsets, *(0,) * more), tuple(view.shape), view) for box, view in zip(self.boxes, views, strict=True)
        ]
        like = see(torch.empty(0, dtype=self.dtype, device=self.device))
        return Spread.made(shape, like, parts, self.again, is_on_several=self.is_on_several)

    def with_views(self, views: Sequence[Tensor]) -> Spread:
        """One that has these in its boxes."""
        parts = [(box.offsets, box.sizes, view) for box, view in zip(self.boxes, views, strict=True)]
        return Spread.made(self.shape, views[0], parts, self.again, is_on_several=self.is_on_several)

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        """What a planner of ``torch.distributed.checkpoint`` asks for."""
        return [_write_item(fqn, self, box, view) for box, view in zip(self.boxes, self.views, strict=True)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """What a planner of ``torch.distributed.checkpoint`` asks for."""
        at = tuple(index.offset or (0,) * self.ndim)
        return next(view for box, view in zip(self.boxes, self.views, strict=True) if box.offsets == at)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise TypeError(f"{func} of a tensor that lies on several ranks, of which this one has a part")


class Range(Spread):
    """A tensor of which this rank has some elements, one after another as they lie in memory where it is whole.

    Attributes:
        elements: all of them, in one dimension.
        of: makes one of other elements, as many.
    """

    elements: Tensor
    of: Callable[[Tensor], Range]

    @classmethod
    def cut(
        cls, shape: Sequence[int], order: Sequence[int], begin: int, elements: Tensor, *, is_on_several: bool = False
    ) -> Range:
        """
        Args:
            order: the dimensions, that first in which the next element is the furthest in memory.
            begin: how many elements of the whole come before these.
        """
        back = sorted(range(len(order)), key=lambda nth: order[nth])
        parts = []
        at = 0
        for offsets, sizes in boxes_of_range(tuple(shape[dim] for dim in order), begin, begin + len(elements)):
            count = math.prod(sizes)
            view = elements[at : at + count].view(sizes).permute(back)
            parts.append((tuple(offsets[nth] for nth in back), tuple(view.shape), view))
            at += count

        def of(others: Tensor) -> Range:
            return cls.cut(shape, order, begin, others, is_on_several=is_on_several)

        def again(dtype: torch.dtype) -> Range:
            return of(torch.empty_like(elements, dtype=dtype))

        one = cls.made(shape, elements, parts, again, is_on_several=is_on_several)
        one.elements, one.of = elements, of
        return one


def _write_item(fqn: str, tensor: Tensor, box: Box, view: Tensor) -> WriteItem:
    chunk = ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))
    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(view), tensor.size())
    return WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def of_shards(tensor: ShardedTensor) -> Spread:
    """``tensor``, by the shards that this rank has of it: the same memory."""
    shards = tensor.local_shards()
    parts = [
        (tuple(one.metadata.shard_offsets), tuple(one.metadata.shard_sizes), one.tensor.detach()) for one in shards
    ]

    def again(dtype: torch.dtype) -> ShardedTensor:
        return _with_new_shards(tensor, dtype)

    like = torch.empty(0, dtype=tensor.dtype, device=shards[0].tensor.device if shards else "cpu")
    return Spread.made(tuple(tensor.shape), like, [part for part in parts if 0 not in part[1]], again)


def _with_new_shards(tensor: ShardedTensor, dtype: torch.dtype) -> ShardedTensor:
    """One that is cut like ``tensor``, in new memory. No rank waits for others, as they would in most of the ways to
    make one; the others refuse shards without elements that torch itself has made."""
    words = {"dtype": dtype, "layout": torch.strided, "pin_memory": False, "requires_grad": False}
    one: ShardedTensor = ShardedTensor.__new__(ShardedTensor, tensor.sharding_spec(), *tensor.shape, **words)
    one._prepare_init(process_group=tensor._process_group)  # type: ignore[no-untyped-call]  # torch's own
    one._local_shards = [
        Shard(torch.empty_like(shard.tensor, dtype=dtype, requires_grad=False), copy.deepcopy(shard.metadata))
        for shard in tensor.local_shards()
    ]
    one._post_init()  # type: ignore[no-untyped-call]  # torch's own
    return one


def boxes_of_range(shape: Extents, begin: int, end: int) -> Iterator[tuple[Extents, Extents]]:
    """The boxes that the elements from ``begin`` to ``end`` of a tensor consist of, in their order: at most one less
    than twice as many as there are dimensions. Each lies in them without a hole."""
    if begin == end:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    (first, low), (last, high) = divmod(begin, row), divmod(end, row)
    if first == last:
        yield from _in_row(first, shape[1:], low, high)
        return
    if low:
        yield from _in_row(first, shape[1:], low, row)
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(last, shape[1:], 0, high)


def _in_row(at: int, shape: Extents, begin: int, end: int) -> Iterator[tuple[Extents, Extents]]:
    for offsets, sizes in boxes_of_range(shape, begin, end):
        yield (at, *offsets), (1, *sizes)

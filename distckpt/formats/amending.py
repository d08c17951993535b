"""What was written where some ranks wrote something else than the plan says, as their state has become another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distckpt import layout
from distckpt.chunks import Chunks
from distckpt.formats.boxes import fault
from distckpt.manifest import TensorGroup


class _Chunk(NamedTuple):
    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


_Kind = tuple[str, tuple[int, ...]]


def amended(
    planned: Sequence[TensorGroup],
    holders: Mapping[str, frozenset[int]],
    others: Mapping[int, Sequence[TensorGroup]],
) -> tuple[TensorGroup, ...]:
    """What the manifest says of all tensors. One that no rank has any more is not among them.

    Args:
        holders: by key, the ranks that had something of it when the plan was made.
        others: by rank, all that it wrote, if that is not what was planned.

    Raises:
        ValueError: naming a tensor that was not written whole, or is not the same on all ranks.
    """
    kinds: dict[str, _Kind] = {}
    chunks: defaultdict[str, list[_Chunk]] = defaultdict(list)
    wanted: set[str] = set()  # what some rank has
    for group in planned:
        written = [one for one in _chunks(group) if layout.rank_of(one.file) not in others]
        for key in group.keys:
            if not holders[key] <= others.keys():
                wanted.add(key)
                kinds[key] = group.dtype, group.shape
                chunks[key] += written
    for rank in sorted(others):
        for group in others[rank]:
            for key in group.keys:
                wanted.add(key)
                if kinds.setdefault(key, (group.dtype, group.shape)) != (group.dtype, group.shape):
                    raise ValueError(f"{ascii(key)[:120]} is not the same on all ranks")
                chunks[key] += [one for one in _chunks(group) if not _is_among(one, chunks[key])]
    return _grouped({key: _apart(chunks[key]) for key in kinds if key in wanted}, kinds)


def _is_among(chunk: _Chunk, chunks: Sequence[_Chunk]) -> bool:
    return any(one[1:] == chunk[1:] for one in chunks)


def _apart(chunks: list[_Chunk]) -> list[_Chunk]:
    """Without those that lie within another one: who wrote all that it has, wrote what others wrote a part of."""
    return [one for one in chunks if not any(_is_within(one, other) for other in chunks)]


def _is_within(one: _Chunk, other: _Chunk) -> bool:
    if one.sizes == other.sizes:
        return False
    pairs = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(there <= begin and begin + size <= there + extent for begin, size, there, extent in pairs)


def _chunks(group: TensorGroup) -> list[_Chunk]:
    if group.chunks is None:
        return [_Chunk(group.file, (0,) * len(group.shape), group.shape)]
    dims, chunks = len(group.shape), group.chunks
    return [
        _Chunk(file, chunks.offsets[at : at + dims], chunks.sizes[at : at + dims])
        for file, at in zip(chunks.files, range(0, dims * len(chunks.files), dims), strict=True)
    ]


def _grouped(chunks: Mapping[str, Sequence[_Chunk]], kinds: Mapping[str, _Kind]) -> tuple[TensorGroup, ...]:
    alike: defaultdict[tuple[_Kind, Chunks], list[str]] = defaultdict(list)
    for key, told in chunks.items():
        dtype, shape = kinds[key]
        rows = (len(told), len(shape))
        offsets, sizes = (np.array([one[at] for one in told], dtype=np.int64).reshape(rows) for at in (1, 2))
        if why := fault(shape, offsets, sizes):
            raise ValueError(f"{ascii(key)[:120]} of shape {shape} was not written whole: {why}")
        joined = Chunks.joined([Chunks((one.file,), one.offsets, one.sizes) for one in told])
        alike[kinds[key], joined].append(key)
    return tuple(TensorGroup.of(*kind, lies, tuple(keys)) for (kind, lies), keys in alike.items())

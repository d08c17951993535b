"""What was written where some ranks wrote something else than the plan says, as their state has become another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class _Group:
    """Tensors that are alike, and what was written of each of them."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Sequence[_Chunk]


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
    groups: list[_Group] = []
    members: dict[str, tuple[int, ...]] = {}  # the groups in which each tensor is, of those that some rank has
    for group in _by_place(planned):
        written = [one for one in _chunks(group) if layout.rank_of(one.file) not in others]
        members |= {key: (len(groups),) for key in group.keys if not holders[key] <= others.keys()}
        groups.append(_Group(group.dtype, group.shape, written))
    for rank in sorted(others):
        for group in others[rank]:
            for key in group.keys:
                known = members.get(key, ())
                if known and (groups[known[0]].dtype, groups[known[0]].shape) != (group.dtype, group.shape):
                    raise ValueError(f"{ascii(key)[:120]} is not the same on all ranks")
                members[key] = (*known, len(groups))
            groups.append(_Group(group.dtype, group.shape, _chunks(group)))
    alike: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    for key, of in members.items():
        alike[of].append(key)
    return tuple(_joined([groups[one] for one in of], keys) for of, keys in alike.items())


def _by_place(groups: Sequence[TensorGroup]) -> Iterator[TensorGroup]:
    """The same, with those only in a group that lie in the same files."""
    for group in groups:
        keys: defaultdict[str, list[str]] = defaultdict(list)
        if len(group.files) < 2:
            yield group
            continue
        for file, key in zip(group.files, group.keys, strict=True):
            keys[file].append(key)
        for file, of in keys.items():
            yield replace(group, files=(file,), keys=tuple(of))


def _joined(groups: Sequence[_Group], keys: Sequence[str]) -> TensorGroup:
    """All that was written of these tensors, each part of them once."""
    dtype, shape = groups[0].dtype, groups[0].shape
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], _Chunk] = {}
    for group in groups:
        for one in group.chunks:
            found.setdefault((one.offsets, one.sizes), one)
    chunks = list(found.values())
    if _fault(shape, chunks):
        # Who wrote all that it has, wrote what others wrote a part of.
        chunks = [one for one in chunks if not any(_is_within(one, other) for other in chunks)]
    if why := _fault(shape, chunks):
        raise ValueError(f"{ascii(keys[0])[:120]} of shape {shape} was not written whole: {why}")
    lies = Chunks.joined([Chunks((one.file,), one.offsets, one.sizes) for one in chunks])
    return TensorGroup.of(dtype, shape, lies, tuple(keys))


def _fault(shape: tuple[int, ...], chunks: Sequence[_Chunk]) -> str:
    rows = (len(chunks), len(shape))
    offsets, sizes = (np.array([one[at] for one in chunks], dtype=np.int64).reshape(rows) for at in (1, 2))
    return fault(shape, offsets, sizes)


def _is_within(one: _Chunk, other: _Chunk) -> bool:
    if one.sizes == other.sizes:
        return False
    pairs = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(there <= begin and begin + size <= there + extent for begin, size, there, extent in pairs)


def _chunks(group: TensorGroup) -> list[_Chunk]:
    if group.chunks is None:
        return [_Chunk(group.files[0], (0,) * len(group.shape), group.shape)]
    dims, chunks = len(group.shape), group.chunks
    return [
        _Chunk(file, chunks.offsets[at : at + dims], chunks.sizes[at : at + dims])
        for file, at in zip(chunks.files, range(0, dims * len(chunks.files), dims), strict=True)
    ]

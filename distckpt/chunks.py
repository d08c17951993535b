"""Where the parts of a tensor lie, and how a manifest says so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise, product
from typing import Any

from distckpt import progressions
from distckpt.strict_json import exactly


@dataclass(frozen=True)
class Chunks:
    """Where the parts of a tensor lie: chunk by chunk its file, and its box in the whole tensor.

    Attributes:
        offsets, sizes: so many numbers for each chunk as the tensor has dimensions, one chunk after another.
    """

    files: tuple[str, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def to_fields(self, numbers: FileNumbers) -> dict[str, Any]:
        """As JSON, where files are known by their ``numbers``."""
        return {"chunks": {"files": numbers.told(self.files), "offsets": self.offsets, "sizes": self.sizes}}

    @classmethod
    def from_fields(cls, told: Any, shape: tuple[int, ...], paths: Sequence[str], whose: str) -> Chunks:
        """The inverse, of a tensor of that shape.

        Raises:
            ValueError: naming ``whose`` it is, where it cannot be.
        """
        fields = exactly(told, {"files": list, "offsets": list, "sizes": list}, whose)
        files, offsets, sizes = files_at(fields["files"], len(paths), paths, whose), fields["offsets"], fields["sizes"]
        if not are_counts(offsets) or not are_counts(sizes):
            raise ValueError(f"{whose} lie at no places")
        if not len(offsets) == len(sizes) == len(shape) * len(files):
            raise ValueError(f"{whose} have {len(files)} chunks, {len(offsets)} offsets and {len(sizes)} sizes")
        return cls(files, tuple(offsets), tuple(sizes))

    @classmethod
    def joined(cls, several: Sequence[Chunks]) -> Chunks:
        """The chunks of all of them."""
        return cls(
            tuple(file for one in several for file in one.files),
            tuple(number for one in several for number in one.offsets),
            tuple(number for one in several for number in one.sizes),
        )


@dataclass(frozen=True)
class Grid:
    """Where the parts of a tensor lie that was cut all the way through, so that they are the cells of a grid. As a rule
    that takes few words, however many ranks there are. It covers the tensor, each element once, as it is.

    Attributes:
        files: of each cell, where the last dimension is gone through first.
        shape: of the whole tensor.
        starts: of each dimension where its parts begin, as `progressions.condensed` has it. The first one at 0.
    """

    files: tuple[str, ...]
    shape: tuple[int, ...]
    starts: tuple[Sequence[int], ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """As those of `Chunks`."""
        return tuple(chain.from_iterable(product(*self.starts)))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """As those of `Chunks`."""
        ends = zip(self.starts, self.shape, strict=True)
        extents = [[end - start for start, end in pairwise((*starts, extent))] for starts, extent in ends]
        return tuple(chain.from_iterable(product(*extents)))

    def to_fields(self, numbers: FileNumbers) -> dict[str, Any]:
        """As JSON, where files are known by their ``numbers``."""
        return {"grid": {"files": numbers.told(self.files), "starts": [*map(progressions.told, self.starts)]}}

    @classmethod
    def from_fields(cls, told: Any, shape: tuple[int, ...], paths: Sequence[str], whose: str) -> Grid:
        """See `Chunks.from_fields`."""
        fields = exactly(told, {"files": list, "starts": list}, whose)
        files = files_at(fields["files"], len(paths), paths, whose)
        starts = tuple(progressions.read(one, len(files), f"{whose}: its starts") for one in fields["starts"])
        if len(starts) != len(shape) or math.prod(map(len, starts)) != len(files) or not files:
            raise ValueError(f"{whose} have {len(files)} chunks, which are not the cells of {ascii(starts)[:80]}")
        for of, extent in zip(starts, shape, strict=True):
            if of[0] or of[-1] >= extent or not progressions.is_rising(of):
                raise ValueError(f"{whose}: no parts of {extent} begin at {ascii(of)[:80]}")
        return cls(files, shape, starts)


# By the word that says that it is one.
CUTS: Mapping[str, type[Chunks | Grid]] = {"chunks": Chunks, "grid": Grid}


class FileNumbers:
    """The how-manieth of a checkpoint's files each is."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._numbers = {path: number for number, path in enumerate(paths)}
        self._told: dict[tuple[str, ...], list[Any]] = {}  # many tensors lie in the same files

    def told(self, files: tuple[str, ...]) -> list[Any]:
        """Those of ``files``, as JSON."""
        if (known := self._told.get(files)) is None:
            known = self._told[files] = progressions.told([self._numbers[file] for file in files])
        return known


def are_counts(values: list[Any]) -> bool:
    """Whether they are whole numbers, none of them below zero."""
    return set(map(type, values)) <= {int} and (not values or min(values) >= 0)


def files_at(told: list[Any], most: int, paths: Sequence[str], whose: str) -> tuple[str, ...]:
    """Those of ``paths`` that have these numbers, at most so many.

    Raises:
        ValueError: naming ``whose`` they are, where they cannot be.
    """
    numbers = progressions.read(told, most, f"{whose}: its files")
    if max(numbers, default=0) >= len(paths):
        raise ValueError(f"{whose} lie in files that there are not")
    return tuple(paths[number] for number in numbers)

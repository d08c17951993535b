"""Jobs of thousands of ranks, each of which knows what it has of each tensor, and tells the leader."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from distckpt.formats.held import Holding, Kind, pack_numbers, unpack_numbers
from distckpt.formats.shards import Box, boxes_at
from distckpt.manifest import digest

Shape = tuple[int, ...]

# Of GPT-2, Llama of 8 and 70 B, an MoE whose experts are stacked, ResNet-50, ViT-B, BERT: 59, and 60 with the step.
SHAPES: tuple[Shape, ...] = (
    *((50257, 768), (1024, 768), (2304, 768), (768, 768), (3072, 768), (768, 3072), (768,), (2304,), (3072,)),
    *((128256, 4096), (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (4096,), (128256, 8192)),
    *((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672), (8192,)),
    *((64, 14336, 1024), (64, 1024, 14336), (64, 1024)),
    *((64, 3, 7, 7), (64, 64, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1), (64, 256, 1, 1), (128, 256, 1, 1)),
    *((128, 128, 3, 3), (512, 128, 1, 1), (128, 512, 1, 1), (256, 512, 1, 1), (256, 256, 3, 3), (1024, 256, 1, 1)),
    *((256, 1024, 1, 1), (512, 256, 1, 1), (1024, 512, 1, 1), (512, 1024, 1, 1), (2048, 512, 1, 1)),
    *((512, 2048, 1, 1), (512, 512, 3, 3), (2048, 1024, 1, 1), (1000, 2048), (64,), (128,), (256,), (512,), (1024,)),
    *((2048,), (1000,), (768, 3, 16, 16), (1, 1, 768), (1, 197, 768), (30522, 1024), (4096, 1024), (1024, 1024)),
    (2, 1024),
)
# What a training has of each parameter. The step, a number, is the same on all ranks.
NAMES = ("model.layers.{}.weight", *(f"optim.state.layers.{{}}.weight.{one}" for one in ("exp_avg", "exp_avg_sq")))
STEP = "optim.state.layers.{}.weight.step"


@dataclass(frozen=True)
class Mesh:
    """How ranks are arranged, and how tensors lie on them, each as the next of ``placements``."""

    shape: Shape
    placements: Sequence[Sequence[Placement]]


def sharded(ranks: int) -> Mesh:
    return Mesh((ranks,), [[Shard(0)]])


def replicated(ranks: int) -> Mesh:
    return Mesh((ranks,), [[Replicate()]])


def hybrid(ranks: int) -> Mesh:
    replicas = min(ranks, 16)
    return Mesh((replicas, ranks // replicas), [[Replicate(), Shard(0)]])


def two_dimensional(ranks: int) -> Mesh:
    """FSDP2 over tensor-parallel ranks, which have rows of one weight and columns of the next."""
    few = min(ranks, 8)
    return Mesh((ranks // few, few), [[_StridedShard(0, split_factor=few), Shard(0)], [Shard(0), Shard(1)]])


STATES: Mapping[str, tuple[str, Callable[[int], Mesh]]] = {
    "fsdp": ("FSDP2, 60 shapes of real models in random order", sharded),
    "ddp": ("DDP, the same shapes", replicated),
    "hsdp": ("HSDP with 16 replicas, the same shapes", hybrid),
    "2d": ("FSDP2 over 8 tensor-parallel ranks, the same shapes", two_dimensional),
    "different": ("FSDP2, each tensor of another shape", sharded),
}


class Job:
    """A state, and the ranks it is spread over, each of which knows all its tensors.

    Attributes:
        kinds: its tensors.
        layouts: how many shapes there are, each as often as it is cut in another way.
    """

    def __init__(self, state: str, ranks: int, tensors: int) -> None:
        self.mesh = STATES[state][1](ranks)
        made = _different(tensors) if state == "different" else trained(tensors)
        placed = []
        for key, shape, nth in made:
            lies = self.mesh.placements[nth % len(self.mesh.placements)]
            placed.append((Kind(key, 0, "F32", shape), tuple(_fitting(one, len(shape)) for one in lies)))
        placed.sort(key=lambda one: one[0])
        self.kinds = [kind for kind, _ in placed]
        cuts: dict[tuple[Shape, tuple[Placement, ...]], int] = {}
        self._cut_of = np.array([cuts.setdefault((kind.shape, lies), len(cuts)) for kind, lies in placed])
        self._cuts = list(cuts)
        self._firsts = [self.kinds[nth] for nth in np.unique(self._cut_of, return_index=True)[1]]
        self._schema = digest(Holding(self.kinds, []).schema())

    @property
    def layouts(self) -> int:
        return len(self._cuts)

    def held_by(self, rank: int) -> Holding:
        """What that rank has: of each tensor one box, or none."""
        mine = self._boxes_of(rank)
        return Holding(self.kinds, [mine[cut] for cut in self._cut_of.tolist()])

    def told_by(self, rank: int) -> dict[str, Any]:
        """What it tells of that, as `Holding.tell` does, but in no time: of those that are cut alike one is asked."""
        told = Holding(self._firsts, self._boxes_of(rank)).tell(is_schema_told=False)
        which = unpack_numbers(told["which"])[self._cut_of] if told["which"] else np.zeros(1, dtype=np.int64)
        return {**told, "schema": self._schema, "which": pack_numbers(which) if which.any() else ""}

    def _boxes_of(self, rank: int) -> list[Box | None]:
        """By cut."""
        coordinate = tuple(map(int, np.unravel_index(rank, self.mesh.shape)))
        boxes = [boxes_at(shape, self.mesh.shape, coordinate, placed) for shape, placed in self._cuts]
        assert max(map(len, boxes)) == 1, "no state here is cut into several"
        return [one[0] if one else None for one in boxes]


def trained(tensors: int) -> Iterator[tuple[str, Shape, int]]:
    """Of each parameter the name of each of its tensors, the shape of that, and the how-manieth it is."""
    chosen = random.Random(0)
    for nth in range(-(-tensors // 4)):
        shape = chosen.choice(SHAPES)
        for name in NAMES:
            yield name.format(nth), shape, nth
        yield STEP.format(nth), (), nth


def _different(tensors: int) -> Iterator[tuple[str, Shape, int]]:
    for nth in range(tensors):
        yield NAMES[0].format(nth), (1024 + 13 * nth, 64 + nth % 449), nth


def _fitting(placement: Placement, dims: int) -> Placement:
    """That, for a tensor with so many dimensions: a vector is not cut into columns, nor a number at all."""
    return placement if not isinstance(placement, Replicate) and placement.dim < dims else Replicate()

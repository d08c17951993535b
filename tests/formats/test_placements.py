"""How a tensor is spread over ranks, in words, and memory that is spread as they say."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from distckpt.formats.placements import describe, spread_beside


def spread(mesh: DeviceMesh, local: torch.Tensor, *placements: Placement, shape: tuple[int, ...]) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def words(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    assert describe(torch.zeros(3)) == []
    some = spread(mesh, torch.zeros(2, 3), Replicate(), Shard(0), shape=(4, 3))
    assert describe(some) == ["replicate", "shard 0"]
    both = spread(mesh, torch.zeros(1, 3), _StridedShard(0, split_factor=2), Shard(0), shape=(4, 3))
    assert describe(both) == ["shard 0 of 2", "shard 0"]
    assert describe(spread(mesh, torch.zeros(3), Partial(), Replicate(), shape=(3,))) == ["P(sum)", "replicate"]


def as_said(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    parameter = spread(mesh, torch.zeros(1, 3), _StridedShard(0, split_factor=2), Shard(0), shape=(4, 3))
    told = ["replicate", "shard 1"]
    made = spread_beside(parameter, told, torch.Size((2, 6)), torch.float64)
    assert isinstance(made, DTensor) and made.dtype is torch.float64 and made.device_mesh == mesh
    assert describe(made) == told and made.to_local().shape == (2, 3)
    strided = spread_beside(parameter, describe(parameter), torch.Size((8,)), torch.float32)
    assert strided.placements == parameter.placements and strided.to_local().shape == (2,)


def of_another_mesh(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    parameter = spread(mesh, torch.zeros(2, 3), Shard(0), Shard(1), shape=(4, 6))
    for told in (["shard 0"], None):  # of a mesh of one dimension; and where nobody was spread
        rows = spread_beside(parameter, told, torch.Size((4, 1)), torch.float32)
        columns = spread_beside(parameter, told, torch.Size((1, 6)), torch.float32)
        other = spread_beside(parameter, told, torch.Size((5,)), torch.float32)
        assert [describe(one) for one in (rows, columns, other)] == [
            ["shard 0", "replicate"],
            ["replicate", "shard 1"],
            ["replicate", "replicate"],
        ]
    whole = spread_beside(parameter, ["replicate"], torch.Size((4, 1)), torch.float32)
    assert describe(whole) == ["replicate", "replicate"], "every rank had all of it"


def refused(rank: int, told: list[object]) -> None:
    mesh = init_device_mesh("cpu", (1, 1))
    parameter = spread(mesh, torch.zeros(4, 6), Shard(0), Shard(1), shape=(4, 6))
    with pytest.raises(ValueError, match="is no way to spread a tensor of 1 dimensions"):
        spread_beside(parameter, told, torch.Size((4,)), torch.float32)


def test_a_tensor_is_described_by_a_word_for_each_dimension_of_its_mesh(run_ranks):
    run_ranks(4, words)


def test_memory_is_spread_as_the_words_say(run_ranks):
    run_ranks(4, as_said)


def test_on_another_mesh_memory_is_cut_where_its_parameter_is(run_ranks):
    run_ranks(4, of_another_mesh)


@pytest.mark.parametrize("word", ["shard 1", "shard", "shard 0 of", "shard -1", "P(sum)", "", 3, None, "shard 0 of x"])
def test_other_words_are_refused(run_ranks, word):
    run_ranks(1, refused, ["replicate", word])

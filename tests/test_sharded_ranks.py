"""Sharded checkpoints on real ranks: whatever number of ranks saved it, any other number restores it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_processes import RankProcesses
from sharded_programs import (
    ddp,
    differing,
    fsdp,
    fsdp_and_tensor_parallel,
    fused,
    hsdp,
    plain,
    restored,
    saved,
    strided,
    wide,
    wide_fsdp,
)
from torch import nn

# Of each model, the ways in which so many ranks have it.
PROGRAMS: dict[str, dict[int, tuple[Callable[[], nn.Module], ...]]] = {
    "net": {1: (plain,), 2: (ddp, fsdp), 3: (fsdp,), 4: (hsdp,), 8: (fsdp,)},
    "wide": {1: (wide,), 3: (wide_fsdp,), 4: (fsdp_and_tensor_parallel,), 8: (fsdp_and_tensor_parallel,)},
    "fused": {1: (fused,), 2: (strided,), 3: (strided,), 4: (strided,)},
}
COUNTS = (1, 2, 3, 4, 8)
# Eight ranks take long on two cores: one checkpoint of each number of ranks.
ON_EIGHT = ("net-plain-1", "net-ddp-2", "wide-wide_fsdp-3", "wide-fsdp_and_tensor_parallel-4", "net-fsdp-8")


def runs_of(model: str, world_size: int) -> Iterator[tuple[Callable[[], nn.Module], str]]:
    """The programs of so many ranks, and what the run of each is called."""
    for make in PROGRAMS[model].get(world_size, ()):
        yield make, f"{model}-{make.__name__}-{world_size}"


def pairs(model: str, world_size: int) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Each run of ``model``, and the program of so many ranks that restores it: these take turns."""
    makes = PROGRAMS[model].get(world_size, ())
    sources = [name for count in COUNTS for _, name in runs_of(model, count)]
    for nth, name in enumerate(sources if makes else ()):
        if world_size < 8 or name in ON_EIGHT:
            yield name, makes[nth % len(makes)]


def save_all(rank: int, root: str, world_size: int) -> dict[str, dict[str, np.ndarray]]:
    return {name: saved(f"{root}/{name}", make) for model in PROGRAMS for make, name in runs_of(model, world_size)}


def restore_all(rank: int, root: str, world_size: int, expected: Any) -> tuple[set[str], dict[str, list[str]]]:
    """The number of ranks of each checkpoint; and what did not come back as it was."""
    counts, wrong = set(), {}
    for model in PROGRAMS:
        for name, make in pairs(model, world_size):
            counts.add(name.rpartition("-")[2])
            if keys := differing(expected[name], restored(f"{root}/{name}", make)):
                wrong[f"{name} in {make.__name__}"] = keys
    return counts, wrong


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of all runs, and what each saved."""
    root = tmp_path_factory.mktemp("runs")
    expected: dict[str, Any] = {}
    for count in COUNTS:
        expected |= RankProcesses()(count, save_all, str(root), count)[0]
    return root, expected


@pytest.mark.parametrize("world_size", COUNTS)
def test_what_any_number_of_ranks_saved_is_restored_on_others(run_ranks, checkpoints, world_size):
    root, expected = checkpoints
    every = {str(count) for count in COUNTS}
    assert run_ranks(world_size, restore_all, str(root), world_size, expected) == [(every, {})] * world_size

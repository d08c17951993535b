"""Ranks that find the environment of a launcher, and no Accelerator."""

from __future__ import annotations

import os

from accelerate.state import AcceleratorState, GradientState, PartialState


def launch(rank: int, world_size: int) -> None:
    """The environment of a forked rank is that of ``torchrun`` or ``accelerate launch``, on CPUs."""
    # Both launchers set one thread, unless they are told otherwise. Where it is not set, an Accelerator gives each rank
    # a thread for each core, and those of several ranks take turns in waiting for one another.
    words = {
        "OMP_NUM_THREADS": 1,
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 1,
    }
    os.environ.update({name: str(value) for name, value in words.items()}, ACCELERATE_USE_CPU="true")
    forget()


def forget() -> None:
    """There is no Accelerator yet."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()

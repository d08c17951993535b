"""An export of a small checkpoint, told when it is done, or why it failed."""

from __future__ import annotations

from pathlib import Path

import shim
import torch

import distckpt
from distckpt.exporting import export

TARGET = "out"


class _Weights:
    def __init__(self, fill: float) -> None:
        self._fill = fill

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weight": torch.full((30, 70), self._fill), "steps": torch.tensor(7), "bias": torch.zeros(70)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        raise AssertionError("nobody resumes")


def save(run: Path, fill: float) -> Path:
    """A run with one checkpoint, of weights that are all ``fill``."""
    with distckpt.Checkpointer(run, {"model": _Weights(fill)}, save_last=False) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)
    return run


def run(root: Path, *, source: str, to: str, max_shard_bytes: int | None) -> None:
    """The checkpoint in the run ``source`` is exported; what is there already is replaced."""
    try:
        export(source, root / TARGET, to=to, max_shard_bytes=max_shard_bytes, overwrite=True)
    except OSError as error:
        shim.say(f"failed {error}")
    else:
        shim.say("exported")

"""Distributed-aware checkpoints for PyTorch training.

Names are imported on first use, so that ``import distckpt`` costs nothing and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distckpt.checkpointer import Checkpointer
    from distckpt.dcp_reader import CheckpointReader
    from distckpt.errors import (
        DamagedCheckpoint,
        DirectoryInUse,
        DistckptError,
        NewerVersion,
        NoCheckpoint,
        RankFailure,
        RestoreError,
        SaveFailed,
        StateMismatch,
        Superseded,
    )
    from distckpt.exporting import export
    from distckpt.hook import CheckpointHook

__version__ = "0.1.0"

__all__ = [
    "CheckpointHook",
    "CheckpointReader",
    "Checkpointer",
    "DamagedCheckpoint",
    "DirectoryInUse",
    "DistckptError",
    "NewerVersion",
    "NoCheckpoint",
    "RankFailure",
    "RestoreError",
    "SaveFailed",
    "StateMismatch",
    "Superseded",
    "export",
]

_HOMES = {
    **dict.fromkeys(__all__, "distckpt.errors"),
    "Checkpointer": "distckpt.checkpointer",
    "CheckpointHook": "distckpt.hook",
    "CheckpointReader": "distckpt.dcp_reader",
    "export": "distckpt.exporting",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'distckpt' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

"""Two ways to keep checkpoints in a framework, side by side: what they cost training, and whether it goes on exactly.

Each trains alike, saves every few steps, and is started again in the middle of an epoch, in a process of its own. Both
end with weights that are compared with those of a run that was never stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

STEPS, EVERY, STOPPED_AT = 24, 4, 16
BATCH, STEPS_IN_EPOCH = 8, 10
WIDTH = 2048  # 8 layers of it and their moments: 0.4 GB


def make_model() -> nn.Module:
    """One with dropout, so that random numbers matter; takes (batch, WIDTH), gives (batch, 1)."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.1))]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


def make_data() -> TensorDataset:
    """An epoch of `STEPS_IN_EPOCH` batches."""
    return TensorDataset(torch.randn(BATCH * STEPS_IN_EPOCH, WIDTH, generator=torch.Generator().manual_seed(1)))


class StepTimes:
    """How long each step took, with its save if it had one."""

    def __init__(self) -> None:
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._began = time.perf_counter()

    def step(self, step: int) -> None:
        """``step`` has ended, and its save."""
        self._seconds[step % EVERY == 0].append(time.perf_counter() - self._began)
        self._began = time.perf_counter()

    def result(self, model: nn.Module) -> dict[str, Any]:
        """What a process tells: its times, without those of its first step, and the weights of ``model``."""
        return {"seconds": self._seconds, "weights": [one.detach() for one in model.parameters()]}


# Trains with the way of that name in that folder, on from what is there, until so many steps are done.
Train = Callable[[str, Path, int], dict[str, Any]]


def compare(train: Train, names: Sequence[str], doc: str | None) -> None:
    """The program: a table with a row for each of ``names``, which ``train`` knows."""
    called = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    called.add_argument("--only", help=argparse.SUPPRESS)
    called.add_argument("--until", type=int, default=STEPS, help=argparse.SUPPRESS)
    called.add_argument("--dir", type=Path, help="where to save (the temporary folder)")
    asked = called.parse_args()
    if asked.only:
        asked.dir.mkdir(parents=True, exist_ok=True)
        torch.save(train(asked.only, asked.dir, asked.until), asked.dir.with_suffix(".pt"))
        return
    print("| | saves | files | GB | a step with a save takes longer by, s | goes on exactly |\n|" + " --- |" * 6)
    for name in names:
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=asked.dir) as folder:
            print(_row(name, Path(folder)), flush=True)


def _apart(name: str, folder: Path, until: int) -> dict[str, Any]:
    """What the same program tells in a process of its own."""
    told = folder.with_suffix(".pt")
    subprocess.run([sys.executable, sys.argv[0], "--only", name, "--dir", folder, "--until", str(until)], check=True)
    return dict(torch.load(told, weights_only=True))


def _row(name: str, folder: Path) -> str:
    whole = _apart(name, folder / "whole", STEPS)
    first = _apart(name, folder / "run", STOPPED_AT)
    second = _apart(name, folder / "run", STEPS)
    files = [path for path in (folder / "whole").rglob("*") if path.is_file() and not path.is_symlink()]
    gigabytes = sum(path.stat().st_size for path in files) / 1e9
    with_save, without = ([*first["seconds"][key], *second["seconds"][key]][1:] for key in (True, False))
    is_exact = all(map(torch.equal, whole["weights"], second["weights"]))
    waits = median(with_save) - median(without)
    told = [f"`{name}`", STEPS // EVERY, len(files), f"{gigabytes:.2f}", f"{waits:.3f}", "yes" if is_exact else "no"]
    return f"| {' | '.join(map(str, told))} |"


def mean_square(output: Tensor) -> Tensor:
    """The loss."""
    return output.square().mean()

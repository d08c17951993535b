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
_size = {"width": 2048}  # 8 layers of it and their moments: 0.4 GB


def make_model() -> nn.Module:
    """One with dropout, so that random numbers matter; takes (batch, width), gives (batch, 1)."""
    width = _size["width"]
    layers = [layer for _ in range(8) for layer in (nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.1))]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def make_data() -> TensorDataset:
    """An epoch of `STEPS_IN_EPOCH` batches."""
    numbers = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(BATCH * STEPS_IN_EPOCH, _size["width"], generator=numbers))


class StepTimes:
    """How long each step took with all that came after it, by its number."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self._began = 0.0

    def step(self, step: int) -> None:
        """``step`` has ended, and its save."""
        now = time.perf_counter()
        if self._began:  # a process begins slowly
            self.seconds[step] = now - self._began
        self._began = now


# Trains with the way of that name in that folder, on from what is there, until so many steps are done. Tells how long
# each took, and the model.
Train = Callable[[str, Path, int], tuple[dict[int, float], nn.Module]]


def compare(train: Train, names: Sequence[str], doc: str | None) -> None:
    """The program: a table with a row for each of ``names``, which ``train`` knows."""
    called = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    called.add_argument("--only", help=argparse.SUPPRESS)
    called.add_argument("--until", type=int, default=STEPS, help=argparse.SUPPRESS)
    called.add_argument("--dir", type=Path, help="where to save (the temporary folder)")
    called.add_argument("--width", type=int, default=_size["width"], help="of the layers; %(default)s: 0.4 GB a save")
    asked = called.parse_args()
    _size["width"] = asked.width
    if asked.only:
        asked.dir.mkdir(parents=True, exist_ok=True)
        seconds, model = train(asked.only, asked.dir, asked.until)
        weights = [one.detach() for one in model.parameters()]
        torch.save({"seconds": seconds, "weights": weights}, asked.dir.with_suffix(".pt"))
        return
    print("| | writes | GB written | a save takes training, s | goes on exactly |\n|" + " --- |" * 5)
    for name in names:
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=asked.dir) as folder:
            print(_row(name, Path(folder)), flush=True)


def _apart(name: str, folder: Path, until: int) -> dict[str, Any]:
    """What the same program tells in a process of its own."""
    told = folder.with_suffix(".pt")
    words = ["--only", name, "--dir", folder, "--until", str(until), "--width", str(_size["width"])]
    subprocess.run([sys.executable, sys.argv[0], *words], check=True, stderr=subprocess.DEVNULL)
    return dict(torch.load(told, weights_only=True))


def _longer_by(seconds: dict[int, float]) -> list[float]:
    """What each save costs: in its own step, and in the next, whose optimizer may wait."""
    usual = median(one for step, one in seconds.items() if step % EVERY > 1)
    saves = [step for step in seconds if step % EVERY == 0 and step + 1 in seconds]
    return [seconds[step] + seconds[step + 1] - 2 * usual for step in saves]


def _written(folder: Path) -> list[int]:
    """The bytes of each checkpoint in ``folder``, a file or a folder."""
    sizes = [
        sum(one.stat().st_size for one in ([place] if place.is_file() else place.rglob("*")) if one.is_file())
        for place in folder.iterdir()
        if not place.is_symlink()
    ]
    return [size for size in sizes if size > max(sizes) / 10]


def _row(name: str, folder: Path) -> str:
    whole = _apart(name, folder / "whole", STEPS)
    first = _apart(name, folder / "run", STOPPED_AT)
    second = _apart(name, folder / "run", STEPS)
    is_exact = all(map(torch.equal, whole["weights"], second["weights"]))
    waits = median(one for told in (whole, first, second) for one in _longer_by(told["seconds"]))
    written = _written(folder / "whole")
    told = [f"`{name}`", len(written), f"{sum(written) / 1e9:.2f}", f"{waits:.2f}", "yes" if is_exact else "no"]
    return f"| {' | '.join(map(str, told))} |"


def mean_square(output: Tensor) -> Tensor:
    """The loss."""
    return output.square().mean()

"""What a Lightning Trainer pays for checkpoints, and whether it goes on exactly: distckpt beside ``ModelCheckpoint``.

Each trains alike, saves every few steps and whenever a validation is the best so far, and keeps the last as well. Each
is started again in the middle of an epoch, in a process of its own. Both end with weights that are compared with those
of a run that was never stopped.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distckpt.integrations.lightning import CheckpointCallback

OURS, STOCK = "CheckpointCallback", "ModelCheckpoint"
STEPS, EVERY, VALIDATED, STOPPED_AT = 24, 4, 8, 16
WIDTH = 2048  # 8 layers of it and their moments: 0.4 GB


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(8) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.1))]
        self.net = nn.Sequential(*layers, nn.Linear(WIDTH, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Watch(Callback):
    """How long each batch takes with all that comes after it, by its number."""

    def __init__(self) -> None:
        self.began = 0.0
        self.seconds: dict[int, float] = {}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.began:
            self.seconds[trainer.global_step] = time.perf_counter() - self.began
        self.began = time.perf_counter()


def longer_by(seconds: dict[int, float]) -> list[float]:
    """What each save costs, where no validation is: in its own step, and in the next, whose optimizer may wait."""
    usual = median(one for step, one in seconds.items() if step % EVERY > 1)
    saves = [step for step in seconds if step % EVERY == 0 and step % VALIDATED and step + 1 in seconds]
    return [seconds[step] + seconds[step + 1] - 2 * usual for step in saves]


def data(count: int, seed: int) -> TensorDataset:
    return TensorDataset(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)))


def callbacks(name: str, folder: Path, written: list[int]) -> list[Callback]:
    """Those that save; ``written`` has the bytes of each checkpoint that they write, however long it is kept."""
    if name == OURS:
        words = {"interval": EVERY, "max_keep_ckpts": 1, "save_best": "val_loss"}
        return [CheckpointCallback(folder, **words, on_event=lambda told: written.append(told.get("total_bytes", 0)))]
    save = Trainer.save_checkpoint

    def counted(self: Trainer, path: Any, *more: Any, **words: Any) -> None:
        save(self, path, *more, **words)
        written.append(Path(path).stat().st_size)

    Trainer.save_checkpoint = counted  # type: ignore[method-assign]
    # One for the newest, and one for the best, as one alone cannot keep both.
    newest = ModelCheckpoint(folder, every_n_train_steps=EVERY, save_last=True)
    return [newest, ModelCheckpoint(folder, "best", monitor="val_loss", save_on_train_epoch_end=False)]


def train(name: str, folder: Path, until: int) -> dict[str, Any]:
    """Goes on from what is in ``folder``. The steps with and without a save, and the weights in the end."""
    seed_everything(0, verbose=False)
    for loud in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(loud).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    watch, written = Watch(), list[int]()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=until,
        val_check_interval=VALIDATED,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[watch, *callbacks(name, folder, written)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Model()
    loader = DataLoader(data(80, 1), batch_size=8, shuffle=True)
    path = None if name == OURS or not (folder / "last.ckpt").exists() else folder / "last.ckpt"
    trainer.fit(model, loader, DataLoader(data(16, 2), batch_size=8), ckpt_path=path)
    weights = [one.detach() for one in model.parameters()]
    return {"seconds": watch.seconds, "weights": weights, "written": written}


def apart(name: str, folder: Path, until: int) -> dict[str, Any]:
    """The same in a process of its own."""
    told = folder.with_suffix(".pt")
    words = ["--only", name, "--dir", folder, "--until", str(until)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, __file__, *words], check=True, env=environment, stderr=subprocess.DEVNULL)
    return dict(torch.load(told, weights_only=True))


def row(name: str, folder: Path) -> str:
    whole = apart(name, folder / "whole", STEPS)
    first = apart(name, folder / "run", STOPPED_AT)
    second = apart(name, folder / "run", STEPS)
    is_exact = all(map(torch.equal, whole["weights"], second["weights"]))
    waits = median(one for told in (whole, first, second) for one in longer_by(told["seconds"]))
    written = [one for one in whole["written"] if one]
    told = [f"`{name}`", len(written), f"{sum(written) / 1e9:.2f}", f"{waits:.3f}", "yes" if is_exact else "no"]
    return f"| {' | '.join(map(str, told))} |"


def main() -> None:
    called = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    called.add_argument("--only", help=argparse.SUPPRESS)
    called.add_argument("--until", type=int, default=STEPS, help=argparse.SUPPRESS)
    called.add_argument("--dir", type=Path, help="where to save (the temporary folder)")
    asked = called.parse_args()
    if asked.only:
        asked.dir.mkdir(parents=True, exist_ok=True)
        torch.save(train(asked.only, asked.dir, asked.until), asked.dir.with_suffix(".pt"))
        return
    print("| | writes | GB written | a save takes training, s | goes on exactly |\n|" + " --- |" * 5)
    for name in (OURS, STOCK):
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=asked.dir) as folder:
            print(row(name, Path(folder)), flush=True)


if __name__ == "__main__":
    main()

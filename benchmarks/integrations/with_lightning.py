"""What a Lightning ``Trainer`` pays for checkpoints, how exactly it goes on: distckpt beside ``ModelCheckpoint``."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from side_by_side import BATCH, EVERY, StepTimes, compare, make_data, make_model, mean_square
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distckpt.integrations.lightning import CheckpointCallback

OURS, STOCK = "CheckpointCallback", "ModelCheckpoint"


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return mean_square(self.net(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Timed(Callback):
    """What lies between the beginnings of two steps is what the first took, with its save."""

    def __init__(self) -> None:
        self.times = StepTimes()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.times.step(trainer.global_step)


def train(name: str, folder: Path, until: int) -> tuple[dict[int, float], nn.Module]:
    seed_everything(0, verbose=False)
    for loud in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(loud).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    timed, last = Timed(), folder / "last.ckpt"
    ours = CheckpointCallback(folder, interval=EVERY, save_last=False)
    stock = ModelCheckpoint(folder, every_n_train_steps=EVERY, save_top_k=-1, save_last="link")
    trainer = Trainer(
        accelerator="cpu",
        max_steps=until,
        callbacks=[timed, ours if name == OURS else stock],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Model()
    loader = DataLoader(make_data(), batch_size=BATCH, shuffle=True)
    trainer.fit(model, loader, ckpt_path=last if name == STOCK and last.exists() else None)
    return timed.times.seconds, model


if __name__ == "__main__":
    compare(train, (OURS, STOCK), __doc__)

"""A Lightning Trainer that may be killed at any moment: the same command goes on where it was.

python scripts/examples/lightning_trainer.py
torchrun --nproc-per-node 2 scripts/examples/lightning_trainer.py
"""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distckpt.integrations.lightning import CheckpointCallback

STEPS = 60


def dataset(seed: int) -> TensorDataset:
    """Points, and whether each lies inside of a circle."""
    points = torch.rand(1000, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return TensorDataset(points, (points.square().sum(1) < 0.6).float())


class Circle(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        points, inside = batch
        return nn.functional.binary_cross_entropy_with_logits(self.net(points).squeeze(1), inside)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)]


def main() -> None:
    called = argparse.ArgumentParser()
    called.add_argument("--out", default="runs/lightning")
    out = called.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    seed_everything(0)

    checkpoints = CheckpointCallback(out, interval=10, max_keep_ckpts=2, save_best="val_loss")
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        max_steps=STEPS,
        val_check_interval=20,
        callbacks=[checkpoints],
        logger=False,
        enable_progress_bar=False,
    )
    model = Circle()
    loader = DataLoader(dataset(0), batch_size=16, shuffle=True)
    trainer.fit(model, loader, DataLoader(dataset(1), batch_size=16))
    if trainer.is_global_zero:
        print(
            f"step {trainer.global_step}, and weights that sum up to {sum(one.sum() for one in model.parameters()):.6f}"
        )


if __name__ == "__main__":
    main()

"""Trains a small network on handwritten digits, in a job that may be killed at any moment and started again.

    torchrun --standalone --nproc-per-node 2 scripts/demo_train.py OUT

Nothing here knows about kills: started again with the same command, it goes on where the newest checkpoint is.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

import distckpt


class Batches:
    """Endless batches of this rank's share, in a new order every epoch; its ``state_dict`` says where it is."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.sampler = DistributedSampler(range(len(images)), seed=1, drop_last=True)
        self.epoch = self.position = 0

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        self.sampler.set_epoch(self.epoch)
        chosen = list(self.sampler)[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        if self.position + self.batch_size > len(self.sampler):
            self.epoch, self.position = self.epoch + 1, 0
        return self.images[chosen], self.labels[chosen]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def block(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU())


def network() -> nn.Module:
    """Has buffers (BatchNorm), and draws random numbers on each rank (Dropout)."""
    head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 4 * 4, 10))
    return nn.Sequential(block(1, 32), block(32, 64), nn.MaxPool2d(2), head)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 1,797 handwritten digits that come with scikit-learn: images and labels to train on, and to validate."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    held_out = torch.arange(len(x)) % 5 == 0
    return x[~held_out], y[~held_out], x[held_out], y[held_out]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Over all ranks, each of which looks at its share."""
    share = slice(dist.get_rank(), None, dist.get_world_size())
    model.eval()
    with torch.no_grad():
        right = (model(images[share]).argmax(1) == labels[share]).sum()
    model.train()
    dist.all_reduce(right)
    return right.item() / len(labels)


def main(out: Path, steps: int) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(dist.get_rank())
    train_images, train_labels, val_images, val_labels = digits()

    model = DistributedDataParallel(network())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    batches = Batches(train_images, train_labels, batch_size=32)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "batches": batches}

    ckpt = distckpt.Checkpointer(
        out / "checkpoints", state, interval=25, max_keep_ckpts=2, keep_every=100, save_best="val/acc"
    )
    with ckpt, (out / f"losses-rank{dist.get_rank()}.csv").open("a", buffering=1) as losses:
        for step in ckpt.steps(steps):
            images, labels = next(batches)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.write(f"{step},{loss.item().hex()}\n")
            if step % 50 == 0:
                ckpt.report({"val/acc": accuracy(model, val_images, val_labels)})
    dist.destroy_process_group()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder of the run")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    main(arguments.out, arguments.steps)

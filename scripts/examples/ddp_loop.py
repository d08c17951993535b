"""A plain loop under torchrun with DDP that may be killed at any moment: the same command goes on where it was.

torchrun --nproc-per-node 2 scripts/examples/ddp_loop.py
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import distckpt

STEPS = 60


def dataset() -> TensorDataset:
    """Points, and whether each lies inside of a circle."""
    points = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return TensorDataset(points, (points.square().sum(1) < 0.6).float())


def batches(loader: DataLoader[list[Tensor]], sampler: DistributedSampler[object], step: int) -> Iterator[list[Tensor]]:
    """Epoch after epoch. A loader that was restored begins behind the batches that were seen."""
    epoch = step // len(loader)
    while True:
        sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def main() -> None:
    called = argparse.ArgumentParser()
    called.add_argument("--out", default="runs/ddp")
    out = called.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dist.init_process_group("gloo")
    torch.manual_seed(0)

    model = DistributedDataParallel(nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    sampler: DistributedSampler[object] = DistributedSampler(dataset())
    loader = DataLoader(dataset(), batch_size=16, sampler=sampler)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}

    with distckpt.Checkpointer(out, state, interval=10, max_keep_ckpts=2) as ckpt:
        data = batches(loader, sampler, ckpt.resume())
        for _ in ckpt.steps(STEPS):
            points, inside = next(data)
            loss = nn.functional.binary_cross_entropy_with_logits(model(points).squeeze(1), inside)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    if dist.get_rank() == 0:
        print(f"done, with weights that sum up to {sum(one.sum() for one in model.parameters()):.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

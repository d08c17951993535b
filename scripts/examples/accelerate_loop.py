"""A loop around Hugging Face Accelerate that may be killed at any moment: the same command goes on where it was.

python scripts/examples/accelerate_loop.py
accelerate launch --multi_gpu --num_processes 2 scripts/examples/accelerate_loop.py   # no GPU is used
"""

from __future__ import annotations

import argparse
import logging

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distckpt

STEPS, ACCUMULATED = 60, 2


def dataset() -> TensorDataset:
    """Points, and whether each lies inside of a circle."""
    points = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return TensorDataset(points, (points.square().sum(1) < 0.6).float())


def main() -> None:
    called = argparse.ArgumentParser()
    called.add_argument("--out", default="runs/accelerate")
    out = called.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    set_seed(0)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS * accelerator.num_processes)
    loader = DataLoader(dataset(), batch_size=16, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    with distckpt.Checkpointer(out, accelerator, interval=10, max_keep_ckpts=2) as ckpt:
        step = ckpt.resume()
        while step < STEPS and not ckpt.should_stop:
            for points, inside in loader:
                with accelerator.accumulate(model):
                    loss = nn.functional.binary_cross_entropy_with_logits(model(points).squeeze(1), inside)
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                step += accelerator.sync_gradients
                ckpt.step()  # where gradients are only accumulated it does nothing
                if step == STEPS or ckpt.should_stop:
                    break
    accelerator.print(f"step {step}, and weights that sum up to {sum(one.sum() for one in model.parameters()):.6f}")


if __name__ == "__main__":
    main()

"""What a loop around Accelerate pays for checkpoints, and how exactly it goes on: distckpt beside ``save_state``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from side_by_side import BATCH, EVERY, StepTimes, compare, make_data, make_model, mean_square
from torch import nn
from torch.utils.data import DataLoader

import distckpt

OURS, STOCK = "Checkpointer(out, accelerator)", "accelerator.save_state"


def prepared() -> tuple[Accelerator, nn.Module, Any, Any]:
    set_seed(0)
    accelerator = Accelerator(cpu=True)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = DataLoader(make_data(), batch_size=BATCH, shuffle=True)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


def train(name: str, folder: Path, until: int) -> tuple[dict[int, float], nn.Module]:
    accelerator, model, optimizer, loader = prepared()
    ckpt = distckpt.Checkpointer(folder, accelerator, interval=EVERY, save_last=False) if name == OURS else None
    step, saved, batches = 0, sorted(folder.glob("step_*")), loader
    if ckpt is not None:
        step = ckpt.resume()
    elif saved:  # as its documentation has it
        accelerator.load_state(str(saved[-1]))
        step = int(saved[-1].name[5:])
        loader.set_epoch(step // len(loader))
        batches = accelerator.skip_first_batches(loader, step % len(loader))
    times = StepTimes()
    while step < until:
        for (batch,) in batches:
            accelerator.backward(mean_square(model(batch)))
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if ckpt is not None:
                ckpt.step()
            elif step % EVERY == 0:
                accelerator.save_state(str(folder / f"step_{step:04d}"))
            times.step(step)
            if step == until:
                break
        batches = loader
    if ckpt is not None:
        ckpt.close()
    return times.seconds, model


if __name__ == "__main__":
    compare(train, (OURS, STOCK), __doc__)

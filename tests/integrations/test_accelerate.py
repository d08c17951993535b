"""A program around an Accelerator is saved whole, and goes on bit for bit as if nothing had happened."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import distckpt

pytestmark = pytest.mark.timeout(120)

SIZE, BATCH, TOTAL = 46, 4, 14


class Noisy(Dataset):
    """Numbers, to each of which some noise is added whenever it is read."""

    def __init__(self) -> None:
        self.numbers = torch.randn(SIZE, 5, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, at: int) -> Tensor:
        return self.numbers[at] + 0.01 * torch.randn(5)


class Average:
    """Something of the user's own, registered with the Accelerator."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights = [one.detach().clone() for one in model.parameters()]

    def update(self) -> None:
        for mean, one in zip(self.weights, self.model.parameters(), strict=True):
            mean.lerp_(one.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = list(state["weights"])


def launch(rank: int, world_size: int) -> None:
    """The environment is that of ``accelerate launch``, and there is no Accelerator yet."""
    words = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in words.items()}, ACCELERATE_USE_CPU="true")
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def train(
    rank: int, world_size: int, root: str, words: dict[str, Any], data: dict[str, Any], killed_at: int | None, seed: int
) -> dict[str, Any]:
    """Trains until step TOTAL, or until it is killed. What it has in the end."""
    launch(rank, world_size)
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**data), **words)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    loader = DataLoader(Noisy(), batch_size=BATCH, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    average = Average(model)
    accelerator.register_for_checkpointing(average)
    torch.manual_seed(seed + rank)
    losses = []
    with distckpt.Checkpointer(root, accelerator, interval=5, save_last=False) as ckpt:
        step = ckpt.resume()
        while step < TOTAL:
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = model(batch).square().mean()
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    average.update()
                    losses.append(loss.item())
                    step += 1
                ckpt.step()
                if step == killed_at and accelerator.sync_gradients:
                    ckpt.wait()
                    accelerator.wait_for_everyone()
                    os.kill(os.getpid(), signal.SIGKILL)
                if step == TOTAL:
                    break
    return {
        "weights": [one.detach().numpy() for one in (*model.parameters(), *model.buffers(), *average.weights)],
        "rate": scheduler.get_last_lr(),
        "random": torch.rand(3).numpy(),
        "losses": losses,
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for left, right in zip(one["weights"], other["weights"], strict=True):
        np.testing.assert_array_equal(left, right)
    assert one["rate"] == other["rate"]
    np.testing.assert_array_equal(one["random"], other["random"])
    assert one["losses"][-len(other["losses"]) :] == other["losses"]


PROGRAMS = {
    "plain": ({}, {}),
    "gradients are accumulated": ({"gradient_accumulation_steps": 2}, {}),
    "bfloat16": ({"mixed_precision": "bf16"}, {}),
    "a sampler without a seed": ({}, {"use_seedable_sampler": False}),
    "batches are split": ({}, {"split_batches": True}),
    "one rank reads for all": ({}, {"dispatch_batches": True}),
    "stateful loaders": ({}, {"use_stateful_dataloader": True}),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_run_ends_as_one_that_was_not(run_ranks, tmp_path, program, world_size):
    words, data = PROGRAMS[program]
    whole = run_ranks(world_size, train, world_size, str(tmp_path / "whole"), words, data, None, 3)
    everybody = range(world_size)
    run_ranks(world_size, train, world_size, str(tmp_path / "run"), words, data, 11, 3, lost=everybody)
    resumed = run_ranks(world_size, train, world_size, str(tmp_path / "run"), words, data, None, 77)
    for one, other in zip(whole, resumed, strict=True):
        assert len(other["losses"]) == TOTAL - 10
        assert_same(one, other)

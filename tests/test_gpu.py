"""What needs an accelerator: copies from the device, its random numbers, and a run over its own backend."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, rng
from distckpt.snapshot import Stager

pytestmark = pytest.mark.gpu


def test_a_copy_lies_in_pinned_memory_and_training_does_not_reach_it():
    weight = torch.ones(1000, 1000, device="cuda")
    copied = Stager().copy({"weight": weight})["weight"]
    weight.add_(1)
    assert copied.is_pinned() and copied.device.type == "cpu" and bool((copied == 1).all())


def test_the_device_draws_on_after_a_restore_as_it_did_before():
    state = rng.capture()
    drawn = torch.randn(5, device="cuda")
    rng.apply(state)
    assert torch.equal(torch.randn(5, device="cuda"), drawn)


def test_a_resumed_run_on_the_device_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path):
    def train(out_dir, until):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 1)).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in Checkpointer(out_dir, {"model": model, "optimizer": optimizer}, interval=3).steps(until):
            optimizer.zero_grad()
            model(torch.randn(8, 16, device="cuda")).square().mean().backward()
            optimizer.step()
        return torch.cat([one.flatten().float() for one in model.state_dict().values()])

    reference = train(tmp_path / "reference", 10)
    train(tmp_path / "run", 6)
    assert torch.equal(train(tmp_path / "run", 10), reference)

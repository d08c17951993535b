"""What needs an accelerator: copies from the device, its random numbers, and a run over its own backend."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distckpt import Checkpointer, rng
from distckpt.engine.arena import Arena

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_what_is_saved_is_what_was_there_before_the_next_step(tmp_path, mode):
    model = nn.Linear(2000, 2000, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with Checkpointer(tmp_path, {"model": model, "optimizer": optimizer}, snapshot=mode, save_last=False) as ckpt:
        for _ in range(3):
            model(torch.randn(8, 2000, device="cuda")).sum().backward()
            optimizer.step()
            ckpt.step()
            before = model.weight.detach().cpu()
            ckpt.save()
        optimizer.step()
        ckpt.wait()
        assert torch.equal(load_file(tmp_path / "latest" / "model.safetensors")["weight"], before)


def test_the_arena_is_page_locked():
    arena = Arena(1 << 26, is_pinned=True)
    arena.wait_touched()
    assert arena.memory.is_pinned()
    arena.close()


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

"""The checkpointer on real gloo ranks: they agree, fail together, and resume alike."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, RankFailure, SaveFailed

SOON = timedelta(seconds=10)


def build(rank: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    ddp = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(rank)
    return ddp, torch.optim.AdamW(ddp.parameters(), lr=0.01)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss)


def train(rank: int, out_dir: Path, total: int, until: int | None = None, **words: Any) -> list[float]:
    model, optimizer = build(rank)
    ckpt = Checkpointer(out_dir, {"model": model, "optimizer": optimizer}, interval=2, timeout=SOON, **words)
    losses = []
    for step in ckpt.steps(total):
        losses.append(train_step(model, optimizer))
        if step == until:
            ckpt.wait()
            os.kill(os.getpid(), signal.SIGKILL)
    losses += [float(buffer.double().sum()) for buffer in model.buffers()]
    return losses


def test_a_killed_run_ends_bit_for_bit_as_if_it_had_not_been(run_ranks, tmp_path):
    reference = run_ranks(2, train, tmp_path / "reference", 7)
    run_ranks(2, train, tmp_path / "killed", 7, 5, lost=(0, 1))
    resumed = run_ranks(2, train, tmp_path / "killed", 7)
    assert [losses[-6:] for losses in resumed] == [losses[-6:] for losses in reference]
    assert reference[0][-3:] == reference[1][-3:], "buffers are equal on all ranks after the last save"


class Stubborn:
    """A part whose state cannot be read on one rank, the first time."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def state_dict(self) -> dict[str, int]:
        if self.fails:
            self.fails = False
            raise RuntimeError("no state today")
        return {"answer": 42}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state == {"answer": 42}


def fail_once(rank: int, out_dir: Path, async_save: bool) -> list[Any]:
    model, optimizer = build(rank)
    state = {"model": model, "optimizer": optimizer, "stubborn": Stubborn(rank == 1)}
    raised = []
    with Checkpointer(out_dir, state, interval=2, async_save=async_save, timeout=SOON) as ckpt:
        ckpt.resume()
        for step in range(1, 7):
            train_step(model, optimizer)
            try:
                ckpt.step()
            except SaveFailed as error:
                raised.append([step, str(error)])
        ckpt.wait()
        latest = ckpt.latest
    return [raised, latest.progress.step if latest else None]


@pytest.mark.parametrize("async_save", [False, True])
def test_an_error_on_one_rank_is_raised_on_all_at_one_step_and_training_goes_on(run_ranks, tmp_path, async_save):
    first, second = run_ranks(2, fail_once, tmp_path / "run", async_save)
    assert first == second
    ((step, words),) = first[0]
    assert "rank 1" in words and "no state today" in words
    assert (step == 2 or async_save) and first[1] == 6


def lose_a_rank(rank: int, out_dir: Path, how: int) -> str:
    model, optimizer = build(rank)
    ckpt = Checkpointer(out_dir, {"model": model, "optimizer": optimizer}, interval=2, timeout=timedelta(seconds=2))
    ckpt.resume()
    train_step(model, optimizer)
    ckpt.step()
    if rank == 1:
        os.kill(os.getpid(), how)
    try:
        ckpt.save(wait=True)
    except RankFailure as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_died_or_hangs_is_named_within_the_deadline(run_ranks, tmp_path, how):
    told = run_ranks(3, lose_a_rank, tmp_path / "run", how, seconds=20, lost=(1,))
    for survivor in (told[0], told[2]):
        assert "rank 1" in survivor and "did not come within" in survivor
    assert not list((tmp_path / "run").glob("*.committed"))

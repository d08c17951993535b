"""The checkpointer on real gloo ranks: they agree, fail together, and resume alike."""

from __future__ import annotations

import logging
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distckpt import Checkpointer, DistckptError, RankFailure, SaveFailed
from distckpt.catalog import scan
from distckpt.stores.local import LocalStore

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


class Loader:
    """A part that each rank has of its own."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.captured_at: list[int] = []

    def __iter__(self) -> Any:
        return iter(())

    def state_dict(self) -> dict[str, int]:
        self.captured_at.append(self.at)
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def report_differently(rank: int, out_dir: Path) -> None:
    model, optimizer = build(rank)
    state = {"model": model, "optimizer": optimizer, "loader": Loader(rank)}
    losses = [[2.0, 9.0], [3.0, 1.0], [1.0, 5.0], [4.0, 0.0]]
    ckpt = Checkpointer(out_dir, state, save_best="loss", max_keep_best=9, timeout=SOON)
    for step in ckpt.steps(4):
        train_step(model, optimizer)
        ckpt.report({"loss": losses[step - 1][rank]})


def resume_on_more(rank: int, out_dir: Path) -> list[Any]:
    model, optimizer = build(rank)
    loader = Loader(100 + rank)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distckpt").addHandler(handler)
    logging.getLogger("distckpt").setLevel(logging.INFO)
    state = {"model": model, "optimizer": optimizer, "loader": loader}
    with Checkpointer(out_dir, state, save_last=False, timeout=SOON) as ckpt:
        step = ckpt.resume()
    weights = [float(one.double().sum()) for one in model.state_dict().values()]
    return [step, loader.at, len(optimizer.state), weights, [line for line in told if "resumed" in line]]


def test_rank_0s_metrics_decide_and_more_ranks_resume_with_what_was_shared(run_ranks, tmp_path):
    run_ranks(2, report_differently, tmp_path / "run")
    records = scan(LocalStore(tmp_path / "run")).records
    assert [(one.progress.step, one.reasons, dict(one.metrics)) for one in records] == [
        (1, ("best",), {"loss": 2.0}),
        (2, ("best",), {"loss": 3.0}),
        (3, ("best",), {"loss": 1.0}),
        (4, ("best",), {"loss": 4.0}),
    ]
    told = run_ranks(4, resume_on_more, tmp_path / "run")
    assert [one[:3] for one in told] == [[4, 100 + rank, 6] for rank in range(4)]
    assert all(one[3] == told[0][3] for one in told)
    assert told[0][4] == [
        "resumed step-00000004 (step 4, epoch 0)  exact: model, optimizer  not exact: loader, rng of 2 ranks"
    ]
    assert [one[4] for one in told[1:]] == [[]] * 3, "the leader says it for all"


def train_by_the_clock(rank: int, out_dir: Path) -> list[int]:
    model, optimizer = build(rank)
    loader = Loader(0)
    state = {"model": model, "loader": loader}
    with Checkpointer(out_dir, state, interval="0.05s", save_last=False, timeout=SOON) as ckpt:
        for _ in range(2000):
            loader.at += 1
            train_step(model, optimizer)
            ckpt.step()
            if len(loader.captured_at) == 3:
                break
    return loader.captured_at


def test_a_save_by_the_clock_is_made_at_the_same_step_on_all_ranks(run_ranks, tmp_path):
    first, second, third = run_ranks(3, train_by_the_clock, tmp_path / "run")
    assert len(first) == 3 and first == second == third
    assert [one.progress.step for one in scan(LocalStore(tmp_path / "run")).records] == first


def see_another_directory(rank: int, out_dir: Path) -> str:
    try:
        Checkpointer(out_dir / str(rank % 2), {"loader": Loader(0)}, timeout=timedelta(seconds=2))
    except DistckptError as error:
        dist.barrier()  # the store through which ranks agree ends with rank 0's process
        return str(error)
    return "nothing was raised"


def test_a_directory_that_a_rank_does_not_see_is_an_error_on_all(run_ranks, tmp_path):
    told = run_ranks(3, see_another_directory, tmp_path, seconds=20)
    assert len(set(told)) == 1
    assert "rank 1: " in told[0] and "is not the directory that rank 0 writes to" in told[0] and "rank 2" not in told[0]

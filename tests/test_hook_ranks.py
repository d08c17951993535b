"""The hook on real gloo ranks: rank 0 decides and writes, and all ranks know it."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DDP imports it, and without this each forked rank would for itself
import torch.distributed as dist
from runners import Hub
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer

from distckpt import CheckpointHook, RankFailure, SaveFailed
from distckpt.engine.snapshot import Staging


class Loop:
    """A training under DDP, each rank with data of its own."""

    logger = logging.getLogger("loop")
    param_schedulers = ()

    def __init__(self, work_dir: Path, *, epochs: int = 3, **words: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.message_hub = Hub()
        self.work_dir, self.hook = str(work_dir), CheckpointHook(timeout="10s", **words)
        self.epoch = self.iter = 0
        self.max_epochs = self.max_iters = epochs

    def train(self, metrics: Callable[[int], Any] | None = None) -> Loop:
        self.hook.before_train(self)
        while self.epoch < self.max_epochs:
            self.run_epoch(metrics)
        self.hook.after_train(self)
        return self

    def run_epoch(self, metrics: Callable[[int], Any] | None = None) -> None:
        generator = torch.Generator().manual_seed(10 * self.iter + dist.get_rank())
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 2, generator=generator)).square().sum().backward()
        self.optimizer.step()
        self.hook.after_train_iter(self, 0)
        self.iter += 1
        try:
            self.hook.after_train_epoch(self)
        finally:
            self.epoch += 1
        if metrics is not None:
            self.hook.after_val_epoch(self, metrics(self.epoch))


def raised(work: Callable[[], Any], *, goes_on: bool = True) -> tuple[str, str]:
    """The type and the words of what ``work`` raises; the process goes on after it, or ends."""
    try:
        work()
        told = ("", "")
    except Exception as error:
        told = type(error).__name__, str(error)
    if goes_on:
        dist.barrier()  # rank 0 has the store through which the others learn of the error
    return told


def told(loop: Loop) -> dict[str, Any]:
    return {key: value for key, value in loop.message_hub.runtime_info.items() if key != "distckpt_run"}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pth"))


def train_with_metrics_that_differ(rank: int, folder: Path) -> dict[str, Any]:
    curve = [0.1, 0.9, 0.5] if rank == 0 else [0.8, 0.2, 0.95]
    loop = Loop(folder, interval=1, save_best="acc", max_keep_ckpts=1)
    return told(loop.train(lambda epoch: {"acc": curve[epoch - 1]}))


def test_where_metrics_differ_those_of_rank_0_decide_for_all(run_ranks, tmp_path):
    first, second = run_ranks(2, train_with_metrics_that_differ, tmp_path)
    assert first == second
    assert (first["best_score"], first["best_ckpt"]) == (0.9, str(tmp_path / "best_acc_epoch_2.pth"))
    assert files(tmp_path) == ["best_acc_epoch_2.pth", "epoch_3.pth"]


def train_with_metrics_on_one_rank(rank: int, folder: Path, which: int) -> Any:
    loop = Loop(folder, epochs=2, interval=1, save_best="auto")
    loop.train(lambda epoch: {"acc": epoch / 10} if rank == which else {})
    return told(loop).get("best_score"), loop.hook.key_indicators


def test_metrics_that_only_rank_0_has_are_enough(run_ranks, tmp_path):
    assert run_ranks(2, train_with_metrics_on_one_rank, tmp_path, 0) == [(0.2, ["acc"])] * 2


def test_metrics_that_rank_0_does_not_have_are_none(run_ranks, tmp_path):
    assert run_ranks(2, train_with_metrics_on_one_rank, tmp_path, 1) == [(None, ["auto"])] * 2


def train_without_the_metric_on_rank_0(rank: int, folder: Path) -> tuple[str, str]:
    loop = Loop(folder, interval=1, save_best="acc")
    return raised(lambda: loop.train(lambda epoch: {"acc" if rank else "val/acc": 0.5}), goes_on=False)


def test_a_metric_that_rank_0_misses_is_the_same_error_on_all(run_ranks, tmp_path):
    first, second = run_ranks(2, train_without_the_metric_on_rank_0, tmp_path)
    assert first == second
    assert first[0] == "KeyError" and "did you mean val/acc?" in first[1]


def fail_to_write_once(rank: int, folder: Path, is_async: bool) -> Any:
    loop = Loop(folder, epochs=5, interval=1, max_keep_ckpts=1, async_save=is_async)
    write = Staging.write
    loop.hook.before_train(loop)
    loop.run_epoch()
    loop.hook._opened[1].run.settle()

    def fail(*_: Any) -> None:
        Staging.write = write  # type: ignore[method-assign]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank == 0:
        Staging.write = fail  # type: ignore[assignment,method-assign]
    failures = []
    while loop.epoch < loop.max_epochs:
        try:
            loop.run_epoch()
        except SaveFailed as error:
            failures.append((loop.epoch, str(error)))
    loop.hook.after_train(loop)
    return failures, told(loop)["last_ckpt"]


def test_an_error_of_rank_0_is_raised_on_all_and_training_may_go_on(run_ranks, tmp_path):
    first, second = run_ranks(2, fail_to_write_once, tmp_path, False)
    assert first == second
    ((epoch, words),) = first[0]
    assert epoch == 2 and "rank 0: OSError: [Errno 28] No space left" in words
    assert files(tmp_path) == ["epoch_5.pth"]


def test_in_the_background_all_raise_it_at_the_same_epoch(run_ranks, tmp_path):
    first, second = run_ranks(2, fail_to_write_once, tmp_path, True)
    assert first == second and len(first[0]) == 1
    assert files(tmp_path) == ["epoch_5.pth"]


def fail_to_read_state_on_rank_1(rank: int, folder: Path) -> tuple[str, str]:
    loop = Loop(folder, interval=1)
    loop.call_hook = lambda stage, checkpoint: checkpoint["nothing"] if rank == 1 else None
    return raised(loop.train)


def test_an_error_of_rank_1_is_raised_on_all_too(run_ranks, tmp_path):
    first, second = run_ranks(2, fail_to_read_state_on_rank_1, tmp_path)
    assert first == second
    assert first[0] == "SaveFailed" and "rank 1: KeyError: 'nothing'" in first[1]
    assert files(tmp_path) == []


def train_and_tell_of_buffers(rank: int, folder: Path, mode: Any) -> Any:
    loop = Loop(folder, epochs=1, interval=1, sync_buffers=mode)
    loop.hook.before_train(loop)
    buffers = loop.model.module[1]
    buffers.running_mean.fill_(float(rank))
    buffers.num_batches_tracked.fill_(7 + rank)
    loop.hook.after_train_epoch(loop)
    loop.epoch = 1
    loop.hook.after_train(loop)
    return buffers.running_mean.tolist(), buffers.num_batches_tracked.item()


def test_before_a_save_buffers_become_the_same_on_all_ranks(run_ranks, tmp_path):
    assert run_ranks(2, train_and_tell_of_buffers, tmp_path, "mean") == [([0.5] * 3, 7)] * 2
    saved = torch.load(tmp_path / "epoch_1.pth", weights_only=True)["state_dict"]
    assert (saved["1.running_mean"].tolist(), saved["1.num_batches_tracked"].item()) == ([0.5] * 3, 7)


def test_buffers_may_be_left_alone(run_ranks, tmp_path):
    assert run_ranks(2, train_and_tell_of_buffers, tmp_path, False) == [([0.0] * 3, 7), ([1.0] * 3, 8)]


def train_and_publish(rank: int, folder: Path, is_broken: bool) -> Any:
    loop = Loop(folder, epochs=1, published_keys="state_dict")
    if is_broken:
        loop.hook.before_train(loop)
        loop.run_epoch()
        if rank == 0:
            (folder / "epoch_1.pth").write_bytes(b"damaged")
    return raised(loop.train)


def test_one_file_is_published_and_all_wait_for_it(run_ranks, tmp_path):
    assert run_ranks(2, train_and_publish, tmp_path, False) == [("", "")] * 2
    assert [re.sub("-[0-9a-f]{8}", "-", name) for name in files(tmp_path)] == ["epoch_1-.pth", "epoch_1.pth"]


def test_what_cannot_be_published_is_an_error_on_all(run_ranks, tmp_path):
    first, second = run_ranks(2, train_and_publish, tmp_path, True)
    assert first == second
    assert first[0] == "DamagedCheckpoint" and "epoch_1.pth has 7 bytes" in first[1]


def train_with_a_collective_hook(rank: int, folder: Path) -> Any:
    loop = Loop(folder, epochs=1)

    def gather(stage: str, checkpoint: dict[str, Any]) -> None:
        seen = torch.tensor([rank + 1.0])
        dist.all_reduce(seen)
        checkpoint["seen"] = seen

    loop.call_hook = gather
    return raised(loop.train)


def test_a_hook_of_the_runner_may_talk_to_other_ranks(run_ranks, tmp_path):
    assert run_ranks(2, train_with_a_collective_hook, tmp_path) == [("", "")] * 2
    assert torch.load(tmp_path / "epoch_1.pth", weights_only=True)["seen"].item() == 3.0


def train_with_a_sharded_optimizer(rank: int, folder: Path) -> Any:
    loop = Loop(folder, epochs=2, interval=1)
    loop.optimizer = ZeroRedundancyOptimizer(
        loop.model.parameters(), optimizer_class=torch.optim.SGD, lr=0.01, momentum=0.9
    )
    return raised(loop.train)


def test_an_optimizer_whose_state_lies_on_all_ranks_is_gathered(run_ranks, tmp_path):
    assert run_ranks(2, train_with_a_sharded_optimizer, tmp_path) == [("", "")] * 2
    saved = torch.load(tmp_path / "epoch_2.pth", weights_only=True)
    assert sorted(saved["optimizer"]["state"]) == list(range(6))
    assert "0.weight" in saved["state_dict"], "without the prefix of DDP"


def train_with_a_cut_optimizer(rank: int, folder: Path) -> Any:
    told = []
    for has_optimizer in (True, False):
        loop = Loop(folder / str(has_optimizer), epochs=1, save_optimizer=has_optimizer, sync_buffers=False)
        loop.model = FullyShardedDataParallel(loop.model.module, device_id=torch.device("cpu"), use_orig_params=True)
        loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.01, momentum=0.9)
        told.append(raised(loop.train))
    return told


def test_an_optimizer_of_which_each_rank_has_a_piece_is_refused_and_weights_alone_are_not(run_ranks, tmp_path):
    for (kind, words), told in run_ranks(2, train_with_a_cut_optimizer, tmp_path):
        assert kind == "TypeError" and "no .pth holds that" in words and told == ("", "")
    assert not (tmp_path / "True" / "epoch_1.pth").exists()
    saved = torch.load(tmp_path / "False" / "epoch_1.pth", weights_only=True)
    assert saved["state_dict"]["0.weight"].shape == (3, 2) and "optimizer" not in saved


def cannot_open(rank: int, folder: Path) -> tuple[str, str]:
    return raised(lambda: Loop(folder / "file" / "exp").train(), goes_on=False)


def test_a_directory_that_cannot_be_made_is_an_error_on_all(run_ranks, tmp_path):
    (tmp_path / "file").write_text("in the way")
    first, second = run_ranks(2, cannot_open, tmp_path)
    assert first == second
    assert first[0] == RankFailure.__name__ and "not a directory" in first[1] and str(tmp_path / "file") in first[1]


def stop_on_request(rank: int, folder: Path) -> Any:
    loop = Loop(folder, epochs=1_000_000, by_epoch=False)
    loop.train_loop = type("TrainLoop", (), {"stop_training": False})()
    loop.hook.before_train(loop)
    while not loop.train_loop.stop_training:
        if rank == 0 and loop.epoch == 2:
            (folder / "STOP").touch()
        loop.run_epoch()
    loop.hook.after_train(loop)
    return loop.iter


def test_all_ranks_stop_at_the_same_iteration(run_ranks, tmp_path):
    first, second = run_ranks(2, stop_on_request, tmp_path)
    assert first == second
    assert files(tmp_path) == [f"iter_{first}.pth"]

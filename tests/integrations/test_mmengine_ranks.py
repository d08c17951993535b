"""The hook under MMEngine's own runners on two real ranks, which are killed, started again, and disagree."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

pytest.importorskip("mmengine")

import matplotlib.pyplot  # noqa: F401  a runner imports it: once here, and not in each forked rank
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import FlexibleRunner, Runner
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FullyShardedDataParallel

import distckpt
import distckpt.hook  # once here, too
from distckpt import DistckptError

CLONE_NEWNS = 0x20000
SAMPLES, BATCH = 24, 3  # 4 iterations of each of 2 ranks in an epoch


class Net(BaseModel):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Dropout(dropout), nn.Linear(9, 1))

    def forward(self, inputs: Tensor, data_samples: Tensor, mode: str = "tensor") -> Any:
        told = self.layers(inputs).squeeze(1)
        return {"loss": (told - data_samples).square().mean()} if mode == "loss" else [told]


class Points(Dataset[Any]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, nth: int) -> dict[str, Tensor]:
        points = torch.randn(4, generator=torch.Generator().manual_seed(nth))
        return {"inputs": points, "data_samples": points.sum()}


class Falling(BaseMetric):
    """Worse after each validation."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0

    def process(self, *_: Any, **__: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: Any) -> dict[str, float]:
        self._next += 1
        return {"acc": 1 / self._next}


class KilledAt(Hook):
    """Its process is, once so many iterations are done."""

    priority = "LOWEST"

    def __init__(self, iteration: int) -> None:
        self._iteration = iteration

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        if runner.iter + 1 == self._iteration:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


def build(
    rank: int,
    work_dir: str,
    *,
    wrapper: str,
    flexible: bool = False,
    dropout: float = 0.0,
    epochs: int = 3,
    iterations: int | None = None,
    saves_by_epoch: bool = True,
    hooks: tuple[Hook, ...] = (),
    resume: bool = False,
    timeout: timedelta = timedelta(seconds=20),
    **words: Any,
) -> Any:
    """A runner of one of the ranks; counted in iterations where there is a number of them."""
    os.environ["LOCAL_RANK"] = str(rank)
    by_epoch = iterations is None
    loader = dict(batch_size=BATCH, num_workers=0, dataset=Points(), collate_fn=dict(type="default_collate"))
    sampler = dict(type="DefaultSampler" if by_epoch else "InfiniteSampler", shuffle=True)
    limits = dict(max_epochs=epochs, val_interval=1) if by_epoch else dict(max_iters=iterations, val_interval=4)
    wrap = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    if wrapper == "fsdp":
        wrap = dict(type="MMFullyShardedDataParallel", device_id=torch.device("cpu"))
    kind, wrapping = Runner, dict(cfg=dict(model_wrapper_cfg=wrap))
    if flexible:
        kind, wrapping = FlexibleRunner, dict(strategy=dict(type=f"{wrapper.upper()}Strategy", model_wrapper=wrap))
    return kind(
        model=Net(dropout),
        work_dir=work_dir,
        train_dataloader=dict(loader, sampler=sampler),
        val_dataloader=dict(loader, sampler=dict(type="DefaultSampler", shuffle=False)),
        val_evaluator=[Falling()],
        val_cfg=dict(),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.01)),
        param_scheduler=[dict(type="StepLR", step_size=2, by_epoch=by_epoch)],
        train_cfg=dict(by_epoch=by_epoch, **limits),
        default_hooks=dict(
            checkpoint=dict(
                type="distckpt.CheckpointHook", by_epoch=by_epoch and saves_by_epoch, timeout=timeout, **words
            )
        ),
        custom_hooks=[*hooks],
        launcher="pytorch",
        resume=resume,
        randomness=dict(seed=7),
        log_level="ERROR",
        experiment_name=f"{Path(work_dir).name}-{time.monotonic_ns()}",
        **wrapping,
    )


def weights(model: nn.Module) -> list[float]:
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return [number for one in model.parameters() for number in one.flatten().tolist()]
    return [number for one in model.parameters() for number in one.flatten().tolist()]


def train(rank: int, work_dir: str, words: dict[str, Any], killed_at: int | None = None) -> list[float]:
    """The weights at the end."""
    hooks = words.get("hooks", ()) if killed_at is None else (KilledAt(killed_at),)
    runner = build(rank, work_dir, **{**words, "hooks": hooks})
    runner.train()
    return weights(runner.model)


WAYS: dict[str, dict[str, Any]] = {
    "Runner, DDP, a file": dict(wrapper="ddp", interval=1),
    "Runner, DDP, sharded": dict(wrapper="ddp", interval=1, format="sharded", dropout=0.2),
    "FlexibleRunner, FSDP, sharded": dict(
        wrapper="fsdp", flexible=True, interval=1, format="sharded", dropout=0.2, async_save=True
    ),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_training_ends_bit_for_bit_as_one_that_was_not(run_ranks, tmp_path, way):
    words = WAYS[way]
    reference = run_ranks(2, train, str(tmp_path / "reference"), words)
    run_ranks(2, train, str(tmp_path / "killed"), words, 10, lost=(0, 1))
    resumed = run_ranks(2, train, str(tmp_path / "killed"), {**words, "resume": True})
    assert resumed == reference
    assert reference[0] == reference[1]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("epochs", [3, None])
def test_sharded_checkpoints_are_made_and_resumed_in_the_middle_of_an_epoch(run_ranks, tmp_path, epochs):
    counted = dict(epochs=3) if epochs else dict(iterations=12)
    words = dict(wrapper="ddp", interval=3, saves_by_epoch=False, format="sharded", dropout=0.2, **counted)
    reference = run_ranks(2, train, str(tmp_path / "reference"), words)
    run_ranks(2, train, str(tmp_path / "killed"), words, 11, lost=(0, 1))
    resumed = run_ranks(2, train, str(tmp_path / "killed"), {**words, "resume": True})
    assert resumed == reference


def refused(rank: int, work_dir: str, words: dict[str, Any]) -> str:
    try:
        train(rank, work_dir, words)
    except (RuntimeError, ValueError, DistckptError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.timeout(120)
def test_a_new_sharded_training_takes_no_directory_of_another(run_ranks, tmp_path):
    words = dict(wrapper="ddp", interval=1, format="sharded", epochs=1)
    run_ranks(2, train, str(tmp_path), words)
    told = run_ranks(2, refused, str(tmp_path), words)
    assert all("resume=True" in one for one in told), told


@pytest.mark.timeout(120)
def test_what_was_best_stays_and_what_is_old_goes(run_ranks, tmp_path):
    words = dict(wrapper="ddp", interval=1, format="sharded", max_keep_ckpts=1, save_best="acc")
    run_ranks(2, train, str(tmp_path), words)
    held = sorted(path.stem for path in tmp_path.glob("*.committed"))
    assert held == ["step-00000004", "step-00000012"]
    assert (tmp_path / "best-acc").resolve().name == "step-00000004"
    model = Net(0.0)
    distckpt.export(tmp_path, tmp_path / "model.pth")
    model.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))


def own_file_system(folder: str) -> bool:
    """Whether this process sees something else than others at ``folder``, from now on: nothing."""
    if ctypes.CDLL(None).unshare(CLONE_NEWNS) != 0:
        return False
    mounted = [["--make-rprivate", "/"], ["-t", "tmpfs", "none", folder]]
    return all(subprocess.run(["mount", *words], check=False).returncode == 0 for words in mounted)


def unshared(rank: int, work_dir: str, *, resume: bool) -> str:
    logging.disable(logging.WARNING)
    if rank == 1 and not own_file_system(work_dir):
        return "not permitted"
    return refused(rank, work_dir, dict(wrapper="ddp", interval=1, resume=resume, timeout=timedelta(seconds=5)))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("resume", [False, True])
def test_a_work_dir_that_ranks_do_not_share_is_an_error_on_all(run_ranks, tmp_path, resume):
    """With MMEngine's own hook, one rank resumes, the other begins anew, and they train two models as if one."""
    if resume:
        run_ranks(2, train, str(tmp_path), dict(wrapper="ddp", interval=1, epochs=1))
    told = run_ranks(2, partial(unshared, resume=resume), str(tmp_path))
    if "not permitted" in told:
        pytest.skip("needs a file system of its own")
    assert all("a file system that they share" in one for one in told), told


def slowly(rank: int, work_dir: str) -> list[float]:
    _set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
    sync, left = os.fsync, [1]

    def slow(number: int) -> None:
        while left:
            time.sleep(5 * left.pop())
        sync(number)

    os.fsync = slow if rank == 0 else sync  # a process of its own
    return train(rank, work_dir, dict(wrapper="ddp", interval=1, epochs=2))


@pytest.mark.timeout(60)
def test_a_save_that_takes_longer_than_a_collective_may_harms_nobody(run_ranks, tmp_path):
    told = run_ranks(2, slowly, str(tmp_path))
    assert told[0] == told[1]
    assert len([*tmp_path.glob("epoch_*.pth")]) == 2


@pytest.mark.timeout(120)
def test_copies_that_rank_0_cannot_write_are_an_error_on_all_and_made_up_for(run_ranks, tmp_path):
    there = tmp_path / "there"
    there.write_bytes(b"")  # in the way of a folder
    words = dict(wrapper="ddp", interval=1, max_keep_ckpts=1, epochs=2, out_dir=f"local://{there}")
    told = run_ranks(2, refused, str(tmp_path / "here"), words)
    assert told[0] == told[1] and "rank 0: " in told[0] and "epoch_1.pth could not be written" in told[0], told
    there.unlink()
    run_ranks(2, train, str(tmp_path / "here"), {**words, "resume": True})
    assert sorted(path.name for path in (there / "here").iterdir()) == ["epoch_2.pth", "last_checkpoint"]


@pytest.mark.timeout(120)
def test_two_ranks_go_on_from_the_copies_bit_for_bit(run_ranks, tmp_path):
    words = dict(wrapper="ddp", interval=1, out_dir=f"local://{tmp_path}/there", async_save=True)
    reference = run_ranks(2, train, str(tmp_path / "reference"), words)
    run_ranks(2, train, str(tmp_path / "lost"), words, 10, lost=(0, 1))
    shutil.rmtree(tmp_path / "lost")
    assert run_ranks(2, train, str(tmp_path / "lost"), {**words, "resume": True}) == reference


def with_a_backend_of_its_own(rank: int, work_dir: str) -> str:
    backend = {"backend": "fsspec"} if rank == 0 else {"backend": "petrol"}
    words = dict(wrapper="ddp", interval=1, out_dir=f"local://{work_dir}/there", backend_args=backend)
    return refused(rank, work_dir, words)


@pytest.mark.timeout(60)
def test_a_backend_that_one_rank_cannot_open_is_an_error_on_all_before_training(run_ranks, tmp_path):
    told = run_ranks(2, with_a_backend_of_its_own, str(tmp_path))
    assert "RankFailure" in told[0] and "rank 1: ValueError" in told[0] and "no backend 'petrol'" in told[0]
    assert told[1].startswith("ValueError") and "no backend 'petrol'" in told[1]


@pytest.mark.timeout(60)
def test_a_hook_that_changes_what_is_saved_is_refused_before_training_with_sharded_checkpoints(run_ranks, tmp_path):
    told = run_ranks(1, refused, str(tmp_path), dict(wrapper="ddp", interval=1, format="sharded", hooks=(EMAHook(),)))
    assert "EMAHook changes what is saved" in told[0]


@pytest.mark.parametrize("word", ["filename_tmpl", "published_keys", "backend_args", "file_client_args"])
def test_words_that_are_for_files_are_refused_with_sharded_checkpoints(word):
    values = {"filename_tmpl": "e{}.pth", "published_keys": ["meta"]}
    with pytest.raises(ValueError, match=word):
        distckpt.CheckpointHook(format="sharded", **{word: values.get(word, {"backend": "local"})})

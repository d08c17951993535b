"""A Trainer of Lightning with CheckpointCallback goes on, bit for bit, as if nothing had happened."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

import distckpt.integrations.lightning
from distckpt.engine.snapshot import Staging
from distckpt.integrations.lightning import CheckpointCallback

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore")]

SIZE, BATCH, EPOCHS = 46, 4, 3


class Noisy(Dataset):
    """Numbers, to each of which some noise is added whenever it is read."""

    def __init__(self) -> None:
        self.numbers = torch.randn(SIZE, 5, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, at: int) -> Tensor:
        return self.numbers[at] + 0.01 * torch.randn(5)


class Stream(IterableDataset):
    """The same, without a length."""

    def __iter__(self) -> Any:
        noisy = Noisy()
        return (noisy[at] for at in range(SIZE))


class Program(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.losses: list[float] = []

    def on_train_start(self) -> None:
        torch.rand(3)

    on_train_epoch_start = on_train_epoch_end = on_train_start

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batches = batch if isinstance(batch, list) else [batch]
        loss = torch.stack([self.net(one).square().mean() for one in batches if one is not None]).sum()
        self.losses.append(loss.item())
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch).square().mean(), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]

    def train_dataloader(self) -> Any:
        return DataLoader(Noisy(), batch_size=BATCH, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Noisy(), batch_size=BATCH)

    test_dataloader = val_dataloader


class TwoOptimizers(Program):
    """Each steps by hand, one of them at every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers()[: 1 + batch_idx % 2]:
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
        self.lr_schedulers().step()

    def on_after_backward(self) -> None:
        self.log("gradient", self.net[0].weight.grad.norm(), on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        (first,), schedulers = super().configure_optimizers()
        return [first, torch.optim.SGD(self.net[0].parameters(), lr=0.01, momentum=0.9)], schedulers


class Plateau(Program):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class Workers(Program):
    def train_dataloader(self) -> Any:
        return DataLoader(
            TensorNumbers(), batch_size=BATCH, shuffle=True, num_workers=2, persistent_workers=self.is_persistent
        )

    is_persistent = False


class PersistentWorkers(Workers):
    is_persistent = True


class TensorNumbers(Noisy):
    """Without noise, which workers would draw."""

    def __getitem__(self, at: int) -> Tensor:
        return self.numbers[at]


class Streamed(Program):
    def train_dataloader(self) -> Any:
        return DataLoader(Stream(), batch_size=BATCH)


class Combined(Program):
    def train_dataloader(self) -> Any:
        short = DataLoader(TensorNumbers(), batch_size=11, shuffle=True)
        return [super().train_dataloader(), short]


class Longest(Combined):
    def train_dataloader(self) -> Any:
        return CombinedLoader(super().train_dataloader(), "max_size")


class Sharded(Program):
    def configure_model(self) -> None:
        for module in (self.net[0], self.net[3], self.net):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])


class Fsdp1(FSDPStrategy):
    """Without an accelerator, for which Lightning would ask."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


class Watch(Callback):
    """Keeps what each epoch told, and kills the process at a step."""

    def __init__(self, killed_at: int | None) -> None:
        self.killed_at = killed_at
        self.told: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.told.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.killed_at:
            trainer.checkpoint_callback.checkpointer.wait()
            trainer.strategy.barrier()
            end_workers()
            Path(trainer.default_root_dir, "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)


def end_workers() -> None:
    """Those of loaders look only every 5 s whether the process that they work for is there."""
    for one in multiprocessing.active_children():
        one.kill()


def trainer_for(folder: Path | str, callbacks: list[Callback], **words: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "devices": 1}
    defaults = {"max_epochs": EPOCHS, "accelerator": "cpu", "default_root_dir": str(folder)}
    return Trainer(callbacks=callbacks, **{**quiet, **defaults, **words})


def launch(rank: int, world_size: int) -> None:
    """The environment is that of torchrun."""
    words = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    words |= {"LOCAL_WORLD_SIZE": world_size, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "none"}
    os.environ.update({name: str(value) for name, value in words.items()})


def train(
    rank: int, world_size: int, root: str, kind: type[Program], words: dict[str, Any], killed_at: int | None, seed: int
) -> dict[str, Any]:
    """Trains to the end, or until it is killed. What it has then."""
    if world_size > 1:
        launch(rank, world_size)
    torch.manual_seed(seed)
    words = dict(words)
    saving = {"interval": 5, "save_last": False, **words.pop("saving", {})}
    make_strategy = words.pop("make_strategy", None)
    if make_strategy is not None:
        words["strategy"] = make_strategy()
    module, watch = kind(), Watch(killed_at)
    torch.manual_seed(seed + rank)
    trainer = trainer_for(root, [watch, CheckpointCallback(root, **saving)], devices=world_size, **words)
    whole: list[Tensor] = []
    trainer.callbacks[0].on_train_end = lambda *_: whole.extend(weights_of(trainer))
    trainer.fit(module)
    end_workers()
    return {
        "weights": [one.numpy() for one in whole],
        "rate": [group["lr"] for one in trainer.optimizers for group in one.param_groups],
        "random": torch.rand(3).numpy(),
        "losses": module.losses,
        "told": watch.told,
        "step": trainer.global_step,
    }


def weights_of(trainer: Trainer) -> list[Tensor]:
    """What this rank has of the model."""
    tensors = [one.detach().clone() for one in (*trainer.model.parameters(), *trainer.model.buffers())]
    return [one.full_tensor() if isinstance(one, DTensor) else one for one in tensors]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for left, right in zip(one["weights"], other["weights"], strict=True):
        np.testing.assert_array_equal(left, right)
    assert one["rate"] == other["rate"] and one["step"] == other["step"]
    np.testing.assert_array_equal(one["random"], other["random"])
    assert 0 < len(other["losses"]) < len(one["losses"])
    assert one["losses"][-len(other["losses"]) :] == other["losses"]
    assert one["told"][-len(other["told"]) :] == other["told"]


PROGRAMS: dict[str, tuple[int, type[Program], dict[str, Any]]] = {
    "plain": (1, Program, {}),
    "saved at ends of epochs": (
        1,
        Program,
        {"saving": {"interval": 1, "by_epoch": True}, "limit_train_batches": 7, "killed_at": 15},
    ),
    "gradients are accumulated": (
        1,
        Program,
        {"accumulate_grad_batches": 5, "check_val_every_n_epoch": 2, "saving": {"interval": 2}, "killed_at": 8},
    ),
    "validated within an epoch": (1, Plateau, {"val_check_interval": 4, "check_val_every_n_epoch": 1}),
    "two optimizers by hand": (1, TwoOptimizers, {"killed_at": 28}),
    "bfloat16, a limit, a last step": (
        1,
        Program,
        {"precision": "bf16-mixed", "limit_train_batches": 7, "max_steps": 19},
    ),
    "workers": (1, Workers, {}),
    "workers that live on": (1, PersistentWorkers, {"killed_at": 18}),
    "a stream": (1, Streamed, {"killed_at": 16}),
    "several loaders": (1, Combined, {"killed_at": 18}),
    "several loaders, the shorter one at its end": (1, Combined, {"killed_at": 9}),
    "the longest of several loaders": (1, Longest, {"killed_at": 9}),
    "DDP": (2, Program, {"strategy": "ddp"}),
    "FSDP": (2, Program, {"make_strategy": lambda: Fsdp1(auto_wrap_policy={nn.Linear})}),
    "FSDP2": (
        2,
        Sharded,
        {"make_strategy": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)},
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_killed_run_ends_as_one_that_was_not(run_ranks, tmp_path, program):
    world_size, kind, words = PROGRAMS[program]
    words = dict(words)
    killed_at = words.pop("killed_at", 11)
    whole = run_ranks(world_size, train, world_size, str(tmp_path / "whole"), kind, words, None, 3)
    run = str(tmp_path / "run")
    run_ranks(world_size, train, world_size, run, kind, words, killed_at, 3, lost=range(world_size))
    assert Path(run, "killed").exists()
    resumed = run_ranks(world_size, train, world_size, run, kind, words, None, 77)
    for one, other in zip(whole, resumed, strict=True):
        assert_same(one, other)


# When it is saved


def steps(root: Path) -> list[int]:
    return sorted(int(path.name[5:13]) for path in root.glob("step-*.committed"))


def fit(root: Path, *more: Callback, module: type[Program] = Program, **words: Any) -> Trainer:
    saving = words.pop("saving", {})
    start = {name: words.pop(name) for name in ("ckpt_path", "datamodule") if name in words}
    torch.manual_seed(5)
    trainer = trainer_for(root, [*more, CheckpointCallback(root, **saving)], **words)
    trainer.fit(module(), **start)
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return trainer.lightning_module.losses


def test_it_is_saved_by_steps_by_epochs_and_at_the_end(tmp_path):
    fit(tmp_path / "steps", saving={"interval": 5}, max_epochs=1)
    fit(tmp_path / "epochs", saving={"interval": 2, "by_epoch": True, "save_last": False})
    fit(tmp_path / "kept", saving={"interval": 5, "max_keep_ckpts": 1}, max_epochs=1)
    fit(tmp_path / "whole steps", saving={"interval": 1, "save_last": False}, max_epochs=1, accumulate_grad_batches=5)
    assert steps(tmp_path / "steps") == [5, 10, 12]
    assert steps(tmp_path / "epochs") == [24]
    assert steps(tmp_path / "kept") == [12]
    assert steps(tmp_path / "whole steps") == [1, 2, 3]


def test_what_is_left_within_a_step_is_not_saved(tmp_path):
    stopping = EarlyStopping("val_loss", patience=0, stopping_threshold=1e9)
    trainer = fit(tmp_path, stopping, accumulate_grad_batches=5, val_check_interval=7, num_sanity_val_steps=0)
    assert trainer.global_step == 1 and len(losses(trainer)) == 7 and not steps(tmp_path)


class Scored(Program):
    """Its validations tell what they are asked to."""

    scores = [3.0, 2.0, 4.0, 1.0, 5.0, 6.0]

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("score", self.scores[(self.trainer.global_step - 1) // 6])


def test_the_best_of_validations_is_saved(tmp_path):
    trainer = fit(
        tmp_path,
        module=Scored,
        saving={"save_best": "score", "rule": "less", "save_last": False},
        val_check_interval=6,
    )
    assert steps(tmp_path) == [24]
    callback = trainer.checkpoint_callback
    assert callback.checkpointer.best.metrics["score"] == 1.0 and "val_loss" in callback.checkpointer.best.metrics
    assert callback.best_model_path == str(tmp_path / "step-00000024")
    fresh = CheckpointCallback(tmp_path, save_best="score", rule="less")
    assert fresh.best_model_path == callback.best_model_path


def test_the_best_of_training_epochs_is_saved(tmp_path):
    fit(tmp_path, saving={"save_best": "train_loss", "save_last": False}, limit_val_batches=0)
    assert steps(tmp_path)[0] % 12 == 0


def test_a_metric_that_is_never_logged_is_an_error(tmp_path):
    with pytest.raises(
        KeyError, match=r"save_best: none of \['wal_loss'\] was logged, but \['train_loss', 'val_loss'\]"
    ):
        fit(tmp_path, saving={"save_best": "wal_loss"})


def test_nothing_is_saved_in_a_fast_run_for_development(tmp_path):
    fit(tmp_path, saving={"interval": 1}, fast_dev_run=True)
    assert not steps(tmp_path)


# What a run goes on from


def same(one: Trainer, other: Trainer) -> bool:
    return all(map(torch.equal, weights_of(one), weights_of(other)))


def test_a_run_that_has_ended_is_not_trained_again(tmp_path):
    first, again = fit(tmp_path), fit(tmp_path)
    assert not losses(again) and same(first, again)


@pytest.mark.parametrize("steps_before", [7, 12, 17])
def test_more_steps_may_be_asked_for(tmp_path, steps_before):
    whole = fit(tmp_path / "whole", max_steps=30, max_epochs=-1)
    first = fit(tmp_path / "run", max_steps=steps_before, max_epochs=-1)
    second = fit(tmp_path / "run", max_steps=30, max_epochs=-1)
    assert losses(first) + losses(second) == losses(whole) and same(whole, second)


@pytest.mark.parametrize(
    ("steps_before", "words", "callbacks"),
    [(29, {"reload_dataloaders_every_n_epochs": 2}, {}), (14, {}, {0: 1, 1: 3})],
    ids=["loaders", "accumulation"],
)
def test_what_changes_as_an_epoch_begins_stays_for_the_rest_of_it(tmp_path, steps_before, words, callbacks):
    def run(folder: str, until: int) -> Trainer:
        more = [GradientAccumulationScheduler(callbacks)] if callbacks else []
        return fit(tmp_path / folder, *more, max_steps=until, max_epochs=-1, **words)

    whole, first, second = run("whole", 32), run("run", steps_before), run("run", 32)
    assert losses(first) + losses(second) == losses(whole) and same(whole, second)


def test_ckpt_path_names_a_checkpoint_of_the_run(tmp_path):
    words = {"saving": {"interval": 4, "save_best": "score", "rule": "less"}, "val_check_interval": 6, "module": Scored}
    fit(tmp_path, **words)
    for path, left in {"best": 12, "last": 0, tmp_path / "step-00000008": 28, str(tmp_path): 0}.items():
        assert len(losses(fit(tmp_path, ckpt_path=path, **words))) == left, path


def test_weights_of_the_best_are_tested(tmp_path):
    words = {"saving": {"save_best": "score", "rule": "less"}, "val_check_interval": 6, "module": Scored}
    trainer = fit(tmp_path / "run", **words)
    best = fit(tmp_path / "best", max_steps=24, **words)
    trainer.test(Scored(), ckpt_path="best", verbose=False)
    assert same(best, trainer)
    fresh = trainer_for(tmp_path, [CheckpointCallback(tmp_path / "other")])
    fresh.validate(Scored(), ckpt_path=str(tmp_path / "run"), verbose=False)
    assert not same(best, fresh)


def test_a_file_of_lightning_is_what_a_run_starts_from_once(tmp_path):
    trainer_for(tmp_path, [ModelCheckpoint(tmp_path, "stock")], max_epochs=1).fit(Program())
    words = {"ckpt_path": tmp_path / "stock.ckpt", "saving": {"interval": 5}}
    first = fit(tmp_path / "run", max_epochs=2, **words)
    assert len(losses(first)) == 12 and steps(tmp_path / "run") == [15, 20, 24]
    second = fit(tmp_path / "run", max_epochs=3, **words)
    assert len(losses(second)) == 12


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    fit(tmp_path / "one", max_epochs=1)
    with pytest.raises(ValueError, match=r"ckpt_path is of the run in .*one: construct CheckpointCallback with that"):
        fit(tmp_path / "two", ckpt_path=tmp_path / "one")


class At(Callback):
    """Does something once at a step."""

    def __init__(self, step: int, what: Any) -> None:
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.what()


@pytest.mark.parametrize("how", ["SIGTERM", "STOP"])
def test_a_run_that_is_asked_to_stop_goes_on_later(tmp_path, how):
    def ask() -> None:
        if how == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            (tmp_path / "run" / "STOP").touch()
        time.sleep(1)  # as often it looks for the file

    whole = fit(tmp_path / "whole")
    before = signal.getsignal(signal.SIGTERM)
    first = fit(tmp_path / "run", At(8, ask), min_epochs=EPOCHS)
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(losses(first)) == 9 and steps(tmp_path / "run") == [9]
    assert not (tmp_path / "run" / "STOP").exists()
    second = fit(tmp_path / "run")
    assert losses(first) + losses(second) == losses(whole) and same(whole, second)


def stop_at(rank: int, root: str, asked: int, reached: int) -> tuple[int, int]:
    """A run of two ranks, one of which is asked to stop at a step. How far it came, and how many batches that took."""
    launch(rank, 2)

    def ask() -> None:
        if rank == asked:
            os.kill(os.getpid(), signal.SIGTERM)

    def wait() -> None:
        time.sleep(0.4)  # rank 0 looks once in a second

    saving = {"save_best": "train_loss", "interval": -1}
    more = (At(reached, ask), *(At(step, wait) for step in range(reached, reached + 6)))
    trainer = fit(Path(root), *more, devices=2, strategy="ddp", saving=saving)
    return trainer.global_step, len(losses(trainer))


@pytest.mark.parametrize("asked", [0, 1])
def test_ranks_stop_at_the_same_step(run_ranks, tmp_path, asked):
    first = run_ranks(2, stop_at, str(tmp_path), asked, 8)
    assert first[0] == first[1] and 8 < first[0][0] < 6 * EPOCHS
    assert run_ranks(2, stop_at, str(tmp_path), asked, -1) == [(6 * EPOCHS, 6 * EPOCHS - first[0][0])] * 2
    assert not (tmp_path / "STOP").exists()


class Failing(Exception):
    pass


def test_after_an_error_the_directory_is_free(tmp_path):
    def fail() -> None:
        raise Failing

    with pytest.raises(Failing):
        fit(tmp_path, At(8, fail), saving={"interval": 5})
    assert steps(tmp_path) == [5]
    assert len(losses(fit(tmp_path, max_epochs=1))) == 7


# What else has a state


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def train_dataloader(self) -> Any:
        self.count += 1
        return Program().train_dataloader()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"] + 100


class Hooks(Program):
    extra = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["extra"] = {"steps": self.trainer.global_step}
        checkpoint["state_dict"] = {key: one for key, one in checkpoint["state_dict"].items() if "running" not in key}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert "net.0.weight" in checkpoint["state_dict"]
        self.extra = checkpoint["extra"]["steps"]


def test_callbacks_hooks_and_the_data_module_have_their_state_again(tmp_path):
    saving = {"interval": 7, "save_last": False}
    stopping = EarlyStopping("train_loss", patience=50)
    fit(tmp_path, stopping, module=Hooks, datamodule=Data(), saving=saving, max_epochs=2)
    data, again = Data(), EarlyStopping("train_loss", patience=50)
    trainer = fit(tmp_path, again, module=Hooks, datamodule=data, saving=saving, max_epochs=2)
    assert data.count == 101 and trainer.lightning_module.extra == 21 and len(losses(trainer)) == 3
    assert torch.equal(again.best_score, stopping.best_score) and again.wait_count == stopping.wait_count


def test_an_average_of_weights_goes_on(tmp_path):
    words = {"saving": {"interval": 5}, "val_check_interval": 4, "max_steps": 30, "max_epochs": -1}
    whole = fit(tmp_path / "whole", EMAWeightAveraging(decay=0.9), **words)
    fit(tmp_path / "run", EMAWeightAveraging(decay=0.9), **{**words, "max_steps": 17})
    second = fit(tmp_path / "run", EMAWeightAveraging(decay=0.9), **words)
    assert len(losses(second)) == 13 and same(whole, second)


class Wide(Program):
    """Has weights that are copied while training goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 200), nn.Linear(200, 200), nn.Linear(200, 1))


class OtherWeights(Callback):
    """Validates with other weights, and lets them be copied by whoever still copies."""

    def __init__(self, go: threading.Event) -> None:
        self.go = go
        self.kept: dict[str, Tensor] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept = {name: one.clone() for name, one in pl_module.state_dict().items()}
        for one in pl_module.parameters():
            one.data.zero_()
        self.go.set()
        for one in threading.enumerate():
            if one.name == "distckpt-copy":
                one.join(30)
        self.go.clear()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.load_state_dict(self.kept)


def test_weights_that_a_callback_validates_with_are_not_saved(tmp_path, monkeypatch, caplog):
    go, copy_late = threading.Event(), Staging._copy_late

    def hold(staging: Staging) -> None:
        go.wait(30)
        copy_late(staging)

    monkeypatch.setattr(Staging, "_copy_late", hold)
    saving = {"interval": 1, "snapshot": "lazy", "save_last": False}
    words = {"accumulate_grad_batches": 2, "val_check_interval": 1, "limit_val_batches": 1}  # in between, too
    trainer = fit(tmp_path, OtherWeights(go), module=Wide, saving=saving, max_steps=4, num_sanity_val_steps=0, **words)
    assert steps(tmp_path) == [1, 2, 3, 4] and "while it was being copied" not in caplog.text
    for folder in sorted(tmp_path.glob("step-*[0-9]")):
        saved = load_file(folder / "model.safetensors")
        assert all(saved[name].all() for name in trainer.lightning_module.state_dict())


# What is refused


def test_words_are_checked_before_there_is_a_trainer():
    with pytest.raises(TypeError, match="save_top_k: Lightning's name; here it is max_keep_best="):
        CheckpointCallback("run", save_top_k=3)
    with pytest.raises(TypeError, match="state"):
        CheckpointCallback("run", state={})
    with pytest.raises(ValueError, match="format should be one of"):
        CheckpointCallback("run", format="tar")


@pytest.mark.parametrize("other", [ModelCheckpoint, lambda: CheckpointCallback("other")])
def test_two_callbacks_that_save_are_refused(tmp_path, other):
    with pytest.raises(
        ValueError, match="a Trainer saves by one callback: take out (ModelCheckpoint|CheckpointCallback)"
    ):
        fit(tmp_path, other())


def test_callbacks_that_change_what_there_is_to_save_are_refused(tmp_path):
    with pytest.raises(TypeError, match="StochasticWeightAveraging: what it makes of .* take WeightAveraging"):
        fit(tmp_path, StochasticWeightAveraging(0.1))


class DeepSpeedStrategy(DDPStrategy):
    """As that of Lightning is, which cannot be made without its package."""


def test_strategies_that_keep_their_state_to_themselves_are_refused(tmp_path):
    callback = CheckpointCallback(tmp_path)
    trainer = trainer_for(tmp_path, [callback])
    trainer._accelerator_connector.strategy = DeepSpeedStrategy()
    with pytest.raises(
        TypeError, match="DeepSpeedStrategy keeps its state to itself, .* works with SingleDeviceStrategy"
    ):
        callback.setup(trainer, Program(), "fit")


def test_whole_files_are_refused_where_no_rank_has_the_whole(tmp_path):
    callback = CheckpointCallback(tmp_path, format="full")
    trainer = trainer_for(tmp_path, [callback])
    trainer._accelerator_connector.strategy = Fsdp1()
    with pytest.raises(ValueError, match='format="full": with Fsdp1 no rank has all; use format="sharded"'):
        callback.setup(trainer, Program(), "fit")


def test_loaders_of_which_it_is_not_known_how_far_they_are_are_refused(tmp_path):
    class Streams(Program):
        def train_dataloader(self) -> Any:
            return [DataLoader(Noisy()), DataLoader(Stream())]

    class Fetching(Program):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            return self.net(next(dataloader_iter)[0]).mean()

    with pytest.raises(TypeError, match="how far several training data loaders are is not known"):
        fit(tmp_path, module=Streams)
    with pytest.raises(TypeError, match=r"training_step\(dataloader_iter\) fetches what nobody else knows of"):
        fit(tmp_path, module=Fetching)
    assert not any(tmp_path.iterdir())


def test_an_older_version_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.5.9")
    with pytest.raises(ImportError, match=r"needs lightning>=2\.6, and 2\.5\.9 is installed: pip install 'distckpt"):
        importlib.reload(distckpt.integrations.lightning)

"""A program around an Accelerator is saved whole, and goes on bit for bit as if nothing had happened."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration, FullyShardedDataParallelPlugin
from accelerate.state import DistributedType
from launching import forget, launch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

import distckpt
from distckpt import rng
from distckpt.accelerator_state import prepared_by

pytestmark = pytest.mark.timeout(120)

SIZE, BATCH, TOTAL = 46, 4, 14


class Noisy(Dataset):
    """Numbers, to each of which some noise is added whenever it is read."""

    def __init__(self, size: int = SIZE) -> None:
        self.numbers = torch.randn(size, 5, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.numbers)

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


def train(
    rank: int, world_size: int, root: str, words: dict[str, Any], data: dict[str, Any], killed_at: int | None, seed: int
) -> dict[str, Any]:
    """Trains until step TOTAL, or until it is killed. What it has in the end."""
    launch(rank, world_size)
    torch.manual_seed(seed)
    is_sharded = words.pop("fsdp2", False)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**data), **words)
    if is_sharded:  # Accelerate turns it on where there is an accelerator; all else of it runs without
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
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
    tensors = [one.detach() for one in (*model.parameters(), *model.buffers(), *average.weights)]
    return {
        "weights": [(one.full_tensor() if isinstance(one, DTensor) else one).numpy() for one in tensors],
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
    "FSDP2": ({"fsdp2": True}, {}),
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


# What is taken


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget()
    yield Accelerator(cpu=True, gradient_accumulation_steps=3)
    forget()


def test_everything_that_was_prepared_or_registered_is_taken(accelerator):
    models = [nn.Linear(2, 2), nn.Linear(2, 3)]
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    loaders = [DataLoader(Noisy(), batch_size=BATCH) for _ in range(2)]
    schedulers = [torch.optim.lr_scheduler.ConstantLR(one) for one in optimizers]
    accelerator.prepare(*models, *optimizers, *loaders, *schedulers)
    accelerator.register_for_checkpointing(Average(models[0]))
    parts, own = prepared_by(accelerator)
    names = ("model", "optimizer", "scheduler", "loader")
    assert list(parts) == [one for name in names for one in (name, f"{name}_1")] + ["custom"]
    assert own == {"loader", "loader_1"}
    assert parts["model_1"] is models[1] and parts["optimizer_1"] is optimizers[1]


def test_a_step_is_done_where_gradients_are_synchronised(accelerator, tmp_path):
    model, optimizer = accelerator.prepare(model := nn.Linear(5, 1), torch.optim.SGD(model.parameters(), 0.1))
    with distckpt.Checkpointer(tmp_path, accelerator) as ckpt:
        for _ in range(7):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.ones(1, 5)).sum())
                optimizer.step()
                optimizer.zero_grad()
            ckpt.step()
        ckpt.save("asked", wait=True)
        assert ckpt.latest.progress.step == 2


def test_a_stream_goes_on_where_it_was(accelerator):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(SIZE))

    def prepared() -> tuple[Any, Any]:
        accelerator._dataloaders.clear()
        loader = accelerator.prepare(DataLoader(Stream(), batch_size=BATCH))
        accelerator._models[:] = [nn.Linear(1, 1)]
        return loader, prepared_by(accelerator).parts["loader"]

    loader, position = prepared()
    batches = iter(loader)
    seen = [next(batches).tolist() for _ in range(5)]
    told = position.state_dict()
    rest = [batch.tolist() for batch in batches]
    resumed, position = prepared()
    position.load_state_dict(told)
    assert [batch.tolist() for batch in resumed] == rest
    assert [batch.tolist() for batch in resumed] == seen + rest


def dispatched(rank: int, world_size: int, drop_last: bool) -> None:
    """Rank 0 reads for all, in groups of a batch each, and in the last there are fewer."""
    launch(rank, world_size)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))

    def prepared() -> tuple[Any, Any]:
        accelerator._dataloaders.clear()
        loader = accelerator.prepare(DataLoader(Noisy(42), batch_size=6, drop_last=drop_last))
        accelerator._models[:] = [nn.Linear(1, 1)]
        return loader, prepared_by(accelerator).parts["loader"]

    loader, position = prepared()
    seen, told = [], []
    for batch in loader:
        seen.append(batch.tolist())
        told.append((position.state_dict(), rng.capture()))
    assert len(seen) == 7 // world_size + (not drop_last)
    assert not told[-1][0]["is_begun"]
    for nth, (state, numbers) in enumerate(told[:-1], 1):
        resumed, position = prepared()
        position.load_state_dict(state)
        rng.apply(numbers)
        assert [batch.tolist() for batch in resumed] == seen[nth:], nth


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_where_one_rank_reads_for_all_the_last_group_may_be_smaller(run_ranks, world_size, drop_last):
    run_ranks(world_size, dispatched, world_size, drop_last)


def test_weights_of_save_state_are_what_a_run_may_start_from(accelerator, tmp_path):
    model, optimizer = accelerator.prepare(model := nn.Linear(5, 2), torch.optim.AdamW(model.parameters()))
    model(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    accelerator.save_state(tmp_path / "stock")
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    with distckpt.Checkpointer(tmp_path / "run", accelerator, init_from=tmp_path / "stock") as ckpt:
        assert ckpt.resume() == 0
    assert torch.equal(model.weight, before)


# What is refused


def test_an_accelerator_that_has_prepared_nothing_is_refused(accelerator, tmp_path):
    with pytest.raises(ValueError, match=r"has no model yet: call accelerator\.prepare\(\) before"):
        distckpt.Checkpointer(tmp_path, accelerator)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_what_keeps_its_state_to_itself_is_refused(accelerator, tmp_path, monkeypatch, kind):
    accelerator.prepare(nn.Linear(2, 2))
    monkeypatch.setattr(type(accelerator), "distributed_type", DistributedType[kind])
    with pytest.raises(TypeError, match=r"this Accelerator cannot be saved, .* accelerator\.save_state\(\)"):
        distckpt.Checkpointer(tmp_path, accelerator)


def test_an_older_version_is_refused_by_name(accelerator, tmp_path, monkeypatch):
    accelerator.prepare(nn.Linear(2, 2))
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.14.9")
    with pytest.raises(ImportError, match=r"needs accelerate>=1\.15, and 1\.14\.9 is installed: pip install 'distckpt"):
        distckpt.Checkpointer(tmp_path, accelerator)

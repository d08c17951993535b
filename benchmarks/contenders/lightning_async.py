"""Lightning's Trainer.save_checkpoint with AsyncCheckpointIO: save() clones the state, a thread saves it."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn
from torch.optim import Optimizer

from contenders import Contender


class Module(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class LightningAsync(Contender):
    package = "lightning"

    def open(self, directory: Path, model: nn.Module, optimizer: Optimizer) -> None:
        super().open(directory, model, optimizer)
        self.io, self.written = AsyncCheckpointIO(), Future[None]()
        self.written.set_result(None)
        self.trainer = Trainer(accelerator="cpu", logger=False, plugins=[self.io], default_root_dir=directory)
        # What fit() does before its loop, which is ours here.
        self.trainer.strategy.connect(Module(model))
        self.trainer.strategy.optimizers = [optimizer]

    def save(self, step: int) -> None:
        self.written.result()  # it would queue them without a limit
        self.trainer.save_checkpoint(self.path(step))
        self.written = self.io._executor.submit(lambda: None)  # behind the save: there is one thread

    def wait(self) -> None:
        self.written.result()
        if self.io._error is not None:
            raise self.io._error

    def restore(self, step: int) -> None:
        state: dict[str, Any] = torch.load(self.path(step), weights_only=True)
        self.trainer.strategy.load_model_state_dict(state)
        self.trainer.strategy.load_optimizer_state_dict(state)

    def path(self, step: int) -> Path:
        return self.directory / f"{step}.ckpt"

    def close(self) -> None:
        self.io.teardown()


contender: Contender = LightningAsync()

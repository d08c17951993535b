"""distckpt.Checkpointer as it is by default: save() copies the state, another thread writes it; wait() is durable."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from contenders import Contender
from distckpt import Checkpointer, layout


class DistckptCheckpointer:
    package = "distckpt"

    def __init__(self, *, async_save: bool = True) -> None:
        self.async_save = async_save

    def open(self, directory: Path, model: nn.Module, optimizer: Optimizer) -> None:
        self.directory = directory
        state = {"model": model, "optimizer": optimizer}
        self.checkpointer = Checkpointer(directory, state, save_last=False, async_save=self.async_save)

    def save(self, step: int) -> None:
        self.checkpointer.step()
        self.checkpointer.save()

    def wait(self) -> None:
        self.checkpointer.wait()

    def delete(self, step: int) -> None:
        name = str(layout.StepName(step))
        (self.directory / layout.record_of(name)).unlink()
        shutil.rmtree(self.directory / name)

    def close(self) -> None:
        self.checkpointer.close()


contender: Contender = DistckptCheckpointer()

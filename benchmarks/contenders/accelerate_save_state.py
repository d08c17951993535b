"""Accelerate's save_state: the model as safetensors, the optimizer by torch.save; load_state."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from contenders import Contender


class AccelerateSaveState(Contender):
    package = "accelerate"

    def open(self, directory: Path, model: nn.Module, optimizer: Optimizer) -> None:
        super().open(directory, model, optimizer)
        self.accelerator = Accelerator(cpu=True)
        self.accelerator.prepare(model, optimizer)

    def save(self, step: int) -> None:
        self.accelerator.save_state(str(self.path(step)))

    def restore(self, step: int) -> None:
        self.accelerator.load_state(str(self.path(step)))


contender: Contender = AccelerateSaveState()

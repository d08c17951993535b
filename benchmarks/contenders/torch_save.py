"""torch.save to a draft, then renamed, as most training scripts do it: it returns before the bytes are durable."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from contenders import Contender, fsync


class TorchSave:
    package = "torch"

    def __init__(self, *, durable: bool = False) -> None:
        self.durable = durable

    def open(self, directory: Path, model: nn.Module, optimizer: Optimizer) -> None:
        self.directory, self.model, self.optimizer = directory, model, optimizer

    def save(self, step: int) -> None:
        draft = self.directory / "draft"
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, draft)
        if self.durable:
            fsync(draft)
        draft.replace(self.directory / f"{step}.pt")
        if self.durable:
            fsync(self.directory)

    def wait(self) -> None:
        """It is done when `save` returns."""

    def delete(self, step: int) -> None:
        (self.directory / f"{step}.pt").unlink()

    def close(self) -> None:
        """It holds nothing."""


contender: Contender = TorchSave()

"""torch.save to a draft, then renamed, as most training scripts do it: it returns before the bytes are durable."""

from __future__ import annotations

from pathlib import Path

import torch
from files import fsync

from contenders import Contender


class TorchSave(Contender):
    package = "torch"

    def __init__(self, *, is_durable: bool = False, mmap: bool = False) -> None:
        self.is_durable, self.mmap = is_durable, mmap

    def save(self, step: int) -> None:
        draft = self.directory / "draft"
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, draft)
        if self.is_durable:
            fsync(draft)
        draft.replace(self.path(step))
        if self.is_durable:
            fsync(self.directory)

    def restore(self, step: int) -> None:
        state = torch.load(self.path(step), weights_only=True, mmap=self.mmap)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def path(self, step: int) -> Path:
        return self.directory / f"{step}.pt"


contender: Contender = TorchSave()

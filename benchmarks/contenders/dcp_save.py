"""torch.distributed.checkpoint.save with one thread; dcp.load, in place."""

from __future__ import annotations

from typing import Any

from torch.distributed import checkpoint as dcp

from contenders import Contender


class DcpSave(Contender):
    package, is_durable = "torch", True

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def save(self, step: int) -> None:
        writer = dcp.FileSystemWriter(self.path(step), thread_count=self.threads)
        dcp.save(self.state(), storage_writer=writer, no_dist=True)

    def restore(self, step: int) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=self.path(step), no_dist=True)
        # Its tensors are the live ones, which hold what was loaded; what is no tensor is put in here.
        self.optimizer.load_state_dict(state["optimizer"])


contender: Contender = DcpSave()

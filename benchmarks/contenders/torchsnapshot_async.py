"""torchsnapshot's Snapshot.async_take: save() copies the state, a thread writes it."""

from __future__ import annotations

from typing import Any

from torchsnapshot import Snapshot
from torchsnapshot.snapshot import PendingSnapshot

from contenders import Contender


class TorchSnapshot(Contender):
    package = "torchsnapshot"

    pending: PendingSnapshot | None = None

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def save(self, step: int) -> None:
        self.wait()
        self.pending = Snapshot.async_take(str(self.path(step)), self.state())

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.wait()

    def restore(self, step: int) -> None:
        Snapshot(str(self.path(step))).restore(self.state())


contender: Contender = TorchSnapshot()

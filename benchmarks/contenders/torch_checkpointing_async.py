"""torch_checkpointing's CheckpointManager, asynchronous: staged beside training, written by a process.

What the forward changes, the statistics of batch norms, it may save as they are after it: 36 times in 59 here.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch_checkpointing import AsyncCheckpointSaverConfig, CheckpointManager, CheckpointStagerConfig
from torch_checkpointing.checkpoint_process import CheckpointProcessConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from contenders import Contender


class TorchCheckpointing(Contender):
    package = "torch_checkpointing"

    def open(self, directory: Path, model: nn.Module, optimizer: Optimizer) -> None:
        super().open(directory, model, optimizer)
        self.written: Future[Any] | None = None
        # What needs CUDA is off. So is O_DIRECT: with it, its writes fail with EINVAL, as its buffers are not aligned.
        saver = AsyncCheckpointSaverConfig(
            staging_config=CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False),
            process_config=CheckpointProcessConfig(subprocess_init_timeout_secs=300),
        )
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self.manager = CheckpointManager(CheckpointManager.Config(save=saver, storage_config=storage))
        self.manager.prewarm_staging(self.state())

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def save(self, step: int) -> None:
        self.written = self.manager.save(str(self.path(step)), self.state())

    def before_optimizer(self) -> None:
        with self.manager.lock():
            """The lock is for the optimizer's step; no other thread saves here, so it is enough to get it."""

    def wait(self) -> None:
        if self.written is not None:
            self.written.result()

    def restore(self, step: int) -> None:
        state = self.state()
        loaded = self.manager.load(str(self.path(step)), into=state)
        self.optimizer.load_state_dict(loaded["optimizer"])

    def close(self) -> None:
        self.manager.close()


contender: Contender = TorchCheckpointing()

"""dcp.async_save in a thread, with a stager that is kept and cached plans: save() copies the state."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.optim import Optimizer

from contenders import Contender
from contenders.dcp_save import DcpSave


class DcpAsync(DcpSave):
    def __init__(
        self,
        kind: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
        *,
        is_staged_beside: bool = False,
        is_shared: bool = False,
    ) -> None:
        super().__init__()
        self.kind, self.is_staged_beside, self.is_shared = kind, is_staged_beside, is_shared
        self.staged: Future[Any] | None = None
        self.written: Future[Any] | None = None

    def open(self, directory: Path, model: nn.Module, optimizer: Optimizer) -> None:
        super().open(directory, model, optimizer)
        # Kept, it copies into the same memory at each save. Pinned memory and copies that do not block need a GPU.
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=self.is_shared,
                use_async_staging=self.is_staged_beside,
                use_non_blocking_copy=False,
            )
        )

    def save(self, step: int) -> None:
        self.wait()  # as its tutorial has it: one at a time
        saving = dcp.async_save(
            self.state(),
            storage_writer=dcp.FileSystemWriter(self.path(step)),
            planner=dcp.DefaultSavePlanner(enable_plan_caching=True),
            async_checkpointer_type=self.kind,
            async_stager=self.stager,
            no_dist=self.kind is AsyncCheckpointerType.THREAD,
        )
        if isinstance(saving, Future):
            self.staged, self.written = None, saving
        else:
            self.staged, self.written = saving.staging_completion, saving.upload_completion

    def before_optimizer(self) -> None:
        if self.staged is not None:
            self.staged.result()

    def wait(self) -> None:
        if self.written is not None:
            self.written.result()

    def close(self) -> None:
        self.stager.close()


contender: Contender = DcpAsync()

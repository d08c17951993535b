"""MMEngine's own CheckpointHook, called by its own Runner with its default hooks at the end of an epoch."""

from __future__ import annotations

from pathlib import Path

from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from contenders import Contender


class MMEngineHook(Contender):
    package = "mmengine"

    def open(self, directory: Path, model: nn.Module, optimizer: Optimizer) -> None:
        super().open(directory, model, optimizer)
        self.runner = Runner(
            model,
            work_dir=str(directory),
            train_dataloader=DataLoader(range(1)),
            train_cfg={"by_epoch": True, "max_epochs": 1_000_000},
            optim_wrapper=OptimWrapper(optimizer),
            param_scheduler=[],
            default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
            log_level="ERROR",
        )
        self.hook = next(hook for hook in self.runner.hooks if isinstance(hook, CheckpointHook))
        self.runner.call_hook("before_train")

    def save(self, step: int) -> None:
        # The loop counts an epoch only after its hooks have run.
        self.runner.train_loop._epoch = step - 1
        self.hook.after_train_epoch(self.runner)

    def restore(self, step: int) -> None:
        self.runner.resume(str(self.path(step)))

    def path(self, step: int) -> Path:
        return self.directory / f"epoch_{step}.pth"


contender: Contender = MMEngineHook()

"""What MMEngine's ``Runner`` pays for checkpoints, and whether it goes on exactly: this hook beside its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from side_by_side import BATCH, EVERY, StepTimes, compare, make_data, make_model, mean_square
from torch import Tensor, nn

STOCK = "mmengine.hooks.CheckpointHook"
HOOKS: dict[str, dict[str, Any]] = {
    "distckpt.CheckpointHook": dict(type="distckpt.CheckpointHook"),
    "distckpt.CheckpointHook(sharded, async_save)": dict(
        type="distckpt.CheckpointHook", format="sharded", async_save=True
    ),
    STOCK: dict(type="CheckpointHook"),
}


class Net(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.layers = make_model()

    def forward(self, batch: Tensor, mode: str = "tensor") -> Any:
        return {"loss": mean_square(self.layers(batch))} if mode == "loss" else self.layers(batch)


class Times(Hook):
    """After all other hooks."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.times = StepTimes()

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        self.times.step(runner.iter + 1)


def train(name: str, folder: Path, until: int) -> tuple[dict[int, float], nn.Module]:
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # or the stock hook's files cannot be resumed from
    torch.manual_seed(0)
    times = Times()
    runner = Runner(
        model=Net(),
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=BATCH,
            num_workers=0,
            dataset=make_data(),
            sampler=dict(type="InfiniteSampler", shuffle=True),
            collate_fn=dict(type="default_collate"),
        ),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-4)),
        train_cfg=dict(by_epoch=False, max_iters=until),
        default_hooks=dict(checkpoint=dict(interval=EVERY, by_epoch=False, save_last=False, **HOOKS[name])),
        custom_hooks=[times],
        resume=True,
        randomness=dict(seed=0),
        log_level="ERROR",
    )
    runner.train()
    return times.times.seconds, runner.model


if __name__ == "__main__":
    compare(train, [*HOOKS], __doc__)

"""distckpt.Checkpointer(snapshot="eager"): save() copies the state on all cores, the rest is beside training."""

from __future__ import annotations

import inspect
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from contenders import Contender
from distckpt import Checkpointer, layout


class Distckpt(Contender):
    package, is_durable = "distckpt", True

    def __init__(self, snapshot: str, **words: bool) -> None:
        self.snapshot, self.words = snapshot, words
        self._saved = threading.Event()

    def open(self, directory: Path, model: nn.Module, optimizer: Optimizer) -> None:
        super().open(directory, model, optimizer)
        # An older checkout has no such word: it always copies in save().
        words = {"snapshot": self.snapshot} if "snapshot" in inspect.signature(Checkpointer).parameters else {}
        state = {"model": model, "optimizer": optimizer}
        self.checkpointer = Checkpointer(directory, state, save_last=False, on_event=self._hear, **words, **self.words)

    def save(self, step: int) -> None:
        self.checkpointer.step()
        self._saved.clear()
        self.checkpointer.save()

    def wait(self) -> None:
        # Its own wait() belongs to the thread that trains.
        if threading.current_thread() is threading.main_thread():
            self.checkpointer.wait()
        elif not self._saved.wait(600):
            raise TimeoutError("no save ended within 600 s")
        elif self.telemetry["event"] == "failed":
            raise RuntimeError(self.telemetry["why"])

    def restore(self, step: int) -> None:
        self.checkpointer.resume(step)

    def path(self, step: int) -> Path:
        return self.directory / str(layout.StepName(step))

    def delete(self, step: int) -> None:
        (self.directory / layout.record_of(str(layout.StepName(step)))).unlink()
        # Without its record it is garbage, which the writer may be clearing away at the same time.
        shutil.rmtree(self.path(step), ignore_errors=True)

    def close(self) -> None:
        self.checkpointer.close()

    def _hear(self, event: Mapping[str, object]) -> None:
        if event["event"] in ("saved", "failed"):
            self.telemetry = event
            self._saved.set()


contender: Contender = Distckpt("eager")

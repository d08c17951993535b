"""The contract of a contender: something that saves a training state and restores it, in a file of its own here.

To add one is to add a file. Its name is what the tables call it, the first line of its docstring is what they say
about it, and it makes one object, ``contender``.
"""

from __future__ import annotations

import ast
import pkgutil
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

# What all others are compared with, in the same run.
REFERENCE = "torch_save_fsync"


class Contender(Protocol):
    """Saves one training state again and again, in a process of its own, and leaves one file or folder for each.

    Where a method is not needed, what stands here is right.

    Attributes:
        package: whose version is told with the figures.
        is_durable: whether what it wrote is fsynced once `wait` returned. What is not, is fsynced for it, and timed
            where it is told how long a save takes until it is durable.
        telemetry: what it says itself about its last save.
    """

    package: str
    is_durable: bool = False
    telemetry: Mapping[str, object] = {}

    def open(self, directory: Path, model: nn.Module, optimizer: Optimizer) -> None:
        """Get ready to save these into ``directory``, which is empty, or to restore them from it. Not timed."""
        self.directory, self.model, self.optimizer = directory, model, optimizer

    def save(self, step: int) -> None:
        """Save the state as it is now; steps count from 1. On return the next forward and backward may begin."""
        ...

    def before_optimizer(self) -> None:
        """On return the optimizer may change the state: for whoever defers a wait until here, as training waits."""

    def wait(self) -> None:
        """On return the last save has done all it ever does. On any thread."""

    def restore(self, step: int) -> None:
        """Load what the save at ``step`` left into the model and the optimizer that it was opened with."""
        ...

    def path(self, step: int) -> Path:
        """Where the save at ``step`` leaves what it leaves."""
        return self.directory / str(step)

    def delete(self, step: int) -> None:
        """Remove what the save at ``step`` left. Not timed, and never the newest one."""
        path = self.path(step)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """Let go of everything. Not timed."""


def names() -> list[str]:
    """All contenders there are; none is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def about(name: str) -> str:
    """What the contender of that name says about itself; it is not imported."""
    told = ast.get_docstring(ast.parse(Path(__path__[0], f"{name}.py").read_text()))
    return (told or "").partition("\n")[0]


def load(name: str) -> Contender:
    """The contender of that name.

    Raises:
        ModuleNotFoundError: where a package that it needs is not installed.
    """
    contender: Contender = import_module(f"{__name__}.{name}").contender
    return contender

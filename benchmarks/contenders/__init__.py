"""The contract of a contender: something that saves a training state, in a file of its own here.

To add one is to add a file. Its name is what the tables call it, the first line of its docstring is what they say
about it, and it makes one object, ``contender``.
"""

from __future__ import annotations

import os
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class Contender(Protocol):
    """Saves one training state again and again, within its own process: the cost of others is not counted.

    Attributes:
        package: whose version is told with the figures.
    """

    package: str

    def open(self, directory: Path, model: nn.Module, optimizer: Optimizer) -> None:
        """Get ready to save these into ``directory``, which is empty. Not timed."""
        ...

    def save(self, step: int) -> None:
        """Save the state as it is now. On return training may go on and change it. Steps count from 1."""
        ...

    def wait(self) -> None:
        """On return the last save has done all it ever does. What it did not fsync is fsynced for it then, and
        timed."""
        ...

    def delete(self, step: int) -> None:
        """Remove what the save at ``step`` left. Not timed, and never the newest one."""
        ...

    def close(self) -> None:
        """Let go of everything. Not timed."""
        ...


def names() -> list[str]:
    """All contenders there are; none is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> tuple[Contender, str]:
    """The contender of that name, and what it says about itself."""
    module = import_module(f"{__name__}.{name}")
    contender: Contender = module.contender
    return contender, (module.__doc__ or "").partition("\n")[0]


def fsync(path: Path) -> None:
    """The bytes of a file, or the names in a folder, are durable on return."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

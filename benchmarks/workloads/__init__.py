"""The contract of a workload: something to train, in a file of its own here.

To add one is to add a file. Its name is what the command line calls it, the first line of its docstring is what the
tables say about it, and its function ``make`` takes nothing and returns a `Workload`: the same numbers each time.
Torch is imported where something is made only: the process that asks and draws does without.
"""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


@dataclass(frozen=True)
class Workload:
    """A model, its optimizer, and one batch that it is trained on again and again.

    Attributes:
        loss: forward and loss of the batch.
        after_step: what training does after the optimizer's step, such as the average of an EMA.
    """

    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[], Tensor]
    after_step: Callable[[], object] = lambda: None

    def tensors(self) -> list[Tensor]:
        """What there is to save, always in the same order: parameters, buffers, and the optimizer's tensors."""
        from torch import is_tensor

        trained = [one for group in self.optimizer.param_groups for one in group["params"]]
        moments = [each for one in trained for _, each in sorted(self.optimizer.state[one].items())]
        return [*self.model.parameters(), *self.model.buffers(), *filter(is_tensor, moments)]


def names() -> list[str]:
    """All workloads there are; none is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def about(name: str) -> str:
    """What the workload of that name says about itself; it is not imported."""
    told = ast.get_docstring(ast.parse(Path(__path__[0], f"{name}.py").read_text()))
    return (told or "").partition("\n")[0]


def load(name: str) -> Workload:
    """The workload of that name, untrained."""
    import torch

    torch.manual_seed(0)
    workload: Workload = import_module(f"{__name__}.{name}").make()
    return workload

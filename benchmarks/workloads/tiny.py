"""A megabyte of one layer that is used twice, and a batch norm, fused AdamW: to see that everything runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from workloads import Workload

WIDTH = 128


class Tiny(nn.Module):
    """There and back by one weight, with a norm in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, 4 * WIDTH), nn.BatchNorm1d(4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.norm(self.first(x)), self.first.weight.T)


def make() -> Workload:
    model, x = Tiny(), torch.randn(64, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return Workload(model, optimizer, lambda: (model(x) - x).square().mean())

"""10,000 tensors of 16 KiB: 5,000 parameters and the momentum of each, fused SGD."""

from __future__ import annotations

import torch
from torch import nn

from workloads import Workload

MATRICES, WIDTH = 5000, 64


def make() -> Workload:
    model = nn.ParameterList(torch.randn(WIDTH, WIDTH) * 0.1 for _ in range(MATRICES))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    x = torch.randn(32, WIDTH)
    # One operation for all: thousands of small ones would measure how threads wait for each other.
    return Workload(model, optimizer, lambda: (x @ torch.stack(list(model))).square().mean())

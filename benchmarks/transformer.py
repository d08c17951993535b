"""A training state of a given size, shaped as a small transformer's: 147 parameters with AdamW's moments."""

from __future__ import annotations

from math import ceil, isqrt

import torch
from torch import nn

LAYERS = 12
# float32: the parameter and the two moments of AdamW.
BYTES_PER_PARAMETER = 12


def training_state(size_bytes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after one step, whose tensors are at least ``size_bytes`` together, by less than a
    per cent where that is a megabyte or more. The same numbers each time. The gradients are there too, and stay,
    so that a further step only needs ``optimizer.step()``.
    """
    torch.manual_seed(0)
    parameters = ceil(size_bytes / BYTES_PER_PARAMETER)
    width = max(1, isqrt(parameters // 160))
    blocks = [nn.TransformerEncoderLayer(width, 1, 4 * width) for _ in range(LAYERS)]
    norm = nn.LayerNorm(width)
    taken = sum(one.numel() for part in (*blocks, norm) for one in part.parameters())
    model = nn.Sequential(nn.Embedding(max(1, ceil((parameters - taken) / width)), width), *blocks, norm)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    # The other implementations map and touch new memory at each step, which is what one would measure then.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    optimizer.step()
    return model, optimizer


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What there is to save: parameters, buffers, and the optimizer's tensors."""
    moments = [value for one in optimizer.state.values() for value in one.values() if isinstance(value, torch.Tensor)]
    return [*model.parameters(), *model.buffers(), *moments]

"""Tensors of all kinds of numbers that a safetensors file knows."""

from __future__ import annotations

import torch
from torch import Tensor

from distckpt.formats.safetensors_file import DTYPES


def of_every_dtype() -> dict[str, Tensor]:
    """Of each dtype that a safetensors file knows a few elements, one, and none."""
    tensors = {}
    for dtype in DTYPES:
        data = torch.randint(0, 2 if dtype is torch.bool else 256, (6 * dtype.itemsize,), dtype=torch.uint8)
        tensors[f"some.{dtype}"] = data.view(dtype).view(2, 3)
        tensors[f"one.{dtype}"] = data.view(dtype)[:1].clone().view(())
        tensors[f"none.{dtype}"] = torch.empty((2, 0, 3), dtype=dtype)
    return tensors

"""How much host memory there is, and how much of it a state will take."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """How much memory this process can still have, by the machine's and by its control group's own word."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    free = [int(found[1]) * 1024] if found else [1 << 62]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free.append(int((_CGROUP / limit).read_text()) - int((_CGROUP / used).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return max(min(free), 0)


def expected_bytes(parts: Iterable[Any]) -> int:
    """How many bytes of tensors these will hold once training has begun: optimizers make theirs in the first step."""
    total = 0
    for part in parts:
        if isinstance(part, nn.Module):
            total += _bytes_in(part.state_dict())
        elif isinstance(optimizer := getattr(part, "optimizer", part), torch.optim.Optimizer):
            total += _bytes_in(list(optimizer.state.values())) or _moments_bytes(optimizer)
    return total


def _moments_bytes(optimizer: torch.optim.Optimizer) -> int:
    """As most have it: two of a parameter's size, of SGD one where it has momentum."""
    total = 0
    for group in optimizer.param_groups:
        is_sgd = isinstance(optimizer, torch.optim.SGD)
        moments = int(bool(group.get("momentum"))) if is_sgd else 2 + bool(group.get("amsgrad"))
        total += moments * sum(one.nbytes for one in group["params"] if one.requires_grad)
    return total


def _bytes_in(value: Any) -> int:
    found: dict[tuple[int, int], int] = {}

    def look(one: Any) -> None:
        if isinstance(one, Tensor) and not nn.parameter.is_lazy(one) and not one.is_meta:
            found[(one.data_ptr(), one.nbytes)] = one.nbytes
        elif isinstance(one, dict):
            for inner in one.values():
                look(inner)
        elif isinstance(one, (list, tuple)):
            for inner in one:
                look(inner)

    try:
        look(value)
    except RuntimeError:  # tensors without memory of their own: what cannot be saved is found when it is
        return 0
    return sum(found.values())

"""How much host memory there is, and how much of it a state will take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")

# Of the two kinds of control groups: where they lie, how its line in _OWN_GROUP begins, and what its files are called.
_KINDS = (
    ("", "0::", "memory.max", "memory.current", ""),
    ("memory", r"\d+:(?:\S+,)?memory(?:,\S+)?:", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


def available_bytes() -> int:
    """How much memory this process can still have, by the word of the machine and of all its control groups."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    machine = int(found[1]) * 1024 if found else 1 << 62
    return max(min([machine, *_left_in_groups()]), 0)


def _left_in_groups() -> Iterator[int]:
    own = _OWN_GROUP.read_text() if _OWN_GROUP.exists() else ""
    for folder, line, limit, used, prefix in _KINDS:
        path = re.search(rf"^{line}/?(.*)$", own, re.MULTILINE)
        lowest = PurePosixPath(path[1] if path else "")
        for group in (lowest, *lowest.parents):
            try:
                place = _GROUPS / folder / group
                yield int((place / limit).read_text()) - int((place / used).read_text()) + _cached(place, prefix)
            except (OSError, ValueError):  # no such group, or "max"
                continue


def _cached(group: Path, prefix: str) -> int:
    """Bytes of files that the system keeps in mind for the time being."""
    try:
        told = (group / "memory.stat").read_text()
    except OSError:
        return 0
    return sum(int(count) for count in re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", told, re.MULTILINE))


def expected_bytes(parts: Iterable[Any]) -> int:
    """How many bytes of tensors these will hold once training has begun: optimizers make theirs in the first step."""
    total = 0
    for part in parts:
        if isinstance(part, nn.Module):
            total += _bytes_in(part.state_dict())
        elif isinstance(part, torch.optim.lr_scheduler.LRScheduler):
            continue  # it has its optimizer, and saves nothing of it
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

"""How much host memory there is, and how much of it a state will take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from distckpt.flat_parameters import state_of
from distckpt.formats.shards import is_spread, views_of

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


@dataclass(frozen=True)
class Size:
    """How many bytes of tensors a state has on this rank.

    Attributes:
        whole_bytes: of those that are all here, as on every rank.
        spread_bytes: of what is here of those that are spread over ranks.
        is_on_device: whether some lie on an accelerator.
    """

    whole_bytes: int = 0
    spread_bytes: int = 0
    is_on_device: bool = False

    @property
    def total_bytes(self) -> int:
        return self.whole_bytes + self.spread_bytes

    def __add__(self, other: Size) -> Size:
        return Size(
            self.whole_bytes + other.whole_bytes,
            self.spread_bytes + other.spread_bytes,
            self.is_on_device or other.is_on_device,
        )


def expected_size(parts: Iterable[Any]) -> Size:
    """How many bytes of tensors these will hold once training has begun: optimizers make theirs in the first step."""
    total = Size()
    for part in parts:
        if isinstance(part, nn.Module):
            total += _size_of(state_of(part))
        elif isinstance(part, torch.optim.lr_scheduler.LRScheduler):
            continue  # it has its optimizer, and saves nothing of it
        elif isinstance(optimizer := getattr(part, "optimizer", part), torch.optim.Optimizer):
            found = _size_of(list(optimizer.state.values()))
            total += found if found.total_bytes else _moments_size(optimizer)
    return total


def expected_bytes(parts: Iterable[Any]) -> int:
    """As `expected_size`, all of it."""
    return expected_size(parts).total_bytes


def _moments_size(optimizer: torch.optim.Optimizer) -> Size:
    """As most have it: two of a parameter's size, of SGD one where it has momentum."""
    total = Size()
    for group in optimizer.param_groups:
        is_sgd = isinstance(optimizer, torch.optim.SGD)
        moments = int(bool(group.get("momentum"))) if is_sgd else 2 + bool(group.get("amsgrad"))
        for _ in range(moments):
            total += _size_of([one for one in group["params"] if one.requires_grad])
    return total


def _size_of(value: Any) -> Size:
    found: dict[tuple[int, int, bool], Size] = {}

    def look(one: Any) -> None:
        if isinstance(one, Tensor) and not nn.parameter.is_lazy(one):
            spread = is_spread(one)
            for here in views_of(one):
                if not here.is_meta:
                    count = here.nbytes
                    size = Size(0 if spread else count, count if spread else 0, not here.is_cpu)
                    found[(here.data_ptr(), count, spread)] = size
        elif isinstance(one, dict):
            for inner in one.values():
                look(inner)
        elif isinstance(one, (list, tuple)):
            for inner in one:
                look(inner)

    try:
        look(value)
    except RuntimeError:  # tensors without memory of their own: what cannot be saved is found when it is
        return Size()
    return sum(found.values(), Size())

"""Buffers made equal on all ranks before a save.

Running statistics of BatchNorm differ by rank, as each rank sees its own data; a checkpoint has one of each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distckpt.errors import RankFailure
from distckpt.ranks import LEADER, Ranks

_log = logging.getLogger("distckpt")

Mode = Literal["mean", "broadcast", False]

_DURING = "synchronising of buffers"


def parse_mode(sync_buffers: object) -> Mode:
    """The mode that the user's word names.

    Raises:
        ValueError: for every other word.
    """
    if sync_buffers in ("mean", "broadcast") or sync_buffers is False:
        return sync_buffers
    raise ValueError(f'sync_buffers should be "mean", "broadcast" or False, is {sync_buffers!r}')


def sync_buffers(modules: Iterable[nn.Module], mode: Mode, *, ranks: Ranks, timeout: timedelta) -> None:
    """Every rank has the same values in the persistent buffers of ``modules``. Collective.

    Floating-point and complex buffers hold the mean over ranks (summed in float64), or with ``"broadcast"`` those of
    rank 0; integers and booleans hold those of rank 0. What was equal on all ranks stays what it is, bit for bit.
    Costs one all-reduce and one broadcast on the default process group, and another all-reduce if there are 64-bit
    floats; nothing where there is one process, or no buffer.

    Raises:
        RankFailure: on every rank that is alive, naming those that did not take part.
    """
    if mode is False or ranks.world_size == 1:
        return
    named = dict(_persistent_buffers(modules))
    averaged = {name: one for name, one in named.items() if mode == "mean" and _is_averaged(one)}
    copied = {name: one for name, one in named.items() if name not in averaged}
    try:
        if averaged:
            _average(averaged, ranks.world_size, timeout)
        if copied:
            _copy_from_leader(list(copied.values()), timeout)
    except RuntimeError as error:
        # Who is missing only the control store can tell: a process group's error names addresses.
        ranks.exchange(f"{_DURING} (roll call)", None, len)
        raise RankFailure(_DURING, {ranks.rank: str(error)}) from error


def _persistent_buffers(modules: Iterable[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for nth, module in enumerate(modules):
        for path, owner in module.named_modules():
            for name, buffer in owner._buffers.items():
                if buffer is None or name in owner._non_persistent_buffers_set or id(buffer) in seen:
                    continue
                seen.add(id(buffer))
                if type(buffer) in (Tensor, nn.Buffer) and buffer.numel():
                    yield f"{nth}.{path}.{name}", buffer


def _is_averaged(buffer: Tensor) -> bool:
    return buffer.is_floating_point() or buffer.is_complex()


@torch.no_grad()
def _average(buffers: dict[str, Tensor], world_size: int, timeout: timedelta) -> None:
    real = {name: torch.view_as_real(one) if one.is_complex() else one for name, one in buffers.items()}
    flat = torch.cat([one.detach().reshape(-1).to(torch.float64) for one in real.values()])
    unchanged = _where_equal([one for one in real.values() if one.dtype is torch.float64], timeout)
    _wait(dist.all_reduce(flat, async_op=True), timeout)
    flat /= world_size
    for one, mean in zip(real.values(), torch.split(flat, [one.numel() for one in real.values()]), strict=True):
        mean = mean.view(one.shape)
        one.copy_(torch.where(next(unchanged), one, mean) if one.dtype is torch.float64 else mean)
    if bool(torch.isfinite(flat).all()):
        return
    if names := [name.split(".", 1)[1] for name, one in real.items() if not bool(torch.isfinite(one).all())]:
        _log.warning("after averaging over ranks these buffers are not finite: %s", ", ".join(names[:10]))


def _where_equal(buffers: list[Tensor], timeout: timedelta) -> Iterator[Tensor]:
    """For each of these float64 buffers, which of its elements have the same bits on all ranks.

    The mean of three equal ones may be another number, as their sum is rounded; for shorter floats it is exact.
    """
    if not buffers:
        return iter(())
    bits = torch.cat([one.detach().reshape(-1) for one in buffers]).view(torch.int64)
    extremes = torch.cat((bits, ~bits))  # ~ turns the order round, so that one maximum gives both
    _wait(dist.all_reduce(extremes, op=dist.ReduceOp.MAX, async_op=True), timeout)
    highest, lowest = extremes.chunk(2)
    equal = torch.split(highest == ~lowest, [one.numel() for one in buffers])
    return (one.view(buffer.shape) for one, buffer in zip(equal, buffers, strict=True))


@torch.no_grad()
def _copy_from_leader(buffers: list[Tensor], timeout: timedelta) -> None:
    # One broadcast of all their bytes, whatever their types.
    raw = [one.detach().contiguous().reshape(-1).view(torch.uint8) for one in buffers]
    flat = torch.cat(raw)
    _wait(dist.broadcast(flat, src=LEADER, async_op=True), timeout)
    for one, its_bytes in zip(buffers, torch.split(flat, [len(part) for part in raw]), strict=True):
        # clone: a slice of the flat tensor need not be aligned for the buffer's type
        one.copy_(its_bytes.clone().view(one.dtype).view(one.shape))


def _wait(work: dist.Work | None, timeout: timedelta) -> None:
    if work is not None and not work.wait(timeout):
        raise RuntimeError(f"a rank did not take part within {timeout}")

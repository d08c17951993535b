"""What takes the snapshots of a rank, one at a time, in memory that it uses again."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal

import torch
from torch import nn

from distckpt.engine.arena import Arena
from distckpt.engine.copying import BLOCK_BYTES
from distckpt.engine.guard import Guard, Place
from distckpt.engine.memory import available_bytes
from distckpt.engine.plan import Name, Plan, starts
from distckpt.engine.snapshot import Staging
from distckpt.formats import Image

_log = logging.getLogger("distckpt")

Mode = Literal["auto", "eager", "lazy", "paranoid"]
MODES: tuple[Mode, ...] = ("auto", "eager", "lazy", "paranoid")

LEAST_ARENA_BYTES = 2 * BLOCK_BYTES
_SPARE = 0.8  # of the memory that is free: training needs some, too


class Stager:
    """Takes snapshots of one rank.

    Args:
        mode: ``"eager"``: training waits for the copy of everything. ``"lazy"``: only for that of what may change
            before the optimizer's next step, which waits for the rest. ``"auto"``: lazy, but where training itself
            uses all cores of the CPU, as there a copy beside it costs it more than one on all cores. ``"paranoid"``:
            lazy, and then every byte of it is compared with the tensor that it was copied from.
        arena_bytes: how much memory it may take; None: as much as the state. Where that is less than the state,
            training waits until all but so much is written.
        modules: whose ``load_state_dict`` waits for a copy that is under way.
    """

    def __init__(
        self, mode: Mode = "eager", *, arena_bytes: int | None = None, modules: Iterable[nn.Module] = ()
    ) -> None:
        self._mode = mode
        self._limit_bytes = arena_bytes
        self._modules = list(modules)
        self._guard = Guard(self.wait_staged)
        self._arena: Arena | None = None
        self._current: Staging | None = None
        self._suspects: set[Name] = set()

    def reserve(self, size_bytes: int, *, is_pinned: bool = False) -> None:
        """There is memory for a state of so many bytes, or for as much of it as fits; it is touched in the background.

        Raises:
            DistckptError: where the system gives none.
        """
        if self._arena is not None:
            if self._arena.size_bytes >= self._bounded(size_bytes):
                return
            self._arena.close()
            self._arena = None
        wanted = size_bytes + size_bytes // 100  # for texts that get longer
        if self._limit_bytes is None and wanted > _SPARE * available_bytes():
            self._limit_bytes = max(int(_SPARE * available_bytes()), LEAST_ARENA_BYTES)
            _log.warning(
                "a snapshot takes %.1f GB of host memory, and %.1f GB are free: it gets %.1f GB, and training waits "
                "for the rest to be written. arena_bytes= says otherwise",
                *(wanted / 1e9, available_bytes() / 1e9, self._limit_bytes / 1e9),
            )
        if self._limit_bytes is not None and wanted > self._limit_bytes:
            wanted = self._bounded(size_bytes)
        _log.info("snapshots take %.2f GB of host memory, of %.2f GB free", wanted / 1e9, available_bytes() / 1e9)
        self._arena = Arena(wanted, is_pinned=is_pinned)

    def take(self, images: Sequence[Image]) -> Staging:
        """The snapshot of these files; it is to be staged next, on this thread. The one before was released.

        Raises:
            DistckptError: where there is no memory for it.
        """
        total_bytes = starts(images)[-1]
        on_device = not all(tensor.is_cpu for image in images for tensor in image.tensors)
        self.reserve(total_bytes, is_pinned=on_device)
        assert self._arena is not None
        if total_bytes > self._arena.size_bytes:
            plan = Plan.in_order(images)
        elif self._is_lazy(on_device=on_device):
            plan = self._lazy_plan(images)
        else:
            plan = Plan.of(images, may_be_late=lambda *_: False)
        if on_device:
            self._arena.pin()
        self._current = Staging(images, plan, self._arena, self._suspects, is_paranoid=self._mode == "paranoid")
        return self._current

    def wait_staged(self) -> None:
        """Any tensor may be changed on return: none is being copied. To be called on the training thread."""
        if self._current is not None:
            self._current.let_change()
            self._guard.let_go()

    def close(self) -> None:
        """The memory is given back, and nobody waits for it any more; what was not written is given up. Safe to call
        twice."""
        self._guard.close()
        if self._current is not None:
            self._current.release()
        if self._arena is not None:
            self._arena.close()
        self._arena = self._current = None

    def _bounded(self, size_bytes: int) -> int:
        """How much memory a state of so many bytes may have: all that it needs, or so many blocks."""
        if self._limit_bytes is None or size_bytes <= self._limit_bytes:
            return size_bytes
        return max(self._limit_bytes // BLOCK_BYTES * BLOCK_BYTES, LEAST_ARENA_BYTES)

    def _is_lazy(self, *, on_device: bool) -> bool:
        if self._mode != "auto":
            return self._mode != "eager"
        return on_device or torch.get_num_threads() < len(os.sched_getaffinity(0))

    def _lazy_plan(self, images: Sequence[Image]) -> Plan:
        guarded = cache(self._guard.guarded)  # asked for once there is a tensor that is large enough

        def may_be_late(place: Place, image: Image, nth: int) -> bool:
            if self._suspects and Name(image.path, image.keys[nth]) in self._suspects:
                return False
            return place in guarded()

        plan = Plan.of(images, may_be_late=may_be_late)
        if plan.witnesses:
            self._guard.hold(self._modules)
        return plan

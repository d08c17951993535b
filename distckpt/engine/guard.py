"""Who waits before changing tensors that are still being copied."""

from __future__ import annotations

import os
import sys
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from distckpt.formats.shards import local_of

# Where a tensor lies: its address, and its size in bytes.
Place = tuple[int, int]


class Places:
    """Memory of tensors, and of parts of them.

    Attributes:
        whole: of each tensor.
    """

    def __init__(self, whole: set[Place]) -> None:
        self.whole = whole
        self._sorted: list[Place] = []  # not before somebody asks for a part

    def __contains__(self, place: Place) -> bool:
        if place in self.whole:
            return True
        if not self._sorted:
            self._sorted = sorted(self.whole)
        nth = bisect_right(self._sorted, (place[0], sys.maxsize)) - 1
        return nth >= 0 and place[0] + place[1] <= sum(self._sorted[nth])


class Guard:
    """Calls ``wait`` before any optimizer of this process takes a step, on the thread that takes it.

    The optimizers that did so once are known: what they alone change may be copied late. It also knows optimizers of
    other libraries, optimizers in a backward, under a GradScaler and under ``torch.compile``.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._held: list[RemovableHandle] = []
        seen, known, process = self._seen, weakref.WeakMethod(wait), os.getpid()

        def ask() -> None:
            # In a forked child there is no thread that copies, so nobody to wait for.
            if (told := known()) is not None and os.getpid() == process:
                told()

        def before_step(optimizer: Optimizer, *_: Any) -> None:
            seen.add(optimizer)
            ask()

        self._ask = ask
        self._handle = register_optimizer_step_pre_hook(before_step)
        self._end = weakref.finalize(self, self._handle.remove)

    def guarded(self) -> Places:
        """The memory that only the known optimizers change."""
        return Places(self._guarded())

    def _guarded(self) -> set[Place]:
        tensors: list[Tensor] = []
        for optimizer in tuple(self._seen):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.requires_grad:
                        tensors.append(parameter)
                    moments = optimizer.state.get(parameter)
                    if isinstance(moments, dict):  # some leave None for what another rank holds
                        tensors += [one for one in moments.values() if isinstance(one, Tensor)]
        try:
            return {(here.data_ptr(), here.nbytes) for here in map(local_of, tensors)}
        except RuntimeError:  # one has no memory of its own (sparse, nested): nobody copies that late
            return {place for tensor in tensors if (place := _place_of(local_of(tensor)))}

    def hold(self, modules: Iterable[nn.Module]) -> None:
        """``load_state_dict`` of these modules, and of any module in them, waits, too, until `let_go`. Not for ever:
        a module that is pickled meanwhile would need this library to be read. Those held before are let go."""
        self.let_go()
        for module in {id(one): one for root in modules for one in root.modules()}.values():
            if module._parameters:
                handle = module.register_load_state_dict_pre_hook(_WaitBeforeLoad(self._ask))  # type: ignore[no-untyped-call]  # torch's own
                self._held.append(handle)

    def let_go(self) -> None:
        """Modules do not wait any more."""
        for handle in self._held:
            handle.remove()
        self._held = []

    def close(self) -> None:
        """Nobody waits any more. Safe to call twice."""
        self.let_go()
        self._end()


def _place_of(tensor: Tensor) -> Place | None:
    try:
        return tensor.data_ptr(), tensor.nbytes
    except RuntimeError:
        return None


class _WaitBeforeLoad:
    # Restoring writes straight into the tensors of modules that have no hooks but this one.
    is_of_distckpt = True

    def __init__(self, ask: Callable[[], None] = lambda: None) -> None:
        self._ask = ask

    def __call__(self, *_: Any) -> None:
        self._ask()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _WaitBeforeLoad, ()  # for the copy of a module there is nothing to wait for

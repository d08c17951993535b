"""Copies from accelerators into page-locked host memory, beside what they compute."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Transfer:
    """Copies each second tensor into the first, on streams of its own, from `begin` on.

    Where an accelerator has no streams, `begin` ends with the copy.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._pairs: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for target, source in pairs:
            self._pairs.setdefault(source.device, []).append((target, source))
        self._events: dict[torch.device, Any] = {}
        self._beginning = threading.Lock()

    def begin(self) -> None:
        """What was asked of the accelerators so far comes first, what is asked of them next may run beside it."""
        with self._beginning:
            for device, pairs in self._pairs.items():
                self._begin(device, pairs)

    def hold_back(self) -> None:
        """What is asked of the accelerators next, on the streams of this thread, comes after the copy."""
        for device, event in self._events.items():
            torch.get_device_module(device).current_stream(device).wait_event(event)

    def wait(self) -> None:
        """All is copied."""
        for event in self._events.values():
            event.synchronize()

    def end(self) -> None:
        """No accelerator touches the memory any more, and none begins to."""
        with self._beginning:
            pairs, self._pairs = self._pairs, {}
        self.wait()
        del pairs  # not before, or others would be given the memory that is being read

    def _begin(self, device: torch.device, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        accelerator = torch.get_device_module(device)
        if not hasattr(accelerator, "Stream"):
            for target, source in pairs:
                target.copy_(source)
            return
        stream = accelerator.Stream(device)
        stream.wait_stream(accelerator.current_stream(device))
        with accelerator.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            event = accelerator.Event()
            event.record(stream)
        self._events[device] = event

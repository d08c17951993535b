"""An accelerator that there is not: it notes what it is asked for, in the order in which that would happen."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Accelerator:
    """What `torch.get_device_module` returns. Copies are done when they are asked for; a test says by `may_end` when
    the host learns that they are.

    Attributes:
        notes: ``"training after the copy"``: what the stream of training is asked for next waits for the copy.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.may_end = lambda: None
        note = self.notes.append
        accelerator = self

        class Stream:
            name = "side"

            def __init__(self, _: object = None) -> None:
                pass

            def wait_stream(self, other: Any) -> None:
                note(f"{self.name} after {other.name}")

            def wait_event(self, _: Any) -> None:
                note(f"{self.name} after the copy")

        class Event:
            def record(self, stream: Any) -> None:
                note(f"the copy on {stream.name}")

            def synchronize(self) -> None:
                accelerator.may_end()
                note("host after the copy")

        self.Stream, self.Event = Stream, Event
        self._current = Stream()
        self._current.name = "training"

    def current_stream(self, _: object) -> Any:
        return self._current

    def stream(self, _: Any) -> AbstractContextManager[Any]:
        return nullcontext()

"""The body of a step in `Checkpointer.steps`: what is reported and asked for there is of the step that ends with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Wishes(NamedTuple):
    """What a body said.

    Attributes:
        reported: the metrics of its step; ``None`` where there are none.
        asked: why its step is to be saved, and for each reason whether that is waited for.
    """

    reported: Mapping[str, float | None] | None
    asked: Mapping[str, bool]


class StepBody:
    """The body that runs, if one does.

    Attributes:
        is_open: whether a body began and did not end: it runs, or it was left or raised. What there is in memory then
            is no state of a step.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._is_left = False
        self._number = 0
        self._reported: dict[str, float | None] | None = None
        self._asked: dict[str, bool] = {}

    def begin(self, number: int) -> None:
        """That of step ``number`` runs."""
        self.is_open, self._number = True, number

    def leave(self) -> None:
        """It was left before its end."""
        self._is_left = True

    def end(self) -> Wishes:
        """There is none any more, and this is what was said in it."""
        said = Wishes(self._reported, self._asked)
        self.is_open = self._is_left = False
        self._reported, self._asked = None, {}
        return said

    def report(self, numbers: Mapping[str, float | None]) -> None:
        """These are metrics of its step."""
        self._reported = {**(self._reported or {}), **numbers}

    def ask(self, reason: str, *, wait: bool) -> None:
        """Its step is to be saved."""
        self._asked[reason] = wait or self._asked.get(reason, False)

    def require_whole(self) -> None:
        """What there is in memory is the state of a step, or will be when the body ends.

        Raises:
            RuntimeError: where the body was left.
        """
        if self._is_left:
            raise RuntimeError(f"{self.left_words()}: call step() if it is done after all, or resume()")

    def left_words(self) -> str:
        """What to say of it where it did not end."""
        return f"step {self._number} was left before its end, so what there is is no state of a step"

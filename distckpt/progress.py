"""How far training has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Progress:
    """What is done: ``step`` optimizer steps, and ``epoch`` whole passes over the data.

    Both count from the start of the run, not of the process, and both start at 0.
    """

    step: int
    epoch: int = 0

    def __post_init__(self) -> None:
        if self.step < 0 or self.epoch < 0:
            raise ValueError(f"progress cannot be negative: step {self.step}, epoch {self.epoch}")

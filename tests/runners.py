"""What the hook asks of a runner, in tests."""

from __future__ import annotations

from typing import Any


class Hub:
    """A message hub."""

    def __init__(self) -> None:
        self.runtime_info: dict[str, Any] = {}

    def update_info(self, key: str, value: Any) -> None:
        self.runtime_info[key] = value

    def state_dict(self) -> dict[str, Any]:
        return {"runtime_info": dict(self.runtime_info)}

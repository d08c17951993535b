"""What the tests of the engine share: stagers, late copies that stand still, and blocks that are small."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from distckpt import policy
from distckpt.engine import copying, snapshot, stager, writing
from distckpt.engine.snapshot import Staging
from distckpt.engine.stager import Stager

SMALL_BLOCK_BYTES = 64 * 1024
MOVE = copying.move


class Held:
    """The late copies of a process, none of which has begun yet.

    Attributes:
        go: they begin once it is set. What a barrier copies itself, it copies nevertheless.
        begun: how many threads of late copies were started.
    """

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = 0


class Paused:
    """A late copy that stands before its ``at``-th piece, counted from 0, until `go` is set.

    Attributes:
        reached: set where it stands there.
    """

    def __init__(self, at: int) -> None:
        self.at = at
        self.go = threading.Event()
        self.reached = threading.Event()
        self._moved = 0

    def move(self, target: int, source: int | bytes, count: int) -> None:
        if threading.current_thread().name == "distckpt-copy":
            if self._moved == self.at:
                self.reached.set()
                assert self.go.wait(60), "nobody let the late copy go on"
            self._moved += 1
        MOVE(target, source, count)


@pytest.fixture
def made() -> Iterator[Callable[..., Stager]]:
    """Makes stagers, and closes them in the end."""
    stagers: list[Stager] = []

    def make(*args: Any, **words: Any) -> Stager:
        stagers.append(Stager(*args, **words))
        return stagers[-1]

    yield make
    for one in stagers:
        one.close()


@pytest.fixture
def lazy(made: Callable[..., Stager]) -> Stager:
    return made("lazy")


@pytest.fixture
def eager(made: Callable[..., Stager]) -> Stager:
    return made("eager")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """No thread copies anything late before the test lets it, as if others had the cores."""
    copy_late = Staging._copy_late
    told = Held()

    def hold(staging: Staging) -> None:
        told.begun += 1
        assert told.go.wait(60), "nobody let the late copy go"
        copy_late(staging)

    monkeypatch.setattr(Staging, "_copy_late", hold)
    yield told
    told.go.set()


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Paused]]:
    """Late copies that are begun from now on stand still before a piece."""
    pauses: list[Paused] = []

    def pause(at: int) -> Paused:
        pauses.append(Paused(at))
        monkeypatch.setattr(copying, "move", pauses[-1].move)
        return pauses[-1]

    yield pause
    for one in pauses:
        one.go.set()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of so many bytes: a state of a few MB is too large for an arena of 2 MiB then, the least there is."""
    for module in (copying, snapshot, stager, writing):
        monkeypatch.setattr(module, "BLOCK_BYTES", SMALL_BLOCK_BYTES)
    for module in (stager, policy):
        monkeypatch.setattr(module, "LEAST_ARENA_BYTES", 2 * SMALL_BLOCK_BYTES)
    return SMALL_BLOCK_BYTES

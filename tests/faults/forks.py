"""Processes to be killed, forked cheaply from one that has imported everything and has the shim preloaded.

As a script it is that process: orders come in, a line of them at once; one child is forked for each; how they ended
goes out.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import shim
from shim import Fault, Kind

# No child does more than a few saves of a few kilobytes, unless it says so: one that is still there then hangs.
PATIENCE_SECONDS = 20

# What waits for a process that is lost costs nothing: other groups go on meanwhile.
_GROUPS_AT_ONCE = 8


@dataclass(frozen=True)
class Order:
    """``work(root, **arguments)`` in a child, with ``fault`` among its calls below ``root``.

    Attributes:
        trace: a new folder for a trace, one for all children that are given it.
        who: how it is called there.
    """

    work: Callable[..., object]
    root: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None
    kinds: Kind = Kind.CHANGES
    trace: Path | None = None
    who: int = 0
    patience_seconds: int = PATIENCE_SECONDS

    def told(self) -> dict[str, Any]:
        """It in JSON."""
        return {
            "work": [self.work.__module__, self.work.__name__],
            "root": str(self.root),
            "arguments": self.arguments,
            "fault": asdict(self.fault) if self.fault else None,
            "kinds": int(self.kinds),
            "trace": str(self.trace) if self.trace else None,
            "who": self.who,
            "patience_seconds": self.patience_seconds,
        }


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit code, or minus the signal; what it said; what it complained about."""

    code: int
    said: list[str]
    complained: str

    @property
    def was_killed(self) -> bool:
        return self.code == -signal.SIGKILL

    def last(self, word: str) -> int:
        """The number after ``word`` in the last sentence that begins so; 0 if there is none."""
        numbers = [int(line.split()[1]) for line in self.said if line.split()[:1] == [word]]
        return numbers[-1] if numbers else 0


class Forks:
    """Runs functions of modules that lie beside this one, each in a child of its own that may be killed."""

    def __init__(self, library: Path, *modules: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "LD_PRELOAD": str(library),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),  # it imports what the tests import
            },
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.communicate()

    def run(
        self,
        work: Callable[..., object],
        root: Path,
        *,
        fault: Fault | None = None,
        kinds: Kind = Kind.CHANGES,
        trace: Path | None = None,
        patience_seconds: int = PATIENCE_SECONDS,
        **arguments: Any,
    ) -> Outcome:
        """``work(root, **arguments)`` in a child, with ``fault`` among its calls below ``root``."""
        order = Order(work, root, arguments, fault, kinds, trace, patience_seconds=patience_seconds)
        return self.run_groups([[order]])[0][0]

    def run_groups(self, groups: Sequence[Sequence[Order]]) -> list[list[Outcome]]:
        """How the children of each group ended, which ran at the same time, as some of the groups did."""
        assert self._server.stdin and self._server.stdout
        for trace in {order.trace for group in groups for order in group if order.trace}:
            trace.mkdir()
        print(json.dumps([[order.told() for order in group] for group in groups]), file=self._server.stdin, flush=True)
        told = json.loads(self._server.stdout.readline())
        return [[Outcome(**one) for one in group] for group in told]


def _serve(modules: list[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # what is never collected is never written to, and so never copied for a child
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(_run_groups(json.loads(line))), file=answers, flush=True)


def _run_groups(groups: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    outcomes = [[{}] * len(group) for group in groups]
    waiting = deque(enumerate(groups))
    running: dict[int, _Child] = {}
    while waiting or running:
        while waiting and len({child.group for child in running.values()}) < _GROUPS_AT_ONCE:
            number, group = waiting.popleft()
            for nth, order in enumerate(group):
                child = _Child(number, nth)
                running[child.start(order)] = child
        pid, status = os.wait()
        child = running.pop(pid)
        outcomes[child.group][child.nth] = child.outcome(os.waitstatus_to_exitcode(status))
    return outcomes


class _Child:
    """The ``nth`` of a group."""

    def __init__(self, group: int, nth: int) -> None:
        self.group = group
        self.nth = nth
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with its outcome
        self._complained: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115

    def start(self, order: dict[str, Any]) -> int:
        pid = os.fork()
        if pid == 0:
            _obey(order, self._said.fileno(), self._complained.fileno())
        return pid

    def outcome(self, code: int) -> dict[str, Any]:
        with self._said as said, self._complained as complained:
            said.seek(0)
            complained.seek(0)
            return asdict(Outcome(code, said.read().decode().splitlines(), complained.read().decode()))


def _obey(order: dict[str, Any], said: int, complained: int) -> None:
    code = 1
    try:
        signal.alarm(order["patience_seconds"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(said, 1)
        os.dup2(complained, 2)
        module, name = order["work"]
        work = getattr(importlib.import_module(module), name)
        root = Path(order["root"])
        shim.watch(root, Kind(order["kinds"]), Path(order["trace"]) if order["trace"] else None, order["who"])
        shim.arm(Fault(**order["fault"]) if order["fault"] else None)
        work(root, **order["arguments"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Not sys.exit: what the parent had open is not this child's to flush.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1:])

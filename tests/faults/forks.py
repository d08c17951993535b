"""Processes to be killed, forked cheaply from one that has imported everything and has the shim preloaded.

As a script it is that process: one order per line comes in, one child is forked for it, how it ended goes out.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import shim
from shim import Fault, Kind

# No child does more than a few saves of a few kilobytes, unless it says so: one that is still there then hangs.
PATIENCE_SECONDS = 20


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
        order = {
            "work": [work.__module__, work.__name__],
            "root": str(root),
            "fault": asdict(fault) if fault else None,
            "kinds": int(kinds),
            "trace": str(trace) if trace else None,
            "patience_seconds": patience_seconds,
            "arguments": arguments,
        }
        assert self._server.stdin and self._server.stdout
        print(json.dumps(order), file=self._server.stdin, flush=True)
        return Outcome(**json.loads(self._server.stdout.readline()))


def _serve(modules: list[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # what is never collected is never written to, and so never copied for a child
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
            child = os.fork()
            if child == 0:
                _obey(order, said.fileno(), complained.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said.seek(0)
            complained.seek(0)
            outcome = Outcome(code, said.read().decode().splitlines(), complained.read().decode())
        print(json.dumps(asdict(outcome)), file=answers, flush=True)


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
        shim.watch(root, Kind(order["kinds"]), Path(order["trace"]) if order["trace"] else None)
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

"""The face of shim.c: built from here, armed from within the process it is preloaded into, its trace read back."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")


class Kind(IntFlag):
    """Which calls are numbered: those that change what is on disk, those that look at it."""

    CHANGES = 1
    READS = 2


class Action(IntEnum):
    """What the chosen call suffers."""

    NOTHING = 0
    KILL = 1  # SIGKILL before it
    KILL_HALFWAY = 2  # SIGKILL when half of its bytes are written
    FAIL = 3
    FAIL_FROM_HERE = 4  # this call and every later one that needs space: the disk is full
    SHORTEN = 5  # half of the bytes, which is not an error
    PAUSE = 6  # it happens so many milliseconds later as ``error`` says


@dataclass(frozen=True)
class Fault:
    """The ``call``-th call of the process, counted from 1, suffers ``action``."""

    call: int
    action: Action
    error: int = 0


@dataclass(frozen=True)
class Call:
    """One call as it happened. ``error`` is its errno, 0 for success; paths are relative to the root.

    ``number`` 0 is no call but a note: a word of the process, in ``path``. ``who`` made it, where several processes
    have one trace.
    """

    number: int
    name: str
    error: int
    inode: int
    path: str
    other: str
    offset: int
    length: int
    content: bytes
    who: int = 0

    def __str__(self) -> str:
        to = f" {self.other}" if self.other else ""
        return f"{self.name} {self.path}{to}" + (f" = {os.strerror(self.error)}" if self.error else "")


def build(folder: Path) -> Path:
    """The shared library, compiled into ``folder``.

    Raises:
        RuntimeError: where there is no C compiler, or it refuses; the fault tests cannot run then.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise RuntimeError("the fault tests need a C compiler named cc on the PATH (Debian: apt-get install gcc)")
    target = folder / "shim.so"
    flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra"]
    command = [compiler, *flags, "-o", str(target), str(SOURCE), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{compiler} cannot build {SOURCE.name}:\n{done.stderr}")
    return target


def watch(root: Path, kinds: Kind = Kind.CHANGES, trace: Path | None = None, who: int = 0) -> None:
    """Number the calls below ``root`` from here on, and write them to the folder ``trace`` if it is given.

    Processes that write to one trace are called ``who`` there, and make their calls one after the other.
    """
    if _preloaded().fault_watch(os.fsencode(root), int(kinds), os.fsencode(trace) if trace else None, who):
        raise OSError(f"the shim cannot watch {root}")


def arm(fault: Fault | None) -> None:
    """The fault will happen; ``None`` takes it back."""
    fault = fault or Fault(0, Action.NOTHING)
    _preloaded().fault_arm(fault.call, int(fault.action), fault.error)


def say(words: str) -> None:
    """Tell it to the test, and to the trace between the calls that have been and those to come."""
    os.write(1, f"{words}\n".encode())
    _preloaded().fault_note(words.encode())


def read_trace(folder: Path) -> list[Call]:
    """The calls in the order in which they happened."""
    content = (folder / "content").read_bytes()
    calls = []
    for line in (folder / "calls").read_text().splitlines():
        who, number, name, error, inode, path, other, offset, length = line.split("\t")
        wrote = int(length) if name == "write" and error == "0" else 0
        piece, content = content[:wrote], content[wrote:]
        place = int(offset), int(length)
        calls.append(Call(int(number), name, int(error), int(inode), path, other, *place, piece, int(who)))
    return calls


def kills(calls: list[Call]) -> list[Fault]:
    """Every moment at which a process that makes these calls can be killed: before each, and within each write."""
    numbered = [call for call in calls if call.number]
    before = [Fault(call.number, Action.KILL) for call in numbered]
    return before + [Fault(call.number, Action.KILL_HALFWAY) for call in numbered if call.name == "write"]


def _preloaded() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.fault_arm.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]
    library.fault_watch.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    library.fault_note.argtypes = [ctypes.c_char_p]
    return library

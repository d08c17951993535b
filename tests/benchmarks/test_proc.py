"""What the benchmarks read of processes: the work of children counts, that of others is told apart."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import proc

# Says so when it is done, and stays until it is told to end.
BUSY = """
import time
end = time.process_time() + 0.6
while time.process_time() < end: sum(range(1_000_000))  # in user mode: to look at the clock is not
held = bytearray(64_000_000)
print("done", flush=True)
input()
"""


@contextmanager
def busy_child() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout and child.stdin
        assert child.stdout.readline() == "done\n"
        yield child
        child.stdin.write("\n")


def test_what_a_child_computed_counts_while_it_lives_and_after() -> None:
    before = proc.used()
    with busy_child() as child:
        assert child.pid in proc.children()
        living = proc.used().since(before).cpu_seconds
    ended = proc.used().since(before).cpu_seconds
    assert child.pid not in proc.children()
    assert 0.5 < living <= ended + 0.02


def test_what_a_child_computed_is_not_foreign() -> None:
    before, foreign_before = machine_seconds(), proc.used()
    with busy_child():
        foreign = proc.used().since(foreign_before).foreign_seconds
        total = machine_seconds() - before
    assert foreign < total - 0.2


def machine_seconds() -> float:
    """What all processes used in user mode, and what was given to other machines."""
    user, nice, *others = map(int, Path("/proc/stat").read_text().split(maxsplit=10)[1:10])
    return (user + nice + others[5]) / os.sysconf("SC_CLK_TCK")


def test_memory_of_a_child_counts_but_not_what_it_shares() -> None:
    before = proc.held_bytes()
    proc.forget_peak()
    with busy_child():
        assert 60e6 < proc.held_bytes() - before < 100e6
        assert 60e6 < proc.peak_memory_bytes() - before < 110e6


def test_the_peak_stays_after_the_memory_was_given_back() -> None:
    before = proc.resident_bytes()
    proc.forget_peak()
    proc.touch(64 << 20)
    assert proc.peak_memory_bytes() - before >= 60e6
    proc.forget_peak()
    assert proc.peak_memory_bytes() - before < 30e6

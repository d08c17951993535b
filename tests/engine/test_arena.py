"""The arena is memory on huge pages that was used before it is needed, and goes when nobody needs it."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from engine.trainings import Background

from distckpt.engine import arena as arenas
from distckpt.engine.arena import Arena
from distckpt.errors import DistckptError

pytestmark = pytest.mark.timeout(60)

MIB = 1024 * 1024
HUGE = 2 * MIB


def mapping_at(address: int, process: str = "self") -> dict[str, str]:
    """What the system says of the mapping that holds ``address``; nothing where there is none."""
    found: dict[str, str] = {}
    is_there = False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if (bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            is_there = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif is_there:
            name, _, value = line.partition(":")
            found[name] = value.strip()
    return found


def resident_bytes(address: int) -> int:
    return int(mapping_at(address)["Rss"].split()[0]) * 1024


@pytest.mark.parametrize(("asked", "got"), [(0, 0), (1, HUGE), (HUGE, HUGE), (5 * MIB, 3 * HUGE)])
def test_it_is_as_large_as_asked_and_begins_on_a_huge_page(asked, got):
    arena = Arena(asked)
    assert arena.size_bytes == arena.memory.nbytes == got
    assert not got or (arena.memory.data_ptr() == arena.address and arena.address % HUGE == 0)
    arena.close()


def test_the_whole_of_it_can_be_used():
    arena = Arena(3 * HUGE)
    arena.memory.random_(0, 256, generator=torch.Generator().manual_seed(0))
    expected = torch.empty(3 * HUGE, dtype=torch.uint8).random_(0, 256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(arena.memory, expected)
    arena.close()


def test_it_asks_for_huge_pages():
    arena = Arena(HUGE)
    assert "hg" in mapping_at(arena.address)["VmFlags"].split()
    arena.close()


def test_it_was_touched_before_anybody_uses_it():
    arena = Arena(16 * HUGE)
    arena.wait_touched()
    assert resident_bytes(arena.address) >= 16 * HUGE
    arena.close()


def test_threads_run_while_it_is_touched(monkeypatch):
    """Had they to wait for the GIL, as with mmap.madvise, they would get 5 ms of it between two calls."""
    advise = arenas._advise
    spent = 0.0

    def timed(address: int, count: int, advice: int) -> bool:
        nonlocal spent
        began = time.thread_time()
        is_done = advise(address, count, advice)
        spent += time.thread_time() - began
        return is_done

    monkeypatch.setattr(arenas, "_advise", timed)
    arena = Arena(256 * MIB)
    began = time.thread_time()
    while arena._toucher.is_alive():
        pass
    assert time.thread_time() - began > 0.5 * spent
    arena.close()


def test_more_than_there_can_be_is_refused_with_a_way_out():
    with pytest.raises(DistckptError, match=r"needs 4611686018427 MB of host memory, .* arena_bytes=1_000_000_000$"):
        Arena(1 << 62)


def test_more_than_the_system_gives_is_refused(run_ranks):
    def work(_: int) -> str:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 512 * MIB, resource.RLIM_INFINITY))
        Arena(64 * MIB).close()
        with pytest.raises(DistckptError, match="needs 1074 MB of host memory, which the system does not give") as told:
            Arena(1024 * MIB)
        return type(told.value.__cause__).__name__

    assert run_ranks(1, work) == ["OSError"]


def test_a_kernel_that_cannot_touch_it_leaves_that_to_the_first_save(monkeypatch):
    monkeypatch.setattr(arenas, "_POPULATE_WRITE", 99)
    arena = Arena(HUGE)
    arena.wait_touched()
    arena.memory.fill_(7)
    assert bool((arena.memory == 7).all())
    arena.close()


# Its end


def test_it_is_given_back_once_nothing_refers_to_it():
    arena = Arena(4 * HUGE)
    arena.wait_touched()
    address, writing = arena.address, arena.memory[HUGE:]
    arena.close()
    assert resident_bytes(address) >= 4 * HUGE, "somebody still writes from it"
    writing.fill_(1)
    del writing
    assert int(mapping_at(address).get("Rss", "0").split()[0]) == 0
    assert arena.size_bytes == arena.memory.nbytes == 0


def test_it_can_be_closed_twice():
    arena = Arena(HUGE)
    arena.close()
    arena.close()


def test_who_closes_it_waits_for_one_step_of_its_touching_and_not_for_all(monkeypatch):
    monkeypatch.setattr(arenas, "_STEP_BYTES", HUGE)
    touched: list[int] = []
    is_begun, may_go_on = threading.Event(), threading.Event()

    def advise(address: int, count: int, advice: int) -> bool:
        if advice == arenas._POPULATE_WRITE:
            touched.append(address)
            is_begun.set()
            assert may_go_on.wait(20)
        return True

    monkeypatch.setattr(arenas, "_advise", advise)
    arena = Arena(100 * HUGE)
    assert is_begun.wait(20)
    closing = Background(arena.close)
    arena._is_wanted.clear()  # as close does first
    may_go_on.set()
    closing.result()
    assert len(touched) == 1


def test_one_that_nobody_closed_ends_too():
    arena = Arena(4 * HUGE)
    address, toucher, known = arena.address, arena._toucher, weakref.ref(arena)
    del arena
    toucher.join(20)
    gc.collect()
    assert known() is None
    assert int(mapping_at(address).get("Rss", "0").split()[0]) == 0


def test_a_forked_child_neither_has_it_nor_makes_it_cost_twice():
    """As workers of data loaders live on, each page that a save writes would be copied for them."""
    arena = Arena(16 * HUGE)
    arena.wait_touched()
    arena.memory.fill_(7)
    ends, told = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.write(told[1], bytes(ctypes.string_at(arena.address, 1)))
        os.read(ends[0], 1)
        os._exit(0)
    try:
        assert os.read(told[0], 1) == b"\0"
        arena.memory.fill_(8)
        assert int(mapping_at(arena.address, str(child))["Rss"].split()[0]) <= 4
    finally:
        os.write(ends[1], b".")
        os.waitpid(child, 0)
    arena.close()

"""All snapshots of a rank lie in one memory, one after another, also where that is less than the state."""

from __future__ import annotations

import errno
import logging
import os
import threading
import weakref
from typing import Any

import pytest
import torch
from engine.trainings import Background, Minded, Save, spelled, state_of
from torch.multiprocessing.reductions import StorageWeakRef

from distckpt.engine import plan as plans
from distckpt.engine import stager as stagers
from distckpt.engine.arena import Arena
from distckpt.errors import DistckptError

pytestmark = pytest.mark.timeout(60)

MIB = 1024 * 1024


def test_each_snapshot_takes_the_memory_of_the_one_before(eager, tmp_path):
    arenas = []
    for value in range(3):
        save = Save(eager, state_of(value), tmp_path)
        assert spelled(save.saved()) == spelled(save.cut)
        arenas.append(eager._arena)
    assert arenas[0] is arenas[1] is arenas[2]


def test_a_state_that_grows_gets_more_memory_and_one_that_shrinks_keeps_it(eager, tmp_path):
    sizes = []
    for mebibytes in (1, 5, 3, 5, 9):
        save = Save(eager, state_of(0, mebibytes), tmp_path)
        assert spelled(save.saved()) == spelled(save.cut)
        sizes.append(eager._arena.size_bytes // MIB)
    assert sizes == [2, 6, 6, 6, 10]


def test_what_was_reserved_is_what_is_used(eager, tmp_path):
    eager.reserve(4 * MIB)
    arena = eager._arena
    Save(eager, state_of(0, 3), tmp_path).saved()
    assert eager._arena is arena and arena.size_bytes <= 6 * MIB


def test_old_memory_is_given_back_before_more_is_taken(eager, tmp_path, monkeypatch):
    save = Save(eager, state_of(0, 3), tmp_path)
    save.write()
    memory = StorageWeakRef(eager._arena.memory.untyped_storage())
    is_gone = []
    monkeypatch.setattr(
        stagers, "Arena", lambda *args, **words: is_gone.append(memory.expired()) or Arena(*args, **words)
    )
    Save(eager, state_of(0, 30), tmp_path).write()
    assert is_gone == [True] and save.staged is not None


@pytest.mark.parametrize("arena_bytes", [33_554_432, 40_000_000, 50_331_647])
def test_a_bound_that_is_no_number_of_blocks_is_one_arena_all_the_same(arena_bytes, made):
    stager = made(arena_bytes=arena_bytes)
    stager.reserve(90_000_000)
    arena = stager._arena
    stager.reserve(90_000_000)
    assert stager._arena is arena and arena.size_bytes == 33_554_432


def test_an_arena_that_is_bounded_is_one_for_all_saves(made, small_blocks, tmp_path):
    stager = made(arena_bytes=2 * MIB)
    stager.reserve(9 * MIB)
    arena = stager._arena
    for value in range(3):
        save = Save(stager, state_of(value, 9), tmp_path, is_written=True)
        assert spelled(save.saved()) == spelled(save.cut)
        assert stager._arena is arena
    assert arena.size_bytes == 2 * MIB


def test_a_state_that_fits_is_not_taken_by_pieces(made, small_blocks, tmp_path):
    total_bytes = Save(made(), state_of(0, 4), tmp_path).staged._plan.starts[-1]
    stager = made(arena_bytes=total_bytes)
    save = Save(stager, state_of(0, 4), tmp_path, is_written=True)
    assert stager._arena.size_bytes >= total_bytes
    assert spelled(save.saved()) == spelled(save.cut)


def test_a_stager_has_a_word_for_how_much_memory_it_takes(made, caplog):
    caplog.set_level(logging.INFO, logger="distckpt")
    made().reserve(3_000_000_000)
    assert "snapshots take 3.03 GB of host memory" in caplog.text


def test_where_little_memory_is_free_it_takes_less_and_says_so(made, small_blocks, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(stagers, "available_bytes", lambda: 5 * MIB)
    stager = made("lazy")
    for value in range(2):
        save = Save(stager, state_of(value, 9), tmp_path, is_written=True)
        assert spelled(save.saved()) == spelled(save.cut)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and stager._arena.size_bytes == 4 * MIB
    assert record.getMessage() == (
        "a snapshot takes 0.0 GB of host memory, and 0.0 GB are free: it gets 0.0 GB, and training waits for the rest "
        "to be written. arena_bytes= says otherwise"
    )


def test_where_there_is_no_memory_at_all_nothing_is_taken_and_training_goes_on(made, tmp_path, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise DistckptError("no memory")

    stager = made()
    with monkeypatch.context() as patched:
        patched.setattr(stagers, "Arena", refused)
        pytest.raises(DistckptError, Save, stager, state_of(0), tmp_path)
    save = Save(stager, state_of(1), tmp_path)
    assert spelled(save.saved()) == spelled(save.cut)


def test_by_pieces_no_copy_of_a_tensor_outlives_its_last_piece(made, small_blocks, tmp_path, monkeypatch):
    class Seen(plans._Contiguous):
        alive: weakref.WeakSet[Any] = weakref.WeakSet()

        def __init__(self, tensor: torch.Tensor) -> None:
            super().__init__(tensor)
            self.alive.add(self)

    counts: list[int] = []
    monkeypatch.setattr(plans, "_Contiguous", Seen)
    store = Minded(tmp_path, lambda _: counts.append(len(Seen.alive)))
    turned = {str(nth): torch.rand(512, 512).t() for nth in range(6)}
    save = Save(made(arena_bytes=2 * MIB), {"model": turned}, tmp_path, store=store, is_written=True)
    assert spelled(save.saved()) == spelled(save.cut)
    # When the first piece is written, as much of the second may be copied as the arena holds.
    assert counts[0] > 0 and counts[-1] == 0


# A writer that is slow, or fails


def test_training_waits_until_all_but_the_arena_is_written(made, small_blocks, tmp_path):
    is_asked, may_write = threading.Event(), threading.Event()

    def before_write(nth: int) -> None:
        is_asked.set()
        assert nth or may_write.wait(20)

    stager, store = made(arena_bytes=2 * MIB), Minded(tmp_path, before_write)
    staging = Background(lambda: Save(stager, state_of(0, 9), tmp_path, store=store, is_written=True))
    assert is_asked.wait(20) and not staging.ended(0.1)
    may_write.set()
    save = staging.result()
    assert spelled(save.saved()) == spelled(save.cut)


@pytest.mark.parametrize("at", [0, 1, 40, 143])
def test_a_disk_that_fills_lets_a_training_go_that_waits_for_it(at, made, small_blocks, tmp_path):
    def before_write(nth: int) -> None:
        if nth == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stager, store = made(arena_bytes=2 * MIB), Minded(tmp_path, before_write)
    save = Save(stager, state_of(0, 9), tmp_path, store=store, is_written=True)
    with pytest.raises(OSError, match="No space left"):
        save.write()
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    following = Save(stager, state_of(1, 9), tmp_path, is_written=True)
    assert spelled(following.saved()) == spelled(following.cut)


@pytest.mark.parametrize("failure", [SystemExit, KeyboardInterrupt, MemoryError])
def test_a_writer_that_dies_lets_a_training_go_that_waits_for_it(failure, made, small_blocks, tmp_path):
    def before_write(nth: int) -> None:
        if nth == 3:
            raise failure

    stager = made(arena_bytes=2 * MIB)
    save = Save(stager, state_of(0, 9), tmp_path, store=Minded(tmp_path, before_write), is_written=True)
    pytest.raises(failure, save.write)

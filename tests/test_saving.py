"""A save is committed by all ranks, or fails on all of them with the same words, and costs nothing that was there."""

from __future__ import annotations

import errno
from datetime import timedelta

import pytest
import torch
from flows import Saves, state_of

from distckpt.catalog import scan
from distckpt.errors import RankFailure, SaveFailed
from distckpt.formats import Snapshot
from distckpt.formats.full import Full
from distckpt.formats.sharded import Sharded
from distckpt.manifest import Record
from distckpt.restoring import Restored
from distckpt.testing import FaultyStore


def committed(saves: Saves) -> list[str]:
    return [record.name for record in scan(saves.catalog.store).records]


@pytest.mark.parametrize("make_format", [Full, Sharded])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_holds_the_record_of_what_is_committed(tmp_path, world_size, make_format):
    saves = Saves(tmp_path / "run", world_size, make_format=make_format)
    told = saves.save(7)
    assert all(isinstance(record, Record) and record == told[0] for record in told)
    assert told[0].world_size == world_size and committed(saves) == ["step-00000007"]
    assert (tmp_path / "run" / "step-00000007" / f"rank-{world_size - 1:05d}.json").exists()


def operations(tmp_path, rank: int, make_format) -> list[str]:
    saves = Saves(tmp_path / "counted", 2, make_format=make_format)
    saves.save(1)
    saves.stores[rank] = counted = FaultyStore(saves.stores[rank])
    saves.save(2)
    return counted.operations


@pytest.mark.parametrize("make_format", [Full, Sharded])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_at_any_operation_fails_on_all_ranks_and_costs_nothing(tmp_path, rank, code, make_format):
    for nth, operation in enumerate(operations(tmp_path, rank, make_format)):
        saves = Saves(tmp_path / f"fault-{nth}", 2, make_format=make_format)
        saves.save(1)
        good = saves.stores[rank]
        saves.stores[rank] = FaultyStore(good, fail_at=nth, error=OSError(code, "the disk said no", operation))
        told = saves.save(2)
        assert [type(one) for one in told] == [SaveFailed] * 2, operation
        assert str(told[0]) == str(told[1]) and f"rank {rank}" in str(told[0]) and operation in str(told[0])
        restored = saves.restore()[1 - rank]
        assert isinstance(restored, Restored) and restored.record.progress.step == 1, operation
        saves.stores[rank] = good
        assert all(isinstance(one, Record) for one in saves.save(2)), operation
        saves.catalog.sweep()
        left = [name for name in saves.catalog.store.list() if not name.startswith(".attempt")]
        assert len([name for name in left if name.startswith("step-")]) == 4, (operation, left)
        assert not [name for name in left if name.startswith((".draft", ".trash"))], (operation, left)


@pytest.mark.parametrize("rank", [0, 2])
def test_an_error_in_the_state_of_one_rank_is_raised_on_all_with_its_words(tmp_path, rank):
    def take(mine: int) -> Snapshot:
        if mine == rank:
            raise ValueError("the EMA has no state yet")
        return Snapshot(state_of(1))

    saves = Saves(tmp_path / "run", 3)
    told = saves.save(1, snapshot=take)
    assert [type(one) for one in told] == [SaveFailed] * 3
    assert {str(one) for one in told} == {
        f"save of step 1 (snapshot) failed: rank {rank}: ValueError: the EMA has no state yet"
    }
    assert committed(saves) == []


def test_state_that_needs_a_pickle_is_refused_by_its_place(tmp_path):
    saves = Saves(tmp_path / "run", 2)
    told = saves.save(1, snapshot=lambda rank: Snapshot({"ema": {"decay": lambda step: 0.9}}))
    assert all(isinstance(one, SaveFailed) and "ema.decay is a" in str(one) for one in told)
    assert committed(saves) == [] and list((tmp_path / "run").glob("step-*")) == []


def test_a_rank_that_never_comes_is_named_within_the_deadline(tmp_path):
    saves = Saves(tmp_path / "run", 3, timeout=timedelta(seconds=0.3))
    told = saves.save(1, absent=[2])
    assert all(isinstance(one, SaveFailed) and list(one.failures) == [2] for one in told[:2])
    assert committed(saves) == []


def test_a_step_that_is_saved_again_has_a_folder_of_its_own(tmp_path):
    saves = Saves(tmp_path / "run", 1)
    first, second = saves.save(3)[0], saves.save(3)[0]
    assert [first.name, second.name] == ["step-00000003", "step-00000003.2"]
    assert committed(saves) == ["step-00000003", "step-00000003.2"]


# What the ranks have agreed on


def states(*names: str, has_stepped: bool = True) -> Snapshot:
    model = {name: torch.arange(4.0) for name in names}
    moments = {name: {"exp_avg": torch.ones(4)} for name in names} if has_stepped else {}
    return Snapshot({"model": model, "optim": {"state": moments, "param_groups": [{"params": list(names)}]}}, {})


def are_due(saves: Saves) -> list[bool]:
    return [format.planner.is_due for format in saves.formats]


def test_ranks_agree_once_and_anew_where_the_state_of_one_became_another(tmp_path):
    saves = Saves(tmp_path / "run", 3, make_format=Sharded)
    assert are_due(saves) == [True] * 3
    saves.save(1, snapshot=lambda rank: states("a"))
    assert are_due(saves) == [False] * 3
    saves.save(2, snapshot=lambda rank: states("a", *(["b"] if rank == 1 else [])))
    assert are_due(saves) == [True] * 3
    assert list(saves.restore()[0].fitted.snapshot.shared["model"]) == ["a", "b"]
    saves.save(3, snapshot=lambda rank: states("a", *(["b"] if rank == 1 else [])))
    assert are_due(saves) == [False] * 3


def test_ranks_agree_anew_as_long_as_an_optimizer_has_no_state(tmp_path):
    saves = Saves(tmp_path / "run", 2, make_format=Sharded)
    saves.save(1, snapshot=lambda rank: states("a", has_stepped=False))
    assert are_due(saves) == [True] * 2
    saves.save(2, snapshot=lambda rank: states("a"))
    assert are_due(saves) == [False] * 2


def test_an_optimizer_that_never_has_any_state_is_waited_for_once(tmp_path):
    saves = Saves(tmp_path / "run", 2, make_format=Sharded)
    for step in (1, 2):
        saves.save(step, snapshot=lambda rank: states("a", has_stepped=False))
    assert are_due(saves) == [False] * 2


def test_ranks_agree_anew_after_a_save_that_failed(tmp_path):
    saves = Saves(tmp_path / "run", 2, make_format=Sharded)
    saves.save(1)
    good, saves.stores[1] = saves.stores[1], FaultyStore(saves.stores[1], fail_at=0)
    assert all(isinstance(one, SaveFailed) for one in saves.save(2))
    assert are_due(saves) == [True] * 2
    saves.stores[1] = good
    assert all(isinstance(one, Record) for one in saves.save(3)) and are_due(saves) == [False] * 2


def test_a_state_that_ranks_do_not_hold_alike_is_refused_on_all_of_them_and_nothing_is_written(tmp_path):
    saves = Saves(tmp_path / "run", 2, make_format=Sharded)
    told = saves.save(1, snapshot=lambda rank: Snapshot({"model": {"a": torch.zeros(3 + rank)}}, {}))
    assert {type(one) for one in told} == {RankFailure}
    assert str(told[0]) == str(told[1]) and "'model.a' is not the same on all ranks" in str(told[0])
    assert committed(saves) == [] and not [name for name in saves.catalog.store.list() if name.startswith("step-")]

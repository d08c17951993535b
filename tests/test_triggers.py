"""Why a save is due: the schedule, the clock, or somebody who asked by a control file."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from distckpt.agreeing import Request, Requests
from distckpt.progress import Progress
from distckpt.ranks import Ranks, Solo
from distckpt.schedule import Schedule
from distckpt.stores.local import LocalStore
from distckpt.testing import on_threads, thread_ranks
from distckpt.triggers import Triggers

SOON = timedelta(seconds=5)


class Wanted:
    """What triggers need of a run."""

    def __init__(self, root: Path, ranks: Ranks | None = None) -> None:
        self.store = LocalStore(root)
        self.ranks = ranks or Solo()
        self.requests = Requests(self.ranks, SOON)

    def boundary(self, step: int) -> list[Request]:
        return self.requests.due(step)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    run = Wanted(tmp_path)
    yield run
    run.requests.close()


def due_at(triggers: Triggers, steps: range, epoch_steps: int = 10**9) -> dict[int, list[str]]:
    told = {
        step: triggers.due(Progress(step, step // epoch_steps), epoch_ends=step % epoch_steps == 0) for step in steps
    }
    return {step: why for step, why in told.items() if why}


def test_a_schedule_of_steps_is_due_at_its_steps(run):
    triggers = Triggers(Schedule.parse([3, 5], begin=1), run, by_epoch=False)
    assert due_at(triggers, range(1, 10)) == {step: ["interval"] for step in (1, 4, 6, 7)}


def test_a_schedule_of_epochs_is_due_where_an_epoch_ends(run):
    triggers = Triggers(Schedule.parse(2), run, by_epoch=True)
    assert due_at(triggers, range(1, 21), epoch_steps=4) == {8: ["interval"], 16: ["interval"]}


@pytest.mark.parametrize("by_epoch", [False, True])
def test_a_schedule_is_due_where_its_step_or_epoch_was_passed_since_the_last_time(run, by_epoch):
    triggers = Triggers(Schedule.parse(4), run, by_epoch=by_epoch)
    due, before = [], Progress(0)
    for count in (3, 6, 7, 10, 13):
        progress = Progress(count, count)
        if triggers.due(progress, epoch_ends=True, before=before):
            due.append(count)
        before = progress
    assert due == [6, 10, 13]


def test_a_period_is_due_at_the_first_step_after_it_and_begins_anew(run, clock):
    triggers = Triggers(Schedule.parse("10s"), run, by_epoch=False)
    due = []
    for step in range(1, 40):
        clock.now += 1
        due += due_at(triggers, range(step, step + 1))
    assert due == [10, 20, 30]


def test_a_save_for_another_reason_begins_the_period_anew(run, clock):
    triggers = Triggers(Schedule.parse(["10s", 7]), run, by_epoch=False)
    due = {}
    for step in range(1, 30):
        clock.now += 1
        due |= (told := due_at(triggers, range(step, step + 1)))
        if told:
            triggers.restart()
    assert list(due) == [7, 14, 21, 28]


@pytest.mark.parametrize(("name", "why"), [("SAVE", "asked"), ("STOP", "stop")])
def test_a_control_file_is_obeyed_within_a_second_and_removed(run, clock, tmp_path, name, why):
    triggers = Triggers(Schedule.parse(-1), run, by_epoch=False)
    (tmp_path / name).touch()
    assert due_at(triggers, range(1, 4)) == {}, "no look at the directory at each step"
    clock.now += 1
    assert due_at(triggers, range(4, 8)) == {4: [why]}
    assert not (tmp_path / name).exists()
    assert triggers.should_stop is (name == "STOP")
    clock.now += 1
    assert due_at(triggers, range(8, 10)) == {}


def test_both_control_files_and_the_schedule_may_be_due_at_once(run, clock, tmp_path):
    triggers = Triggers(Schedule.parse(4), run, by_epoch=False)
    clock.now += 1
    (tmp_path / "SAVE").touch()
    (tmp_path / "STOP").touch()
    assert due_at(triggers, range(4, 5)) == {4: ["interval", "asked", "stop"]}


def test_a_control_file_that_cannot_be_removed_is_warned_of_and_not_obeyed(run, clock, tmp_path, caplog):
    triggers = Triggers(Schedule.parse(-1), run, by_epoch=False)
    (tmp_path / "STOP").mkdir()
    clock.now += 1
    with caplog.at_level(logging.WARNING, "distckpt"):
        assert due_at(triggers, range(1, 2)) == {}
    assert not triggers.should_stop
    assert "STOP" in caplog.text


def test_control_files_are_the_leaders_to_see(tmp_path, clock):
    run: Any = Wanted(tmp_path, thread_ranks(2)[1])
    triggers = Triggers(Schedule.parse(-1), run, by_epoch=False)
    (tmp_path / "STOP").touch()
    clock.now += 1
    assert due_at(triggers, range(1, 3)) == {}
    assert (tmp_path / "STOP").exists()
    run.requests.close()


def test_what_the_leader_alone_sees_is_due_on_all_ranks_at_one_step(tmp_path, clock):
    start = threading.Barrier(3)
    everybody_trained_on = threading.Barrier(3)

    def work(ranks: Ranks) -> dict[int, list[str]]:
        run: Any = Wanted(tmp_path, ranks)
        triggers = Triggers(Schedule.parse("1min"), run, by_epoch=False)
        due: dict[int, list[str]] = due_at(triggers, range(1, ranks.rank + 2))  # they are not at the same step
        start.wait(10)
        clock.now = 2000.0
        for step in itertools.count(ranks.rank + 2):
            due |= due_at(triggers, range(step, step + 1))
            if due:
                break
        everybody_trained_on.wait(10)
        run.requests.close()
        return due

    first, second, third = on_threads(thread_ranks(3), work)
    assert isinstance(first, dict) and len(first) == 1
    assert first == second == third and list(first.values()) == [["interval"]]

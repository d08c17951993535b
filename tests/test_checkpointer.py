"""Every word of the checkpointer does what it says, in one process."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from flows import Gated
from torch import nn

from distckpt import Checkpointer, NoCheckpoint, SaveFailed, StateMismatch
from distckpt.catalog import Catalog, scan
from distckpt.engine.stager import Stager
from distckpt.manifest import Record
from distckpt.progress import Progress
from distckpt.run import Run
from distckpt.stores.local import LocalStore
from distckpt.writer import Writer

SOON = timedelta(seconds=20)


class Tally:
    """A part that counts what was trained, and sees what was saved when it was asked for its state."""

    def __init__(self) -> None:
        self.count = 0
        self.on_capture: Callable[[], object] = lambda: None

    def state_dict(self) -> dict[str, Any]:
        self.on_capture()
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def start(out_dir: Path, **words: Any) -> tuple[Checkpointer, Tally]:
    tally = Tally()
    return Checkpointer(out_dir, {"tally": tally}, **{"timeout": SOON, **words}), tally


def train(ckpt: Checkpointer, tally: Tally, steps: int, **words: Any) -> None:
    for _ in range(steps):
        tally.count += 1
        ckpt.step(**words)


def trained(out_dir: Path, steps: int, **words: Any) -> None:
    """A run that resumes, and ends when so many more steps are done."""
    ckpt, tally = start(out_dir, **words)
    with ckpt:
        ckpt.resume()
        train(ckpt, tally, steps)


def records(out_dir: Path) -> list[Record]:
    return scan(LocalStore(out_dir)).records


def saved(out_dir: Path) -> dict[int, tuple[str, ...]]:
    """The steps of what is on disk, and why it was saved."""
    return {one.progress.step: one.reasons for one in records(out_dir)}


def labels(out_dir: Path) -> dict[str, str]:
    return {path.name: str(path.readlink()) for path in out_dir.iterdir() if path.is_symlink()}


def resumed(out_dir: Path, which: str | int = "latest", **words: Any) -> tuple[int, int]:
    ckpt, tally = start(out_dir, **{"save_last": False, **words})
    with ckpt:
        return ckpt.resume(which), tally.count


@pytest.fixture
def out_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before it is set."""
    gate = threading.Event()
    take = Stager.take
    monkeypatch.setattr(Stager, "take", lambda stager, images: Gated(take(stager, images), gate))
    yield gate
    gate.set()


# When


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ({"interval": 3}, {3: "interval", 6: "interval", 8: "last"}),
        ({"interval": [3, 4]}, {3: "interval", 4: "interval", 6: "interval", 8: "interval"}),
        ({"interval": 3, "save_begin": 2}, {2: "interval", 5: "interval", 8: "interval"}),
        ({"interval": 3, "save_last": False}, {3: "interval", 6: "interval"}),
        ({"interval": 8}, {8: "interval"}),
        ({"interval": -1}, {8: "last"}),
        ({}, {8: "last"}),
        ({"save_last": False}, {}),
    ],
    ids=str,
)
def test_a_number_in_interval_counts_steps(out_dir, words, steps):
    trained(out_dir, 8, **words)
    assert saved(out_dir) == {step: (why,) for step, why in steps.items()}


def test_a_duration_in_interval_is_counted_from_the_last_save(out_dir, clock):
    ckpt, tally = start(out_dir, interval=["1min", 5], save_last=False)
    with ckpt:
        for _ in range(9):
            clock.now += 25
            train(ckpt, tally, 1)
    assert list(saved(out_dir)) == [3, 5, 8]


def test_with_by_epoch_a_number_counts_epochs(out_dir):
    ckpt, tally = start(out_dir, interval=2, save_begin=1, by_epoch=True, save_last=False)
    with ckpt:
        for _ in range(4):
            train(ckpt, tally, 2)
            train(ckpt, tally, 1, epoch_ends=True)
    assert [(one.progress.step, one.progress.epoch) for one in records(out_dir)] == [(3, 1), (9, 3)]
    ckpt, tally = start(out_dir, interval=1, by_epoch=True, save_last=False)
    with ckpt:
        assert ckpt.resume() == 9
        train(ckpt, tally, 1, epoch_ends=True)
    assert records(out_dir)[-1].progress.epoch == 4


def test_asked_for_a_save_is_made_now_and_once_for_a_step(out_dir):
    ckpt, tally = start(out_dir)
    with ckpt:
        ckpt.save("start", wait=True)
        assert saved(out_dir) == {0: ("start",)}
        train(ckpt, tally, 1)
        ckpt.save(wait=True)
        ckpt.save("again", wait=True)
        assert saved(out_dir) == {0: ("start",), 1: ("asked",)}
    assert [one.serial for one in records(out_dir)] == [1, 2], "nor once more for being the last"


@pytest.mark.parametrize(("name", "why", "steps"), [("SAVE", "asked", 9), ("STOP", "stop", 4)])
def test_a_control_file_is_obeyed_and_removed(out_dir, clock, name, why, steps):
    ckpt, tally = start(out_dir, save_last=False)
    for step in ckpt.steps(9):
        tally.count += 1
        clock.now += 0.5
        if step == 3:
            (out_dir / name).touch()
    assert tally.count == steps and ckpt.should_stop is (name == "STOP")
    assert saved(out_dir) == {4: (why,)}
    assert not (out_dir / name).exists()
    assert resumed(out_dir) == (4, 4)


def test_a_stop_that_comes_too_late_does_not_stop_the_next_start(out_dir, clock):
    ckpt, _ = start(out_dir)
    for step in ckpt.steps(3):
        if step == 3:
            (out_dir / "STOP").touch()
    assert not ckpt.should_stop and not (out_dir / "STOP").exists()
    clock.now += 10
    assert [*start(out_dir)[0].steps(5)] == [4, 5]


def test_what_a_stop_saves_is_durable_when_its_step_ends(out_dir, clock, gate):
    ckpt, _ = start(out_dir)
    (out_dir / "STOP").touch()
    threading.Timer(0.3, gate.set).start()
    while not ckpt.should_stop:
        ckpt.step()
        clock.now += 0.5
    assert ckpt.latest is not None
    ckpt.close()


# The loop


def test_steps_resumes_counts_and_closes(out_dir):
    for total, expected in ((3, [1, 2, 3]), (5, [4, 5]), (5, []), (2, [])):
        ckpt, tally = start(out_dir)
        done = []
        for step in ckpt.steps(total):
            tally.count += 1
            done.append(step)
        assert done == expected
        assert tally.count == (5 if total == 2 else total)
        with pytest.raises(RuntimeError, match="closed"):
            ckpt.step()
    assert list(saved(out_dir)) == [3, 5]


@pytest.mark.parametrize("total", [-1, 2.5, "3", None, True])
def test_steps_takes_a_number_of_steps(out_dir, total):
    ckpt, _ = start(out_dir)
    with ckpt, pytest.raises(ValueError, match=r"steps\(.*\): should be the number of steps to train for in all"):
        next(ckpt.steps(total))


def test_a_step_that_was_left_with_break_is_not_done_and_its_half_state_never_saved(out_dir, caplog):
    ckpt, tally = start(out_dir, interval=2)
    with ckpt:
        for step in ckpt.steps(9):
            tally.count += 1
            if step == 4:
                break
        with pytest.raises(RuntimeError, match="step 4 was left before its end"):
            ckpt.save()
    assert list(saved(out_dir)) == [2]
    assert "step 4 was left before its end" in caplog.text
    assert resumed(out_dir) == (2, 2)


def test_a_step_that_was_left_can_be_declared_done(out_dir):
    ckpt, tally = start(out_dir)
    with ckpt:
        for _ in ckpt.steps(9):
            tally.count += 1
            break
        ckpt.step()
    assert resumed(out_dir) == (1, 1)


def test_a_step_that_raised_is_not_saved(out_dir):
    ckpt, tally = start(out_dir, interval=2)
    with pytest.raises(ZeroDivisionError), ckpt:
        for step in ckpt.steps(9):
            tally.count += 1
            step / (3 - step)
    assert resumed(out_dir) == (2, 2)


def test_what_failed_between_two_steps_is_not_saved(out_dir):
    ckpt, tally = start(out_dir, interval=2)
    with pytest.raises(ZeroDivisionError), ckpt:
        train(ckpt, tally, 3)
        tally.count = 1 // 0
    assert resumed(out_dir) == (2, 2)


@pytest.mark.parametrize("wait", [False, True])
def test_a_save_in_the_body_of_steps_is_of_the_whole_step(out_dir, wait):
    ckpt, tally = start(out_dir, save_last=False)
    for step in ckpt.steps(3):
        if step == 2:
            ckpt.save("midway", wait=wait)
        if step == 3 and wait:
            assert list(saved(out_dir)) == [2]
        tally.count += 1
    assert saved(out_dir) == {2: ("midway",)}
    assert resumed(out_dir) == (2, 2)


def test_training_goes_on_bit_for_bit_as_without_saves_and_after_a_resume(out_dir, tmp_path):
    def run(place: Path, total: int, **words: Any) -> list[Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
        state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        for _ in Checkpointer(place, state, timeout=SOON, **words).steps(total):
            optimizer.zero_grad()
            model(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
            scheduler.step()
        return [one.tolist() for one in model.state_dict().values()] + [torch.rand(1).item()]

    expected = run(tmp_path / "without", 6, save_last=False)
    assert run(out_dir, 3, interval=1) != expected
    assert run(out_dir, 6, interval=1) == expected


# Reports and labels


def test_a_report_in_steps_is_of_the_step_that_runs(out_dir):
    losses = [5.0, 3.0, 4.0, 1.0, 2.0]
    ckpt, tally = start(out_dir, interval=3, save_best="loss", save_last=False, max_keep_best=9)
    for step in ckpt.steps(5):
        ckpt.report({"loss": losses[step - 1]})
        tally.count += 1
    assert saved(out_dir)[3] == ("interval", "best")
    assert {one.progress.step: one.metrics["loss"] for one in records(out_dir)} == dict(enumerate(losses, 1))


def test_only_a_new_best_is_saved_for_its_report(out_dir):
    losses = [3.0, 4.0, 3.0, 2.0, float("nan"), float("-inf")]
    ckpt, tally = start(out_dir, save_best="loss", save_last=False, max_keep_ckpts=9)
    for step in ckpt.steps(6):
        tally.count += 1
        ckpt.report({"loss": losses[step - 1]})
        ckpt.wait()
    assert saved(out_dir) == {4: ("best",)}, "step 1 was best, and was let go for step 4"
    assert labels(out_dir) == {"latest": "step-00000004", "best-loss": "step-00000004"}


def test_a_step_may_be_counted_by_somebody_else_who_knows_its_metrics(out_dir):
    ckpt, tally = start(out_dir, interval=5, save_best="loss", save_last=False)
    with ckpt:
        for step, loss in ((4, 3.0), (8, 2.0), (12, 4.0), (12, 5.0)):
            tally.count = step
            ckpt.step(at=Progress(step, tally.count // 12), metrics={"loss": loss})
        with pytest.raises(KeyError, match="loss"):
            ckpt.step(at=Progress(13), metrics={"lose": 1.0})
    assert saved(out_dir) == {8: ("interval", "best"), 12: ("interval",)}, "4 was the best once"
    assert [one.metrics for one in records(out_dir)] == [{"loss": 2.0}, {"loss": 4.0}]
    assert [one.progress.epoch for one in records(out_dir)] == [0, 1]


def test_by_epoch_a_step_that_somebody_else_counts_ends_an_epoch_where_there_is_one_more(out_dir):
    ckpt, _ = start(out_dir, interval=2, by_epoch=True, save_last=False)
    with ckpt:
        for step, epoch in ((3, 0), (3, 1), (4, 1), (6, 2), (7, 2), (9, 3)):
            ckpt.step(at=Progress(step, epoch))
    assert saved(out_dir) == {6: ("interval",)}


def test_a_report_after_the_step_labels_what_is_saved_and_saves_what_is_best(out_dir):
    ckpt, tally = start(out_dir, interval=2, save_best="acc", save_last=False)
    with ckpt:
        for step, acc in enumerate([0.5, 0.4, 0.3, 0.6], 1):
            train(ckpt, tally, 1)
            ckpt.report({"acc": acc, "speed": step})
        ckpt.wait()
        assert saved(out_dir) == {2: ("interval",), 4: ("interval", "best")}, "1 was best, and was let go for 4"
        assert {one.progress.step: dict(one.metrics) for one in records(out_dir)} == {
            2: {"acc": 0.4, "speed": 2.0},
            4: {"acc": 0.6, "speed": 4.0},
        }
        assert ckpt.best is not None and ckpt.best.progress.step == 4
    assert labels(out_dir)["best-acc"] == "step-00000004"


def test_metrics_that_are_known_before_a_step_is_saved_are_saved_with_it(out_dir):
    ckpt, tally = start(out_dir, interval=2, save_best="acc", save_last=False)
    with ckpt:
        for acc in (0.5, 0.4, 0.6):
            train(ckpt, tally, 1, metrics={"acc": acc})
        train(ckpt, tally, 1)
        ckpt.wait()
        with pytest.raises(KeyError, match="metric acc was not reported, but loss were"):
            ckpt.step(metrics={"loss": 1.0})
    assert saved(out_dir) == {2: ("interval",), 3: ("best",), 4: ("interval",)}
    assert {one.progress.step: dict(one.metrics) for one in records(out_dir)} == {
        2: {"acc": 0.4},
        3: {"acc": 0.6},
        4: {},
    }


def test_steps_that_were_done_elsewhere_are_counted(out_dir):
    ckpt, tally = start(out_dir, interval=5)
    with ckpt:
        ckpt.start_at(13, epoch=2)
        train(ckpt, tally, 2)
    assert saved(out_dir) == {15: ("interval",)}
    assert records(out_dir)[0].progress.epoch == 2
    ckpt, _ = start(out_dir)
    with ckpt, pytest.raises(RuntimeError, match="holds checkpoints: resume"):
        ckpt.start_at(3)


def test_what_was_reported_of_a_step_is_known_of_it_whatever_saves_it_later(out_dir):
    ckpt, tally = start(out_dir, save_best="loss")
    with ckpt:
        train(ckpt, tally, 1)
        ckpt.report({"loss": 1.0})
        train(ckpt, tally, 1)
        ckpt.report({"loss": 2.0, "speed": 7.0})
        ckpt.report({"loss": 3.0})
    assert {one.progress.step: dict(one.metrics) for one in records(out_dir)} == {
        1: {"loss": 1.0},
        2: {"loss": 3.0, "speed": 7.0},
    }
    ckpt, tally = start(out_dir, save_best="loss")
    for _ in ckpt.steps(4):
        tally.count += 1
        ckpt.report({"loss": 4.0})
    assert records(out_dir)[-1].metrics == {"loss": 4.0} and saved(out_dir)[4] == ("last",)
    assert list(saved(out_dir)) == [1, 2, 4]


def test_the_best_survives_a_restart(out_dir):
    words = {"save_best": "loss", "save_last": False}
    for loss, best in ((2.0, 1), (3.0, 1), (2.0, 1), (1.0, 4)):
        ckpt, tally = start(out_dir, **words)
        with ckpt:
            ckpt.resume()
            if ckpt.best is not None:
                assert ckpt.best.metrics == {"loss": 2.0}
            while tally.count < {2.0: 1, 3.0: 2, 1.0: 4}[loss]:
                train(ckpt, tally, 1)
            ckpt.report({"loss": loss})
        assert labels(out_dir)["best-loss"] == f"step-{best:08d}"
    assert resumed(out_dir, "best", **words) == (4, 4)


def test_the_first_metric_that_is_reported_is_the_one_of_auto(out_dir):
    ckpt, tally = start(out_dir, save_best="auto", save_last=False)
    with ckpt:
        assert ckpt.best is None
        for acc in (0.2, 0.3, 0.1):
            train(ckpt, tally, 1)
            ckpt.report({"val/acc": acc, "loss": 1.0})
    assert saved(out_dir) == {2: ("best",)}
    assert labels(out_dir)["best-val_acc"] == "step-00000002"


def test_several_metrics_have_a_best_each(out_dir):
    ckpt, tally = start(out_dir, save_best=["loss", "score"], rule=["less", "greater"], save_last=False)
    with ckpt:
        for loss, score in ((3.0, 1.0), (2.0, 0.5), (4.0, 2.0), (5.0, 0.1)):
            train(ckpt, tally, 1)
            ckpt.report({"loss": loss, "score": score})
    assert saved(out_dir) == {2: ("best",), 3: ("best",)}
    assert labels(out_dir) == {"latest": "step-00000003", "best-loss": "step-00000002", "best-score": "step-00000003"}


def test_a_report_is_judged_by_the_one_before_it_even_while_that_is_being_written(out_dir, monkeypatch):
    gate = threading.Event()
    relabel, wait = Catalog.relabel, Writer.wait
    monkeypatch.setattr(Catalog, "relabel", lambda *args: (gate.wait(5), relabel(*args))[1])
    monkeypatch.setattr(Writer, "wait", lambda *args: (gate.set(), wait(*args))[1])
    ckpt, tally = start(out_dir, save_best="loss", save_last=False)
    with ckpt:
        train(ckpt, tally, 1)
        ckpt.save(wait=True)
        ckpt.report({"loss": 1.0})
        gate.clear()
        train(ckpt, tally, 1)
        ckpt.report({"loss": 2.0})
    assert saved(out_dir) == {1: ("asked", "best")}


@pytest.mark.parametrize("metrics", [3, None, [("loss", 1.0)], {1: 2.0}])
def test_a_report_is_a_dict_of_names(out_dir, metrics):
    ckpt, _ = start(out_dir)
    with ckpt, pytest.raises(TypeError, match=r"metrics are a dict of names and numbers"):
        ckpt.report(metrics)


@pytest.mark.parametrize("metrics", [{}, {"los": 1.0}])
def test_a_report_without_the_metric_is_refused_and_changes_nothing(out_dir, metrics):
    ckpt, tally = start(out_dir, save_best="loss", save_last=False)
    with ckpt:
        train(ckpt, tally, 1)
        with pytest.raises(KeyError, match="metric loss was not reported"):
            ckpt.report(metrics)
    assert saved(out_dir) == {}


# What is kept


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7]),
        ({"max_keep_ckpts": 2}, [6, 7]),
        ({"max_keep_ckpts": 1, "keep_every": 3}, [3, 6, 7]),
        ({"max_keep_ckpts": 1, "keep_for": "1h"}, [1, 2, 3, 4, 5, 6, 7]),
        ({"keep_bytes": 1}, [7]),
        ({"max_keep_ckpts": 1, "save_best": "loss", "max_keep_best": 2}, [3, 4, 7]),
        ({"keep_bytes": 1, "save_best": "loss"}, [4, 7]),
    ],
    ids=str,
)
def test_what_no_word_keeps_is_deleted(out_dir, words, kept):
    ckpt, tally = start(out_dir, interval=1, **words)
    for step in ckpt.steps(7):
        tally.count += 1
        ckpt.report({"loss": abs(step - 4) + step / 10})
    assert list(saved(out_dir)) == kept
    folders = sorted(path.name for path in out_dir.glob("step-*") if path.is_dir() and not path.is_symlink())
    assert folders == [f"step-{step:08d}" for step in kept]


def test_what_this_run_did_not_write_is_never_deleted(out_dir):
    trained(out_dir.with_name("other"), 2, interval=1)
    shutil.copytree(out_dir.with_name("other"), out_dir, ignore=lambda *_: [".attempt-00000001", "run.json"])
    (out_dir / "step-00000077").mkdir()
    (out_dir / "step-00000077" / "mine.txt").touch()
    trained(out_dir, 4, interval=1, max_keep_ckpts=1)
    assert list(saved(out_dir)) == [1, 2, 6]
    assert (out_dir / "step-00000077" / "mine.txt").exists()


# While a save is written


def test_training_goes_on_while_a_save_is_written(out_dir, gate):
    ckpt, tally = start(out_dir, interval=2, save_last=False)
    train(ckpt, tally, 3)
    assert ckpt.latest is None
    gate.set()
    ckpt.close()
    assert resumed(out_dir) == (2, 2)


def test_without_async_save_it_is_durable_on_return(out_dir):
    ckpt, tally = start(out_dir, interval=2, async_save=False)
    with ckpt:
        train(ckpt, tally, 2)
        assert list(saved(out_dir)) == [2] and labels(out_dir) == {"latest": "step-00000002"}


def test_a_busy_writer_is_waited_for(out_dir, gate, monkeypatch):
    ckpt, tally = start(out_dir, interval=1, save_last=False)
    seen = []

    def look() -> None:
        seen.append(list(saved(out_dir)))

    tally.on_capture = look
    train(ckpt, tally, 1)
    collect = Run.collect
    monkeypatch.setattr(Run, "collect", lambda *args: (gate.set(), collect(*args))[1])
    train(ckpt, tally, 1)
    ckpt.close()
    assert seen == [[], [1]], "the memory of the first was free when the second was captured"
    assert list(saved(out_dir)) == [1, 2]


def test_with_skip_a_save_that_finds_a_busy_writer_is_left_out_unless_it_was_asked_for(out_dir, gate, caplog):
    ckpt, tally = start(out_dir, interval=1, when_busy="skip")
    train(ckpt, tally, 3)
    assert caplog.text.count("is not saved: the save before it is not durable yet") == 2
    threading.Thread(target=gate.set).start()
    ckpt.save()
    ckpt.close()
    assert saved(out_dir) == {1: ("interval",), 3: ("asked",)}


def test_a_wait_that_is_too_short_says_so_and_the_save_goes_on(out_dir, gate):
    ckpt, tally = start(out_dir)
    train(ckpt, tally, 1)
    ckpt.save()
    with pytest.raises(TimeoutError, match="has not ended within 0:00:00.01.*; it goes on"):
        ckpt.wait(timedelta(milliseconds=10))
    gate.set()
    ckpt.wait()
    ckpt.close()
    assert resumed(out_dir) == (1, 1)


# The end


def test_a_with_statement_saves_the_last_and_frees_the_directory(out_dir):
    ckpt, tally = start(out_dir, interval=2)
    with ckpt:
        train(ckpt, tally, 3)
    assert saved(out_dir) == {2: ("interval",), 3: ("last",)}
    assert json.loads((out_dir / "run.json").read_text())["state"] == "finished"
    ckpt.close()
    for call in (ckpt.step, ckpt.save, lambda: ckpt.report({})):
        with pytest.raises(RuntimeError, match="this checkpointer is closed"):
            call()
    assert len(records(out_dir)) == 2


def test_a_run_that_did_no_step_saves_nothing(out_dir):
    trained(out_dir, 0)
    assert saved(out_dir) == {}
    assert resumed(out_dir) == (0, 0)


def test_a_resumed_run_that_did_no_step_does_not_save_it_again(out_dir):
    trained(out_dir, 2)
    trained(out_dir, 0)
    assert len(records(out_dir)) == 1


# Failures


class Once:
    """Raises the first time that it is called while it is armed."""

    def __init__(self) -> None:
        self.armed = False

    def __call__(self) -> None:
        if self.armed:
            self.armed = False
            raise RuntimeError("no state today")


@pytest.mark.parametrize("async_save", [True, False])
def test_a_save_that_failed_is_raised_once_and_tried_again(out_dir, async_save):
    ckpt, tally = start(out_dir, async_save=async_save)
    with ckpt:
        train(ckpt, tally, 1)
        ckpt.save(wait=True)
        train(ckpt, tally, 1)
        tally.on_capture = once = Once()
        once.armed = True
        with pytest.raises(SaveFailed, match=r"save of step 2.*rank 0: RuntimeError: no state today"):
            ckpt.save(wait=True)
        assert list(saved(out_dir)) == [1]
        ckpt.save(wait=True)
        assert list(saved(out_dir)) == [1, 2]
        train(ckpt, tally, 1)


def test_a_save_that_fails_in_the_background_is_raised_by_the_next_step(out_dir):
    ckpt, tally = start(out_dir, interval=2)
    tally.on_capture = once = Once()
    with ckpt:
        train(ckpt, tally, 1)
        once.armed = True
        raised = []
        for _ in range(9):
            try:
                train(ckpt, tally, 1)
                ckpt._run._writer.wait(20)
            except SaveFailed as failure:
                raised.append((tally.count, str(failure)))
        ((step, words),) = raised
        assert step == 3 and "no state today" in words
    assert list(saved(out_dir)) == [4, 6, 8, 10]


class Disk:
    """A small disk that can be full: a mounted one, or where that is refused, a limit of the size of files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(root)], capture_output=True)
        self.is_mounted = mounted.returncode == 0
        self.errno = errno.ENOSPC if self.is_mounted else errno.EFBIG
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self) -> None:
        if not self.is_mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, self.limits[1]))
            return
        with suppress(OSError), (self.root / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(100_000))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        (self.root / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        self.free()
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self.root)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.close()


@pytest.mark.parametrize("async_save", [True, False])
def test_a_full_disk_fails_the_save_and_costs_nothing_that_was_saved(disk, async_save):
    out_dir = disk.root / "run"
    model = nn.Linear(200, 1000)
    with Checkpointer(out_dir, {"model": model}, async_save=async_save, max_keep_ckpts=1, timeout=SOON) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)
        ckpt.step()
        disk.fill()
        with pytest.raises(SaveFailed) as raised:
            ckpt.save(wait=True)
        assert f"[Errno {disk.errno}] {os.strerror(disk.errno)}: '{out_dir / 'step-00000002'}" in str(raised.value)
        assert list(saved(out_dir)) == [1]
        stored = safetensors.torch.load_file(out_dir / "step-00000001" / "model.safetensors")
        assert torch.equal(stored["weight"], model.weight)
        disk.free()
        ckpt.save(wait=True)
        ckpt.wait()
    (record,) = records(out_dir)
    assert record.progress.step == 2
    folders = [path.name for path in out_dir.iterdir() if path.is_dir() and not path.is_symlink()]
    assert folders == [record.name], "what the failed save left is gone"


# Events


def test_events_are_told_and_logged(out_dir, caplog):
    told: list[Any] = []
    ckpt, tally = start(out_dir, interval=1, max_keep_ckpts=1, on_event=told.append, save_best="loss")
    tally.on_capture = once = Once()
    with caplog.at_level(logging.INFO, "distckpt"), ckpt:
        train(ckpt, tally, 1)
        ckpt.report({"loss": 3.0})
        train(ckpt, tally, 1)
        once.armed = True
        with suppress(SaveFailed):
            train(ckpt, tally, 1)
            ckpt.wait()
        ckpt.report({"loss": 1.0})
    lines = [json.loads(line) for line in (out_dir / "events.jsonl").read_text().splitlines()]
    assert lines == told
    assert [(one["event"], one.get("step"), one.get("name")) for one in told] == [
        ("saved", 1, "step-00000001"),
        ("saved", 2, "step-00000002"),
        ("failed", 3, None),
        ("deleted", None, "step-00000001"),
        ("saved", 3, "step-00000003"),
    ]
    first = told[0]
    assert first["name"] == "step-00000001" and first["reasons"] == ["interval"] and first["total_bytes"] > 0
    assert first["durable_seconds"] >= first["blocked_seconds"] >= 0 and set(first["phases"]) == {
        "agree",
        "write",
        "commit",
    }
    seconds = {f"{phase}_seconds" for phase in ("stage", "waited", "fill", "hash", "write", "fsync")}
    assert set(first["engine"]) == {"arena_bytes", "retakes", *seconds}
    assert "saved step-00000001 (interval)  blocked " in caplog.text and "loss 1" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError, KeyError, OSError])
def test_an_on_event_that_raises_is_warned_of_and_harms_nothing(out_dir, caplog, error):
    def fail(event: Any) -> None:
        raise error("not today")

    ckpt, tally = start(out_dir, interval=1, max_keep_ckpts=1, on_event=fail)
    tally.on_capture = once = Once()
    with ckpt:
        train(ckpt, tally, 2)
        once.armed = True
        with pytest.raises(SaveFailed, match="no state today"):
            ckpt.step()
            ckpt.wait()
        train(ckpt, tally, 1)
    assert list(saved(out_dir)) == [4]
    assert "on_event" in caplog.text and "not today" in caplog.text


def test_the_record_and_the_manifest_say_how_it_came_to_be(out_dir):
    trained(out_dir, 3)
    (record,) = records(out_dir)
    manifest = json.loads((out_dir / record.name / "manifest.json").read_text())
    assert record.reasons == ("last",) and record.world_size == 1 and record.format == "full"
    assert manifest["progress"] == {"step": 3, "epoch": 0}
    assert manifest["environment"]["torch"] == torch.__version__
    assert set(manifest["seconds"]) == {"agree", "write"}
    assert "load_file" in manifest["read_with"]


# Resuming


def test_an_empty_directory_gives_0(out_dir):
    assert resumed(out_dir) == (0, 0)


def test_the_newest_is_resumed_or_the_one_that_is_named(out_dir):
    trained(out_dir, 5, interval=2)
    assert resumed(out_dir) == (5, 5)
    assert resumed(out_dir, 2) == (2, 2)
    assert resumed(out_dir, "step-00000004") == (4, 4)


@pytest.mark.parametrize("which", [3, -1, "step-00000003", "nothing", "../other", "best"])
def test_a_checkpoint_that_is_not_there_is_an_error_that_names_it(out_dir, which):
    trained(out_dir, 5, interval=2)
    ckpt, _ = start(out_dir, save_last=False)
    with ckpt, pytest.raises(NoCheckpoint, match="not committed there; committed: step-00000002, .*|save_best"):
        ckpt.resume(which)


@pytest.mark.parametrize("which", [None, True, 2.0, ["latest"]])
def test_which_is_a_word_or_a_step(out_dir, which):
    ckpt, _ = start(out_dir)
    with ckpt, pytest.raises(TypeError, match='which should be "latest", "best", a step or a name'):
        ckpt.resume(which)


def test_a_run_that_was_taken_back_goes_on_from_there_under_names_of_its_own(out_dir):
    trained(out_dir, 6, interval=2)
    ckpt, tally = start(out_dir, interval=2)
    with ckpt:
        assert ckpt.resume(2) == 2
        tally.count = 100
        train(ckpt, tally, 2)
        ckpt.wait()
        assert ckpt.latest is not None and ckpt.latest.name == "step-00000004.2"
        assert labels(out_dir)["latest"] == "step-00000004.2"
    assert resumed(out_dir) == (4, 102)
    assert resumed(out_dir, 4) == (4, 102), "of two of one step the newer is meant"
    assert resumed(out_dir, "step-00000004") == (4, 4)
    assert resumed(out_dir, 6) == (6, 6)


def test_a_directory_that_holds_checkpoints_must_be_resumed_first(out_dir):
    trained(out_dir, 1)
    ckpt, tally = start(out_dir)
    with ckpt:
        for call in (ckpt.step, ckpt.save, lambda: ckpt.report({"loss": 1.0})):
            with pytest.raises(RuntimeError, match=r"holds checkpoints: call resume\(\) before the first step or save"):
                call()
        assert ckpt.resume() == 1
        train(ckpt, tally, 1)
    assert list(saved(out_dir)) == [1, 2]


def test_a_damaged_checkpoint_is_named_passed_over_and_left(out_dir, caplog):
    trained(out_dir, 3, interval=1)
    (out_dir / "step-00000003" / "state.json").write_bytes(b"{}")
    assert resumed(out_dir) == (2, 2)
    assert "step-00000003 is damaged and passed over" in caplog.text
    assert (out_dir / "step-00000003.committed").exists()
    for step in (1, 2):
        (out_dir / f"step-0000000{step}" / "state.json").unlink()
    ckpt, _ = start(out_dir)
    with ckpt, pytest.raises(NoCheckpoint, match="none of the committed checkpoints can be read"):
        ckpt.resume()


def test_a_checkpoint_of_another_model_changes_nothing(out_dir):
    with Checkpointer(out_dir, {"model": nn.Linear(2, 2)}, timeout=SOON) as ckpt:
        ckpt.step()
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with Checkpointer(out_dir, {"model": model}, timeout=SOON) as ckpt:
        with pytest.raises(StateMismatch, match=r"model\.weight \(\(2, 2\) there, \(2, 3\) here\)"):
            ckpt.resume()
        assert torch.equal(model.weight, before)
        with pytest.raises(RuntimeError, match=r"call resume\(\)"):
            ckpt.step()


def test_a_part_of_a_checkpoint_can_be_resumed_and_is_saved_again(out_dir, caplog):
    with Checkpointer(out_dir, {"model": nn.Linear(2, 2), "tally": Tally()}, timeout=SOON) as ckpt:
        ckpt.step()
    tally = Tally()
    tally.count = 7
    caplog.set_level(logging.INFO, "distckpt")
    with Checkpointer(out_dir, {"model": nn.Linear(2, 2), "tally": tally}, timeout=SOON) as ckpt:
        assert ckpt.resume(exclude="tally") == 1
    assert tally.count == 7
    assert "resumed step-00000001 (step 1, epoch 0)  exact: model, rng of 1 ranks  not exact: tally" in caplog.text
    assert [one.name for one in records(out_dir)] == ["step-00000001", "step-00000001.2"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stateful_data_loader_goes_on_with_the_next_batch(out_dir, workers):
    loading = pytest.importorskip("torchdata.stateful_dataloader")

    def batches(total: int) -> list[list[int]]:
        torch.manual_seed(0)
        loader = loading.StatefulDataLoader(range(40), batch_size=4, shuffle=True, num_workers=workers)
        ckpt = Checkpointer(out_dir, {"loader": loader}, timeout=SOON)
        ckpt.resume()
        told = []
        batch = iter(loader)
        for _ in ckpt.steps(total):
            told.append(next(batch).tolist())
        return told

    before, after = batches(4), batches(10)
    assert len(before + after) == 10 and sorted(sum(before + after, [])) == list(range(40))


# Starting from something else


def weight_after(out_dir: Path, init_from: Any, **words: Any) -> float:
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 0.0)
    with Checkpointer(out_dir, {"model": model}, init_from=init_from, save_last=False, timeout=SOON) as ckpt:
        assert ckpt.resume(**words) == 0
        return model.weight.item()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 7.0)
    with Checkpointer(tmp_path / "source", {"model": model, "tally": Tally()}, timeout=SOON) as ckpt:
        ckpt.step()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    return tmp_path


@pytest.mark.parametrize(
    "what", ["source", "source/step-00000001", "source/latest", "weights.safetensors", "weights.pth"]
)
def test_an_empty_directory_starts_from_the_modules_of_init_from(out_dir, source, what):
    assert weight_after(out_dir, source / what) == 7.0
    assert weight_after(out_dir, str(source / what)) == 7.0, "and again, as nothing was saved"


def test_a_directory_with_checkpoints_does_not_look_at_init_from(out_dir, tmp_path):
    trained(out_dir, 3)
    assert resumed(out_dir, init_from=tmp_path / "nothing") == (3, 3)


def test_init_from_is_selected_from_and_renamed_as_a_resume_is(out_dir, source):
    torch.save({"net.weight": torch.full((1, 1), 5.0), "head.bias": torch.ones(1)}, source / "other.pth")
    with pytest.raises(StateMismatch, match=r"missing in the checkpoint: model\.weight"):
        weight_after(out_dir, source / "other.pth")
    assert weight_after(out_dir, source / "other.pth", rename={r"^net\.": ""}, strict=False) == 5.0
    assert weight_after(out_dir, source / "weights.pth", exclude="model.weight") == 0.0


def test_init_from_where_nothing_is_there_is_an_error(out_dir, tmp_path):
    with pytest.raises(NoCheckpoint, match="init_from: .*nothing is neither a checkpoint nor a file"):
        weight_after(out_dir, tmp_path / "nothing")


def test_init_from_without_modules_in_the_state_is_an_error_that_says_so(out_dir, source):
    ckpt, _ = start(out_dir, init_from=source / "source")
    with ckpt, pytest.raises(ValueError, match=r"init_from: there is no module in state"):
        ckpt.resume()

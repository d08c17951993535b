"""A run on thread ranks: the directory is claimed, saves go on in the background, and their failures reach all."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from flows import Gated, take

from distckpt import layout
from distckpt.agreeing import Request
from distckpt.attempt import Attempt, Holder
from distckpt.catalog import scan
from distckpt.errors import DirectoryInUse, RankFailure, SaveFailed, Superseded
from distckpt.formats import Snapshot, Staged
from distckpt.formats.full import FORMAT
from distckpt.formats.known import get_format
from distckpt.formats.stand_ins import Whole
from distckpt.manifest import Record
from distckpt.progress import Progress
from distckpt.ranks.process_group import detect
from distckpt.restoring import Restored
from distckpt.run import Run
from distckpt.saving import Job
from distckpt.stores.local import LocalStore
from distckpt.testing import FaultyStore, on_threads, thread_ranks

TIMEOUT = timedelta(seconds=20)


class Ordered:
    """A snapshot that tells in which order it was staged and asked for by the writer."""

    def __init__(self, inner: Staged, told: list[str], *, needs_the_writer: bool = False) -> None:
        self._inner, self._told = inner, told
        self._written = threading.Event()
        self._needs_the_writer = needs_the_writer

    def stage(self) -> None:
        self._inner.stage()
        assert not self._needs_the_writer or self._written.wait(10)
        self._told.append("staged")

    def write(self, store, path):
        self._written.set()
        self._told.append("written")
        return self._inner.write(store, path)

    def settle(self) -> None:
        self._inner.settle()

    def release(self) -> None:
        self._inner.release()


class KeepNewest:
    """Keeps the newest few, and points a label at the last."""

    def __init__(self, count: int = 99) -> None:
        self.count = count

    def to_delete(self, records):
        return list(records[: -self.count])

    def label(self, catalog, records):
        catalog.store.point(layout.LATEST, records[-1].name)


def open_run(ranks, root, *, store=None, **words) -> Run:
    words = {"keeping": KeepNewest(), "format": FORMAT, "timeout": TIMEOUT} | words
    return Run(store or LocalStore(root), ranks=ranks, get_format=get_format, **words)


def job(step: int, rank: int, *, fails: bool = False, gate: threading.Event | None = None) -> Job:
    def taken() -> Staged:
        if fails:
            raise ValueError("no state today")
        model, own = {"weight": torch.full((2, 2), float(step))}, {"rank": rank, "step": step}
        staged = take(Snapshot({"model": model}, {"rng": own}), rank=rank)
        return Gated(staged, gate) if gate else staged

    return Job(Progress(step), ("interval",), taken, metrics={"loss": float(step)})


def save(run: Run, step: int, *, fails: bool = False, gate: threading.Event | None = None, **words) -> Record | None:
    return run.save(job(step, run.ranks.rank, fails=fails, gate=gate), began=time.monotonic(), **words)


def whole(snapshot: Snapshot, _: Record) -> Whole:
    """A place for all of it, in new memory."""
    return Whole(snapshot)


def on_ranks(count: int, work: Callable[..., object]) -> list[object]:
    """What came of ``work`` on each of so many ranks; where it raised, the test fails."""
    results = on_threads(thread_ranks(count, timeout=TIMEOUT), work)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def save_two(count, root):
    """A run of so many ranks saved its steps 1 and 2."""

    def work(ranks):
        run = open_run(ranks, root)
        for step in (1, 2):
            save(run, step, wait=True)
        run.close()

    on_ranks(count, work)


def test_a_store_knows_how_many_ranks_of_the_machine_use_it(tmp_path, monkeypatch):
    machines = iter(["one", "other", "one", "one", "other"])
    monkeypatch.setattr("distckpt.run.platform.node", lambda: next(machines))
    counts = on_ranks(5, lambda ranks: open_run(ranks, tmp_path).store.neighbours)
    assert sorted(counts) == [2, 2, 3, 3, 3]


def names(root) -> list[str]:
    return [record.name for record in scan(LocalStore(root)).records]


def everything(root) -> dict[str, tuple]:
    files = (path for path in root.rglob("*") if path.is_file() and path.name != layout.LOCK)
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def events(root) -> list[dict]:
    return [json.loads(line) for line in (root / layout.EVENTS).read_text().splitlines()]


# The directory


def test_a_directory_that_another_process_holds_is_refused_on_all_ranks(tmp_path):
    def hold(pipe):
        Attempt.start(LocalStore(tmp_path), Holder.here())
        pipe.send(os.getpid())
        pipe.recv()

    mine, theirs = multiprocessing.Pipe()
    other = multiprocessing.get_context("fork").Process(target=hold, args=(theirs,), daemon=True)
    other.start()
    assert mine.poll(20), "the other process hangs"
    pid = mine.recv()
    refused = on_threads(thread_ranks(3), lambda ranks: open_run(ranks, tmp_path))
    other.kill()
    assert {type(error) for error in refused} == {DirectoryInUse}
    assert all(f"process {pid} " in str(error) for error in refused)


def test_a_rank_that_sees_another_directory_is_named_on_all(tmp_path):
    roots = [tmp_path / "shared", tmp_path / "shared", tmp_path / "own"]
    for root in roots:
        root.mkdir(exist_ok=True)
    soon = timedelta(seconds=0.4)
    told = on_threads(thread_ranks(3, timeout=TIMEOUT), lambda ranks: open_run(ranks, roots[ranks.rank], timeout=soon))
    assert {type(error) for error in told} == {RankFailure} and len({str(error) for error in told}) == 1
    assert set(told[0].failures) == {2} and "own is not the directory that rank 0 writes to" in str(told[0])


def test_a_directory_that_cannot_be_written_is_an_error_on_all(tmp_path):
    full = FaultyStore(LocalStore(tmp_path), fail_at=0)
    told = on_threads(thread_ranks(2), lambda ranks: open_run(ranks, tmp_path, store=full))
    assert {type(error) for error in told} == {RankFailure}
    assert all("rank 0: OSError: [Errno 28] No space left on device" in str(error) for error in told)


def test_after_the_end_the_directory_is_free_and_no_thread_is_left(tmp_path):
    def work(ranks):
        run = open_run(ranks, tmp_path)
        save(run, 1)
        run.close()
        run.close()

    before = threading.active_count()
    on_ranks(2, work)
    on_ranks(2, work)
    assert threading.active_count() == before
    assert json.loads((tmp_path / layout.RUN).read_text())["state"] == "finished"
    told = multiprocessing.Queue()
    other = multiprocessing.get_context("fork").Process(
        target=lambda: told.put(Attempt.start(LocalStore(tmp_path), Holder.here()).number)
    )
    other.start()
    assert told.get(timeout=20) == 3
    other.join(20)


# Saving


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_save_is_committed_and_every_rank_holds_its_record(tmp_path, world_size):
    def work(ranks):
        run = open_run(ranks, tmp_path)
        records = [save(run, step, wait=True) for step in (1, 2)]
        run.close()
        return [*records, run.record]

    told = on_ranks(world_size, work)
    assert all(one == told[0] for one in told)
    assert [record.name for record in told[0]] == ["step-00000001", "step-00000002", "step-00000002"]
    assert names(tmp_path) == ["step-00000001", "step-00000002"] and told[0][0].world_size == world_size


def test_training_goes_on_while_a_save_is_written_and_the_next_waits_for_it(tmp_path):
    gate = threading.Event()

    def work(ranks):
        run = open_run(ranks, tmp_path)
        assert save(run, 1, gate=gate) is None and run.is_busy and run.saved == Progress(1)
        with pytest.raises(TimeoutError, match="save 1 has not ended within 0:00:00.010000; it goes on"):
            run.settle(timedelta(seconds=0.01))
        seen = names(tmp_path)
        ranks.exchange("both have looked", None)
        gate.set()
        save(run, 2)
        first = run.record
        last = run.settle()
        run.close()
        return seen, first.name, last.name

    assert on_ranks(2, work) == [([], "step-00000001", "step-00000002")] * 2


def test_to_wait_no_time_at_all_is_to_look(tmp_path):
    gate = threading.Event()

    def work(ranks):
        run = open_run(ranks, tmp_path)
        save(run, 1, gate=gate)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            run.settle(timedelta(0))
        waited = time.monotonic() - began
        gate.set()
        run.close()
        return waited

    assert on_ranks(1, work)[0] < 5


def test_a_state_is_taken_when_it_is_saved_and_not_when_it_is_written(tmp_path):
    gate = threading.Event()
    took = []

    def work(ranks):
        run = open_run(ranks, tmp_path)
        taken = job(1, 0, gate=gate)
        run.save(replace(taken, snapshot=lambda: took.append(1) or taken.snapshot()), began=time.monotonic())
        seen = list(took)
        gate.set()
        run.close()
        return seen

    assert on_ranks(1, work) == [[1]] and took == [1]


@pytest.mark.parametrize("needs_the_writer", [False, True])
def test_training_goes_on_before_the_writer_begins_unless_it_waits_for_it(tmp_path, needs_the_writer):
    told: list[str] = []

    def work(ranks) -> None:
        run = open_run(ranks, tmp_path)
        plain = job(1, 0)
        snapshot = Ordered(plain.snapshot(), told, needs_the_writer=needs_the_writer)
        run.save(replace(plain, snapshot=lambda: snapshot), began=time.monotonic(), wait=True)
        run.close()

    on_ranks(1, work)
    assert told == (["written", "staged"] if needs_the_writer else ["staged", "written"])
    assert names(tmp_path) == ["step-00000001"]


# What fails


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_on_one_rank_is_raised_on_all_and_the_next_save_is_tried(tmp_path, rank):
    def work(ranks):
        run = open_run(ranks, tmp_path)
        save(run, 1, wait=True)
        with pytest.raises(SaveFailed) as failed:
            save(run, 2, fails=ranks.rank == rank, wait=True)
        assert run.saved is None
        record = save(run, 2, wait=True)
        run.close()
        return str(failed.value), record.name

    told = on_ranks(3, work)
    assert told[0] == told[1] == told[2]
    assert told[0] == (f"save of step 2 (snapshot) failed: rank {rank}: ValueError: no state today", "step-00000002")
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_failure_in_the_background_reaches_all_ranks_at_the_same_step(tmp_path):
    together = threading.Barrier(3)

    def work(ranks):
        run = open_run(ranks, tmp_path)
        save(run, 1, fails=ranks.rank == 1)
        for step in range(1, 10_000):
            together.wait(20)  # as the collectives of training do
            run.boundary(step)
            try:
                run.raise_failure()
            except SaveFailed as failure:
                run.close()
                return step, str(failure)
        raise AssertionError("nothing was raised")

    told = on_ranks(3, work)
    assert told[0] == told[1] == told[2] and "rank 1: ValueError: no state today" in told[0][1]


def test_a_failure_that_nobody_asked_for_is_raised_at_the_end_and_the_directory_is_free(tmp_path):
    def work(ranks):
        run = open_run(ranks, tmp_path)
        save(run, 1, fails=ranks.rank == 1)
        with pytest.raises(SaveFailed, match="rank 1"):
            run.close()
        run.close()

    on_ranks(2, work)
    assert json.loads((tmp_path / layout.RUN).read_text())["state"] == "finished"


def test_the_save_after_a_failure_is_under_way_when_the_failure_is_raised(tmp_path):
    def work(ranks):
        run = open_run(ranks, tmp_path)
        save(run, 1, fails=True)
        with pytest.raises(SaveFailed, match="step 1"):
            save(run, 2)
        record = run.settle()
        run.close()
        return record.name

    assert on_ranks(2, work) == ["step-00000002"] * 2


def lose_one_save(rank: int, root, kind: type[BaseException], at_fault: int) -> list[object]:
    store = FaultyStore(LocalStore(root), error=kind("of the writer's own"))
    # Ranks that waited for this deadline would not end within the time that the test has.
    run = open_run(detect(timedelta(minutes=5)), root, store=store)
    save(run, 1, wait=True)
    before = everything(root / "step-00000001")
    dist.barrier()
    if rank == at_fault:
        store.fail_at = len(store.operations)
    save(run, 2)
    raised = []
    for step in itertools.count(1):
        dist.barrier()  # as the collectives of training do
        run.boundary(step)
        try:
            run.raise_failure()
        except SaveFailed as failure:
            raised = [step, str(failure)]
            break
    store.fail_at = None
    record = save(run, 3, wait=True)
    run.settle()
    run.close()
    return [*raised, record.name, everything(root / "step-00000001") == before]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, MemoryError, RuntimeError, CancelledError])
@pytest.mark.parametrize("at_fault", [0, 1])
def test_whatever_a_save_raises_is_told_once_to_all_at_the_same_step(run_ranks, tmp_path, kind, at_fault):
    first, second = run_ranks(2, lose_one_save, tmp_path, kind, at_fault, seconds=40)
    assert first == second and first[2:] == ["step-00000003", True]
    assert f"rank {at_fault}: {kind.__name__}: of the writer's own" in first[1]
    assert names(tmp_path) == ["step-00000001", "step-00000003"]
    assert [event["event"] for event in events(tmp_path)] == ["saved", "failed", "saved"]


def test_whatever_is_raised_at_whatever_moment_of_a_save_the_ranks_agree_on_what_became_of_it(tmp_path):
    def work(ranks, root, moment):
        store = FaultyStore(LocalStore(root), error=SystemExit("at once"))
        run = open_run(ranks, root, store=store)
        save(run, 1, wait=True)
        store.operations.clear()
        store.fail_at = moment if ranks.rank == 0 else None
        try:
            told = save(run, 2, wait=True).name
        except SaveFailed as failure:
            told = str(failure)
        operations = list(store.operations)
        run.settle()
        store.fail_at = None
        last = save(run, 3, wait=True)
        run.close()
        return told, last.name, operations

    outcomes = []
    for moment in itertools.count():
        root = tmp_path / str(moment)
        root.mkdir()
        (*first, operations), (*second, _) = on_ranks(2, lambda ranks, at=(root, moment): work(ranks, *at))
        assert first == second and first[1] == "step-00000003", moment
        committed = names(root)
        assert ("step-00000002" in committed) == (first[0] == "step-00000002"), moment
        outcomes.append(first[0] == "step-00000002")
        if moment >= len(operations):
            break
    assert outcomes == sorted(outcomes) and 5 < outcomes.index(True) < len(outcomes) - 2


def test_what_no_agreement_of_the_ranks_carried_is_raised_on_all_and_once(tmp_path):
    class Unsweepable(LocalStore):
        def move(self, *names):
            raise RuntimeError("a bug in the cleaning up of a failed save")

        delete_folder = move

    def work(ranks):
        run = open_run(ranks, tmp_path, store=Unsweepable(tmp_path))
        taken = job(1, ranks.rank)
        if ranks.rank == 1:
            (tmp_path / "no-folder").write_bytes(b"")
            staged = taken.snapshot()
            staged.write = lambda store, path: (tmp_path / "no-folder" / "file").write_bytes(b"")
            taken = replace(taken, snapshot=lambda: staged)
        run.save(taken, began=time.monotonic())
        with pytest.raises(SaveFailed):
            run.settle()
        run.settle()
        record = save(run, 2, wait=True)
        run.close()
        return record.name

    assert on_ranks(2, work) == ["step-00000002"] * 2


def test_an_interrupt_of_training_is_raised_as_it_is_and_the_save_goes_on(tmp_path):
    waits = threading.Event()
    gate = threading.Event()

    def interrupted(store, path):
        assert waits.wait(20)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert gate.wait(20)
        return staged.write(store, path)

    (ranks,) = thread_ranks(1)
    run = open_run(ranks, tmp_path)
    staged = job(1, 0).snapshot()
    slow = Gated(staged, gate)
    slow.write = interrupted
    run.save(replace(job(1, 0), snapshot=lambda: slow), began=time.monotonic())
    with pytest.raises(KeyboardInterrupt):
        waits.set()
        run.settle()
    gate.set()
    assert run.settle().name == "step-00000001"
    run.close()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_what_ends_the_program_while_a_state_is_taken_is_raised_as_it_is_and_ends_no_run(tmp_path, kind):
    def ends() -> Staged:
        raise kind("now")

    (ranks,) = thread_ranks(1)
    run = open_run(ranks, tmp_path)
    with pytest.raises(kind, match="now"):
        run.save(replace(job(1, 0), snapshot=ends), began=time.monotonic())
    assert save(run, 1, wait=True).name == "step-00000001"
    run.close()


def test_requests_of_the_leader_are_told_and_failures_are_not_among_them(tmp_path):
    together = threading.Barrier(2)

    def work(ranks):
        run = open_run(ranks, tmp_path)
        save(run, 1, fails=True)
        if ranks.rank == 0:
            run.requests.ask(Request("save", "asked"))
        told = []
        for step in range(1, 10_000):
            together.wait(20)
            told += run.boundary(step)
            if told:
                break
        with pytest.raises(SaveFailed):
            run.close()
        return told

    assert on_ranks(2, work) == [[Request("save", "asked")]] * 2


def test_a_run_that_was_succeeded_raises_on_all_ranks_and_changes_nothing(tmp_path):
    def work(ranks):
        run = open_run(ranks, tmp_path)
        save(run, 1, wait=True)
        ranks.exchange("saved", None)
        if ranks.rank == 0:
            newer = open_run(thread_ranks(1)[0], tmp_path)
            save(newer, 1, wait=True)
        ranks.exchange("taken over", None)
        before = everything(tmp_path)
        with pytest.raises(Superseded, match="attempt 2 .*has taken over from attempt 1"):
            save(run, 2, wait=True)
        ranks.exchange("failed", None)
        after = everything(tmp_path)
        run.close()
        log = str(tmp_path / layout.EVENTS)
        return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} <= {log}

    assert on_ranks(2, work) == [True, True]
    assert names(tmp_path) == ["step-00000001", "step-00000001.2"]


# After the commit


def test_what_is_not_kept_is_deleted_what_is_labelled_is_found_and_left_overs_are_swept(tmp_path):
    def work(ranks):
        run = open_run(ranks, tmp_path, keeping=KeepNewest(2))
        if ranks.rank == 0:
            (tmp_path / ".draft-left-over").write_bytes(b"")
        for step in (1, 2, 3):
            save(run, step, wait=True)
        run.close()

    on_ranks(2, work)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert (tmp_path / layout.LATEST).readlink().name == "step-00000003"
    assert not list(tmp_path.glob(".draft-*")) and not list(tmp_path.glob(".trash-*"))
    assert [(event["event"], event.get("name")) for event in events(tmp_path)] == [
        *(("saved", "step-00000001"), ("saved", "step-00000002")),
        *(("deleted", "step-00000001"), ("saved", "step-00000003")),
    ]


def test_checkpoints_of_another_run_are_neither_counted_nor_deleted(tmp_path):
    def work(ranks):
        run = open_run(ranks, tmp_path, keeping=KeepNewest(1), continues="")
        for step in (3, 4):
            save(run, step, wait=True)
        run.close()

    save_two(1, tmp_path)
    on_ranks(1, work)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000004"]


def test_what_the_leader_does_with_a_record_comes_before_retention(tmp_path):
    def work(ranks):
        run = open_run(ranks, tmp_path, keeping=KeepNewest(1))
        save(run, 1, wait=True)
        seen = []
        save(run, 2, wait=True, then=lambda record: seen.append((record.name, names(tmp_path))))
        run.close()
        return seen

    assert on_ranks(2, work) == [[("step-00000002", ["step-00000001", "step-00000002"])], []]


def operations_after_the_commit(root) -> range:
    store = FaultyStore(LocalStore(root))

    def work(ranks):
        run = open_run(ranks, root, store=store, keeping=KeepNewest(1))
        save(run, 1, wait=True)
        store.operations.clear()
        save(run, 2, wait=True)
        return list(store.operations)

    (operations,) = on_ranks(1, work)
    return range(operations.index("publish step-00000002.committed") + 1, len(operations))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_whatever_fails_after_the_commit_is_a_warning_and_tried_again(tmp_path, caplog, code):
    roots = [tmp_path / str(nth) for nth in range(40)]
    for root in roots:
        root.mkdir()
    moments = operations_after_the_commit(roots[-1])
    assert len(moments) >= 5
    for moment in moments:
        root = roots[moment]
        store = FaultyStore(LocalStore(root), error=OSError(code, os.strerror(code)))

        def work(ranks, store=store, root=root, moment=moment):
            run = open_run(ranks, root, store=store, keeping=KeepNewest(1))
            save(run, 1, wait=True)
            store.operations.clear()
            store.fail_at = moment
            record = save(run, 2, wait=True)
            assert record.name == "step-00000002" and "step-00000002" in names(root)
            store.fail_at = None
            save(run, 3, wait=True)
            run.close()

        caplog.clear()
        on_ranks(1, work)
        assert [record.levelno for record in caplog.records if record.levelno > logging.INFO] == [logging.WARNING]
        assert os.strerror(code) in caplog.text
        assert names(root) == ["step-00000003"], moment
        assert not list(root.glob(".trash-*")) and len(list(root.glob("step-*"))) == 2, moment


@pytest.mark.parametrize("kind", [KeyError, SystemExit, KeyboardInterrupt, MemoryError])
def test_an_event_handler_that_raises_costs_nothing(tmp_path, caplog, kind):
    heard = []

    def handler(event):
        heard.append(event["event"])
        raise kind("of the user's own")

    def work(ranks):
        run = open_run(ranks, tmp_path, on_event=handler)
        save(run, 1, wait=True)
        with pytest.raises(SaveFailed):
            save(run, 2, fails=True, wait=True)
        save(run, 3, wait=True)
        run.close()

    on_ranks(2, work)
    assert heard == ["saved", "failed", "saved"] and f"on_event raised for 'saved': {kind.__name__}" in caplog.text
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, MemoryError])
def test_a_bug_after_the_commit_fails_no_save_and_is_told_with_its_traceback(tmp_path, caplog, kind):
    class Buggy(KeepNewest):
        def to_delete(self, records):
            raise kind("a bug")

    def work(ranks):
        run = open_run(ranks, tmp_path, keeping=Buggy())
        told = [save(run, step, wait=True).name for step in (1, 2)]
        run.close()
        return told

    assert on_ranks(2, work) == [["step-00000001", "step-00000002"]] * 2
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.exc_info[0] for record in warned] == [kind] * 2 and "retention of the run failed" in caplog.text


def test_a_save_is_told_once_with_what_it_cost(tmp_path, caplog):
    def work(ranks):
        run = open_run(ranks, tmp_path)
        save(run, 1)
        run.close()

    with caplog.at_level(logging.INFO, "distckpt"):
        on_ranks(3, work)
    (told,) = [record.getMessage() for record in caplog.records if "saved" in record.getMessage()]
    assert told.startswith("saved step-00000001 (interval)  blocked 0.") and "loss 1" in told
    (event,) = events(tmp_path)
    assert event["durable_seconds"] >= event["blocked_seconds"] and set(event["phases"]) == {"agree", "write", "commit"}
    assert event["step"] == 1 and event["metrics"] == {"loss": 1.0} and event["total_bytes"] > 0


# Labels


def test_a_new_label_is_on_disk_when_the_run_is_settled(tmp_path):
    def work(ranks):
        run = open_run(ranks, tmp_path)
        record = save(run, 1, wait=True)
        run.relabel(record.with_metrics({"acc": 0.5}, ("best",)))
        run.settle()
        told = run.known_records()
        run.close()
        return told, run.record.metrics

    (known, metrics), other = on_ranks(2, work)
    (record,) = scan(LocalStore(tmp_path)).records
    assert known == [record] and record.metrics == {"loss": 1.0, "acc": 0.5} == metrics and "best" in record.reasons
    assert other == ([], metrics)


def test_a_label_for_what_retention_has_deleted_since_brings_nothing_back(tmp_path):
    def work(ranks):
        run = open_run(ranks, tmp_path, keeping=KeepNewest(1))
        older = save(run, 1, wait=True)
        save(run, 2)
        run.relabel(older.with_metrics({"acc": 0.5}))
        run.close()

    on_ranks(2, work)
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000002", "step-00000002.committed"]


# Restoring


def test_a_restore_waits_for_the_save_in_flight(tmp_path):
    def work(ranks):
        run = open_run(ranks, tmp_path)
        save(run, 1)
        restored = run.restore(whole)
        run.close()
        return restored.record.name, restored.fitted.snapshot.own["rng"]

    assert on_ranks(2, work) == [("step-00000001", {"rank": rank, "step": 1}) for rank in range(2)]


def test_what_a_resume_found_damaged_is_left_alone_and_not_counted(tmp_path):
    def second(ranks):
        run = open_run(ranks, tmp_path, keeping=KeepNewest(1))
        restored = run.restore(whole)
        assert isinstance(restored, Restored) and restored.skipped == ("step-00000002",)
        save(run, 3, wait=True)
        run.close()
        return restored.record.name

    save_two(2, tmp_path)
    (tmp_path / "step-00000002" / layout.rank_file(1)).write_bytes(b"damaged")
    assert on_ranks(2, second) == ["step-00000001"] * 2
    assert names(tmp_path) == ["step-00000002", "step-00000003"]

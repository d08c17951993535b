from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from distckpt import layout
from distckpt.attempt import Attempt, Holder
from distckpt.errors import DirectoryInUse, Superseded
from distckpt.stores import spares
from distckpt.stores.local import LocalStore
from distckpt.testing import FaultyStore

HERE = Holder("here", 11, "2026-03-01T12:00:00+00:00")
LAUNCHERS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def store(tmp_path) -> LocalStore:
    return LocalStore(tmp_path)


def start(store, holder=HERE) -> Attempt:
    return Attempt.start(store, holder)


def told(store) -> dict:
    return json.loads(store.read(layout.RUN))


class Elsewhere:
    """Another process that holds a directory, until it is killed or asked to end."""

    def __init__(self, root, **launcher):
        context = multiprocessing.get_context("fork")
        self.mine, theirs = context.Pipe()
        self.process = context.Process(target=self.hold, args=(root, theirs, launcher), daemon=True)
        self.process.start()
        assert self.mine.poll(20), "the other process hangs"
        self.holder: Holder = self.mine.recv()

    @staticmethod
    def hold(root, pipe, launcher):
        os.environ.update(launcher)
        attempt = Attempt.start(LocalStore(root), Holder.here())
        pipe.send(attempt.holder)
        pipe.recv()
        attempt.end()
        pipe.send("ended")

    def end(self):
        self.mine.send("end")
        assert self.mine.poll(20)
        self.process.join(20)

    def kill(self):
        self.process.kill()
        self.process.join(20)


@pytest.fixture
def elsewhere(tmp_path):
    running = []

    def begin(**launcher) -> Elsewhere:
        running.append(Elsewhere(tmp_path, **launcher))
        return running[-1]

    yield begin
    for one in running:
        one.kill()


# Numbers


def test_every_start_of_a_run_raises_its_number_and_keeps_its_name(store):
    attempts = []
    for _ in range(4):
        attempts.append(start(store))
        attempts[-1].end()
    assert [attempt.number for attempt in attempts] == [1, 2, 3, 4]
    assert len({attempt.run for attempt in attempts}) == 1


def test_a_start_that_continues_a_run_is_that_run_where_it_is_there_or_nothing_is(tmp_path):
    store = LocalStore(tmp_path)
    first = Attempt.start(store, HERE, continues="moved here from elsewhere")
    assert first.run == "moved here from elsewhere"
    assert Attempt.start(store, HERE, continues=first.run).run == first.run


@pytest.mark.parametrize("continues", ["", "another run"])
def test_a_start_that_does_not_continue_what_is_there_is_a_new_run_with_a_higher_number(store, continues):
    first = start(store)
    second = Attempt.start(store, HERE, continues=continues)
    assert second.run not in ("", first.run, continues) and second.number == 2


def test_two_directories_are_two_runs(tmp_path):
    roots = [tmp_path / "a", tmp_path / "b"]
    for root in roots:
        root.mkdir()
    first, second = (start(LocalStore(root)) for root in roots)
    assert first.run != second.run


def test_only_the_file_of_the_newest_attempt_is_kept(store):
    for _ in range(3):
        start(store).end()
    assert [name for name in store.list() if layout.parse_attempt(name)] == [layout.attempt_file(3)]


def test_the_number_rises_where_the_file_of_the_last_attempt_was_lost(store):
    start(store).end()
    store.delete(layout.attempt_file(1))
    assert start(store).number == 2


def test_the_number_rises_over_that_of_an_attempt_whose_mark_was_torn(store):
    first = start(store)
    store.put(layout.attempt_file(7), b"a mark that was torn")
    second = start(store)
    assert second.number == 8 and second.run == first.run


def test_the_state_says_who_holds_the_directory_until_it_does_not(store):
    attempt = start(store)
    assert told(store) == {
        "run": attempt.run,
        "attempt": 1,
        "state": "running",
        "holder": {"host": "here", "pid": 11, "since": HERE.since, "job": ""},
    }
    attempt.end()
    assert told(store)["state"] == "finished"


# One writer


def test_a_live_holder_in_another_process_is_named_by_host_pid_and_time(store, elsewhere):
    other = elsewhere()
    with pytest.raises(DirectoryInUse) as refused:
        start(store)
    words = str(refused.value)
    assert socket.gethostname() in words and f"process {other.process.pid} " in words
    assert other.holder.since in words and str(store.root) in words
    assert "directory of its own" in words


def test_a_start_that_was_refused_changes_nothing(store, elsewhere):
    elsewhere()
    before = {name: (store.root / name).stat().st_ino for name in store.list()}
    with pytest.raises(DirectoryInUse):
        start(store)
    assert {name: (store.root / name).stat().st_ino for name in store.list()} == before


def test_a_holder_that_was_killed_is_succeeded_without_a_word(store, elsewhere, caplog):
    other = elsewhere()
    other.kill()
    assert start(store, replace(HERE, host=other.holder.host)).number == 2
    assert not caplog.records


def test_a_holder_that_ended_is_succeeded_without_a_word(store, elsewhere, caplog):
    elsewhere().end()
    assert start(store).number == 2
    assert not caplog.records


def test_a_holder_on_another_host_that_did_not_end_in_order_is_named_in_a_warning(store, caplog):
    start(store)  # its lock is that of this process, as after a crash of its host
    assert start(LocalStore(store.root), replace(HERE, host="there")).number == 2
    assert "taking over from process 11 on here" in caplog.text


def test_an_end_frees_the_directory_for_another_process(store, elsewhere):
    start(store).end()
    assert elsewhere().holder.pid != os.getpid()


@pytest.mark.parametrize("variable", LAUNCHERS)
def test_the_same_job_takes_over_from_its_own_survivors(store, elsewhere, monkeypatch, variable):
    elsewhere(**{variable: "job-17"})
    monkeypatch.setenv(variable, "job-17")
    assert start(store, Holder.here()).number == 2


@pytest.mark.parametrize(("theirs", "ours"), [("job-17", "job-18"), ("job-17", ""), ("none", "none")])
@pytest.mark.parametrize("variable", LAUNCHERS[1:])
def test_another_job_does_not(store, elsewhere, monkeypatch, variable, theirs, ours):
    elsewhere(**{variable: theirs})
    monkeypatch.setenv(variable, ours)
    with pytest.raises(DirectoryInUse):
        start(store, Holder.here())


def test_a_job_of_slurm_is_not_one_of_torchrun_with_the_same_number(store, elsewhere, monkeypatch):
    elsewhere(SLURM_JOB_ID="17")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "17")
    with pytest.raises(DirectoryInUse, match="of job slurm 17"):
        start(store, Holder.here())


def test_of_starts_at_one_moment_each_has_a_number_of_its_own_or_is_refused(tmp_path):
    together = threading.Barrier(6)

    def begin(turn) -> int | None:
        together.wait(10)
        try:
            return start(LocalStore(tmp_path)).number
        except DirectoryInUse:
            return None

    with ThreadPoolExecutor(6) as threads:
        for last in range(0, 60, 6):
            numbers = [number for number in threads.map(begin, range(6)) if number is not None]
            assert numbers and len(set(numbers)) == len(numbers)
            assert min(numbers) > 0 and max(numbers) >= last // 6 + 1


def test_of_starts_at_one_moment_the_one_that_lost_says_so(store):
    # The other one published its number between our look and our own.
    class Slow(LocalStore):
        def publish(self, path, data):
            LocalStore(self.root).publish(path, data)
            super().publish(path, data)

    with pytest.raises(DirectoryInUse, match="at the same moment"):
        start(Slow(store.root))


def test_a_number_that_two_faster_ones_have_passed_is_not_taken_again(store):
    class Slow(LocalStore):
        def publish(self, path, data):
            assert [start(LocalStore(self.root)).number for _ in range(2)] == [1, 2]
            super().publish(path, data)

    with pytest.raises(DirectoryInUse, match="at the same moment"):
        start(Slow(store.root))
    assert told(store)["attempt"] == 2 and start(store).number == 3


# A fence


def test_the_newest_attempt_may_go_on(store):
    first = start(store)
    first.check()
    first.check()


def test_an_attempt_that_was_succeeded_is_told_by_whom(store):
    first = start(store)
    start(store, replace(HERE, pid=22))
    with pytest.raises(Superseded, match=r"attempt 2 \(process 22 on here, since .*\) has taken over from attempt 1"):
        first.check()


@pytest.mark.parametrize("damaged", [{layout.RUN}, {layout.attempt_file(2)}, {layout.RUN, layout.attempt_file(2)}])
def test_an_attempt_that_was_succeeded_is_told_whatever_is_damaged(store, damaged):
    first = start(store)
    start(store)
    for name in damaged:
        store.put(name, b"\0")
    with pytest.raises(Superseded, match="attempt 2 .*has taken over"):
        first.check()


def test_an_attempt_is_not_told_that_it_succeeded_itself(store):
    first = start(store)
    store.put(layout.attempt_file(2), b"a mark that was torn")
    with pytest.raises(Superseded, match="attempt 2 has taken over from attempt 1"):
        first.check()


def test_at_its_end_nothing_is_kept_to_be_written_over_whether_it_was_succeeded_or_not(scratch, monkeypatch):
    monkeypatch.setattr(spares, "LEAST_BYTES", 1)
    for is_succeeded in (False, True):
        store = LocalStore(scratch, recycles=True)
        attempt = start(store)
        store.make_folder("folder")
        store.put("folder/file", b"bytes")
        store.recycle_folder("folder")
        if is_succeeded:
            start(LocalStore(scratch), replace(HERE, pid=22))
        assert list(scratch.glob(".spare-*"))
        attempt.end()
        assert not list(scratch.glob(".spare-*"))


def test_the_end_of_an_attempt_that_was_succeeded_changes_nothing(store):
    first = start(store)
    start(store, replace(HERE, pid=22))
    before = store.read(layout.RUN)
    first.end()
    assert store.read(layout.RUN) == before


# A state that cannot be read


def fifo(place):
    os.mkfifo(place)


def link(place):
    place.symlink_to("/dev/null")


def missing(place):
    pass


def content(data):
    return lambda place: place.write_bytes(data)


STATE = {"run": "x", "state": "finished", "holder": {"host": "here", "pid": 1, "since": "", "job": ""}}
DAMAGED = [
    *(fifo, link, missing, content(b""), content(b"{"), content(b"\0" * 100), content(b"[]"), content(b"{}")),
    content(b'{"run":"x","attempt":true,"state":"running","holder":{}}'),
    content(b'{"run":"x","run":"y","attempt":1,"state":"finished","holder":{}}'),
    *(content(json.dumps(STATE | {"attempt": number}).encode()) for number in (-5, 0, 10**18, 10**40)),
    content(b"[" * 100_000),
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_state_does_not_stop_a_run_and_is_written_anew(store, damage, caplog):
    first = start(store)
    first.end()
    (store.root / layout.RUN).unlink()
    damage(store.root / layout.RUN)
    again = start(store)
    assert again.number == 2 and again.run == first.run
    assert told(store)["attempt"] == 2
    assert damage is missing or "goes on without what run.json said" in caplog.text


def test_a_start_that_fails_at_any_moment_does_not_stop_the_next(tmp_path):
    numbers = []
    for moment in range(20):
        root = tmp_path / str(moment)
        root.mkdir()
        start(LocalStore(root)).end()
        store = FaultyStore(LocalStore(root), fail_at=moment)
        try:
            numbers.append(start(store).number)
        except OSError:
            numbers.append(start(LocalStore(root)).number)
        else:
            break
    assert len(numbers) == 4 and set(numbers) <= {2, 3}


def test_a_start_that_failed_does_not_hold_the_directory(store, elsewhere):
    with pytest.raises(OSError):
        start(FaultyStore(store, fail_at=1))
    assert elsewhere().holder.pid != os.getpid()


def test_a_disk_that_cannot_be_read_is_an_error_and_no_new_run(store, monkeypatch):
    start(store).end()

    def preadv(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken, pytest.raises(OSError, match="run.json"):
        broken.setattr(os, "preadv", preadv)
        start(store)


def test_a_holder_whose_state_is_not_written_yet_is_known_by_its_mark(store, elsewhere):
    other = elsewhere()
    store.delete(layout.RUN)
    with pytest.raises(DirectoryInUse, match=f"process {other.process.pid} "):
        start(store)


def test_this_process_is_named_as_it_is(monkeypatch):
    holder = Holder.here()
    assert (holder.host, holder.pid, holder.job) == (socket.gethostname(), os.getpid(), "")
    assert re.fullmatch(r"process \d+ on \S+, since \d{4}-\d\d-\d\dT\S+\+00:00", str(holder))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert "of job slurm 17 on" in str(Holder.here())

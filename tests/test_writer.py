"""One thread does what it is given, in order, and survives what goes wrong in it."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from distckpt.writer import Writer


@pytest.fixture
def writer():
    one = Writer("test-writer")
    yield one
    one.close(5)


def test_jobs_run_one_at_a_time_in_the_order_in_which_they_came(writer):
    done: list[int] = []
    futures = [writer.submit(lambda nth=nth: done.append(nth)) for nth in range(100)]
    assert writer.wait(5) and not writer.is_busy
    assert done == list(range(100)) and all(future.done() for future in futures)


def test_an_error_is_in_the_future_of_its_job_and_the_next_job_runs(writer):
    def fail() -> None:
        raise OSError(28, "No space left on device")

    failed, after = writer.submit(fail), writer.submit(lambda: "done")
    with pytest.raises(OSError, match="No space"):
        failed.result(5)
    assert after.result(5) == "done"


def test_a_job_that_was_cancelled_in_time_does_not_run_and_the_next_one_does(writer):
    go, done = threading.Event(), []
    writer.submit(lambda: go.wait(5))
    cancelled, after = writer.submit(lambda: done.append("cancelled")), writer.submit(lambda: done.append("after"))
    assert cancelled.cancel()
    go.set()
    after.result(5)
    assert done == ["after"] and writer.wait(5)


def test_even_what_would_end_a_program_is_in_the_future_of_its_job(writer):
    failed, after = writer.submit(sys.exit), writer.submit(lambda: "done")
    with pytest.raises(SystemExit):
        failed.result(5)
    assert after.result(5) == "done"


def test_it_is_busy_until_the_job_ends_and_waiting_is_bounded(writer):
    go = threading.Event()
    future = writer.submit(lambda: go.wait(5))
    assert writer.is_busy and not writer.wait(0.01)
    go.set()
    assert future.result(5) and writer.wait(5) and not writer.is_busy


def test_close_finishes_what_was_submitted_and_takes_nothing_more(writer):
    go = threading.Event()
    futures = [writer.submit(lambda: go.wait(5)), writer.submit(lambda: True)]
    go.set()
    assert writer.close(5) and writer.close(5)
    assert all(future.result(0) for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit(lambda: True)


def test_close_gives_up_in_time_and_says_so(caplog):
    one, go = Writer("slow-writer"), threading.Event()
    one.submit(lambda: go.wait(10))
    assert not one.close(0.01)
    assert "slow-writer: given up after 0.01 seconds" in caplog.text
    go.set()


def test_the_end_of_the_process_waits_for_what_was_submitted():
    script = """
import threading, time
from distckpt.writer import Writer
writer = Writer("last")
started = threading.Event()
def job():
    started.set()
    time.sleep(0.3)
    print("finished", flush=True)
writer.submit(job)
started.wait()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert ended.stdout == "finished\n"

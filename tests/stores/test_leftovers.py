"""What killed processes have left is removed, and nothing of those that go on."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from distckpt import layout
from distckpt.stores import leftovers
from distckpt.stores.appearing import appearing

forked = multiprocessing.get_context("fork")


def write(target: Path, pipe: Connection) -> None:
    with appearing(target) as draft:
        draft.mkdir()
        (draft / "inside").write_text("half")
        pipe.send(draft.name)
        pipe.recv()
        (draft / "inside").write_text("whole")
    os._exit(0)


@contextmanager
def another_process(target: Path) -> Iterator[tuple[BaseProcess, Connection, Path]]:
    """A process that is in the middle of writing something to ``target``, what lets it go on, and its draft."""
    here, there = forked.Pipe()
    process = forked.Process(target=write, args=(target, there))
    process.start()
    try:
        yield process, here, target.with_name(here.recv())
    finally:
        process.kill()
        process.join()


def put(target: Path) -> None:
    with appearing(target) as draft:
        draft.write_text("new")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_has_left_is_gone_when_the_next_begins(tmp_path, caplog):
    with another_process(tmp_path / "one") as (process, _, draft):
        process.kill()
        process.join()
    assert names(tmp_path) == [draft.name]
    with caplog.at_level(logging.INFO, "distckpt"), appearing(tmp_path / "two") as draft_of_two:
        assert names(tmp_path) == []
        draft_of_two.write_text("new")
    assert f"{draft} was left by an export that was killed" in caplog.text and names(tmp_path) == ["two"]


def test_what_another_process_is_writing_stays_and_comes_to_be_whole(tmp_path):
    with another_process(tmp_path / "one") as (process, pipe, draft):
        put(tmp_path / "two")
        assert names(tmp_path) == [draft.name, "two"]
        pipe.send("go on")
        process.join()
    assert names(tmp_path) == ["one", "two"] and (tmp_path / "one" / "inside").read_text() == "whole"


def test_what_was_left_stays_as_long_as_anybody_writes_there(tmp_path):
    with another_process(tmp_path / "one") as (_, _, alive):
        with another_process(tmp_path / "two") as (_, _, left):
            pass
        put(tmp_path / "three")
        assert names(tmp_path) == sorted([alive.name, left.name, "three"])
    put(tmp_path / "four")
    assert names(tmp_path) == ["four", "three"]


def test_what_another_thread_is_writing_stays(tmp_path):
    begun, may_end = threading.Event(), threading.Event()

    def write_slowly() -> None:
        with appearing(tmp_path / "one") as draft:
            draft.write_text("whole")
            begun.set()
            may_end.wait(20)

    thread = threading.Thread(target=write_slowly)
    thread.start()
    assert begun.wait(20)
    put(tmp_path / "two")
    may_end.set()
    thread.join()
    assert names(tmp_path) == ["one", "two"]


@pytest.mark.parametrize("name", [layout.export_draft("one", "0" * 8, "1" * 8), ".export-mine", ".replaced-one", "one"])
def test_what_may_be_another_machines_or_is_no_draft_stays(tmp_path, caplog, name):
    (tmp_path / name).mkdir()
    with caplog.at_level(logging.INFO, "distckpt"):
        put(tmp_path / "two")
    assert names(tmp_path) == sorted([name, "two"])
    assert (f"{tmp_path / name} is of an export on another machine" in caplog.text) == name.endswith("-11111111")


def test_who_cannot_share_the_folder_says_so_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(leftovers, "_PATIENCE_SECONDS", 0.2)
    with open_folder(tmp_path) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with (
            pytest.raises(BlockingIOError, match=f"somebody has locked it .* '{tmp_path}'"),
            appearing(tmp_path / "one"),
        ):
            raise AssertionError("it should not come so far")
    put(tmp_path / "one")
    assert names(tmp_path) == ["one"]


@contextmanager
def open_folder(place: Path) -> Iterator[int]:
    fd = os.open(place, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)

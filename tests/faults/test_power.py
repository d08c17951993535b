"""The power cut leaves what POSIX lets it leave, no less and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
from disk_tree import File, Link, build, without_identity
from power import Disk, Model, cuts
from shim import Call

NUMBERS = {".": 1, "old": 2, "new": 3, "folder": 4, "folder/in": 5}


def call(name: str, path: str, other: str = "", *, data: bytes = b"", at: int = 0, error: int = 0) -> Call:
    return Call(9, name, error, NUMBERS[path], path, other, at, len(data), data)


def empty_disk(model: Model = "posix") -> Disk:
    disk = Disk(model, folders={0: {}}, kept={0: {}}, inodes={1: 0})
    for one in (call("create", "old"), call("write", "old", data=b"12"), call("fsync", "old"), call("fsync", ".")):
        disk.apply(one)
    return disk


def left(disk: Disk, *calls: Call) -> list[dict[str, object]]:
    """The states after the calls, each once."""
    for one in calls:
        disk.apply(one)
    states: list[dict[str, object]] = []
    for tree in disk.after_power_cut():
        if (state := without_identity(tree)) not in states:
            states.append(state)
    return states


def test_what_was_fsynced_with_its_name_is_there() -> None:
    assert left(empty_disk()) == [{"old": b"12"}]


def test_bytes_without_fsync_may_be_missing_zeros_torn_or_out_of_order() -> None:
    states = left(empty_disk(), call("write", "old", data=b"3456", at=2))
    assert {state["old"] for state in states} == {b"12", b"12\0\0\0\0", b"12\0\x0056", b"1234", b"123456"}


def test_a_journal_keeps_bytes_in_their_order() -> None:
    states = left(empty_disk("ordered"), call("write", "old", data=b"3456", at=2))
    assert b"12\0\x0056" not in [state["old"] for state in states]


def test_a_name_needs_an_fsync_of_its_folder() -> None:
    made = call("create", "new"), call("write", "new", data=b"xy"), call("fsync", "new")
    assert {"old": b"12"} in left(empty_disk(), *made)
    assert left(empty_disk(), *made, call("fsync", ".")) == [{"old": b"12", "new": b"xy"}]


def test_a_journal_keeps_the_name_of_a_file_that_was_fsynced() -> None:
    made = call("create", "new"), call("write", "new", data=b"xy"), call("fsync", "new")
    assert left(empty_disk("ordered"), *made) == [{"old": b"12", "new": b"xy"}]


def test_names_persist_in_any_order_but_a_journal_keeps_it() -> None:
    calls = call("mkdir", "folder"), call("unlink", "old")
    later_one_alone: dict[str, object] = {}
    assert later_one_alone in left(empty_disk(), *calls)
    assert later_one_alone not in left(empty_disk("ordered"), *calls)


def test_a_rename_over_a_file_leaves_the_old_one_or_the_new_one() -> None:
    calls = call("create", "new"), call("write", "new", data=b"xy"), call("fsync", "new"), call("fsync", ".")
    states = left(empty_disk(), *calls, call("rename", "new", "old"))
    assert states == [{"old": b"xy"}, {"old": b"12", "new": b"xy"}]


def test_a_rename_across_folders_is_two_changes() -> None:
    states = left(empty_disk(), call("mkdir", "folder"), call("fsync", "."), call("rename", "old", "folder/in"))
    assert {"folder": None} in states, "the old name may be gone before the new one is there"
    assert {"folder": None, "folder/in": b"12", "old": b"12"} in states


def test_two_names_are_exchanged_at_once_or_not() -> None:
    made = call("create", "new"), call("write", "new", data=b"xy"), call("fsync", "new"), call("fsync", ".")
    states = left(empty_disk(), *made, call("exchange", "new", "old"))
    assert states == [{"old": b"xy", "new": b"12"}, {"old": b"12", "new": b"xy"}]


def test_a_folder_whose_name_is_missing_takes_all_in_it_with_it() -> None:
    calls = call("mkdir", "folder"), call("create", "folder/in"), call("fsync", "folder/in"), call("fsync", "folder")
    assert left(empty_disk(), *calls) == [{"old": b"12", "folder": None, "folder/in": b""}, {"old": b"12"}]


def test_a_second_fsync_does_not_bring_lost_bytes_back() -> None:
    calls = call("write", "old", data=b"34", at=2), call("fsync", "old", error=5), call("fsync", "old")
    assert {"old": b"12"} in left(empty_disk(), *calls)


def test_an_inode_number_that_is_used_again_is_another_file() -> None:
    states = left(empty_disk(), call("unlink", "old"), call("create", "old"))
    assert states == [{"old": b""}, {}, {"old": b"12"}]


def test_a_call_without_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no model of fallocate-mode old"):
        empty_disk().apply(call("fallocate-mode", "old"))


def test_cuts_know_what_had_been_said_by_then() -> None:
    note = Call(0, "note", 0, 0, "acknowledged 1", "", 0, 0, b"")
    found = cuts(empty_disk(), [call("unlink", "old"), call("fsync", "."), note])
    assert [(cut.told, without_identity(cut.tree)) for cut in found] == [
        ("", {}),
        ("", {"old": b"12"}),
        ("acknowledged 1", {}),
    ]


def test_a_state_can_be_built_and_scanned(tmp_path: Path) -> None:
    tree = {"folder": None, "folder/in": File(b"1", 7), "same": File(b"1", 7), "way": Link("folder")}
    build(tree, tmp_path)
    assert without_identity(Disk.scan(tmp_path).tree()) == without_identity(tree)
    assert (tmp_path / "same").samefile(tmp_path / "folder/in")

"""The shim sees what a process does to its files, and does to it what it was told."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import shim
from disk_tree import without_identity
from forks import Forks, Order
from power import Disk
from shim import Action, Fault, Kind
from touches import put, put_beside, put_in_turns, read, report_errors, touch_in_every_way


def trace_of(forks: Forks, work: Callable[..., None], folder: Path, kinds: Kind = Kind.CHANGES) -> list[shim.Call]:
    root = folder / "root"
    root.mkdir(exist_ok=True)
    outcome = forks.run(work, root, trace=folder / "trace", kinds=kinds)
    assert outcome.code == 0, outcome.complained
    return shim.read_trace(folder / "trace")


def test_a_careful_write_is_seen_as_its_calls(forks: Forks, tmp_path: Path) -> None:
    calls = trace_of(forks, put, tmp_path)
    told = ["create draft", "write draft", "fsync draft", "close draft", "rename draft name", "fsync ."]
    assert [str(call) for call in calls] == told
    assert [call.number for call in calls] == [1, 2, 3, 4, 5, 6]
    assert calls[1].content == b"0123456789"


def test_reads_are_seen_where_asked_for(forks: Forks, tmp_path: Path) -> None:
    trace_of(forks, put, tmp_path)
    shutil.rmtree(tmp_path / "trace")
    calls = trace_of(forks, read, tmp_path, Kind.READS)
    assert [str(call) for call in calls] == ["list .", "open name", "read name", "read name"]


def test_every_way_to_change_a_file_is_in_the_trace(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    disk = Disk.scan(tmp_path / "root")
    for call in trace_of(forks, touch_in_every_way, tmp_path):
        disk.apply(call)
    assert without_identity(disk.tree()) == without_identity(Disk.scan(tmp_path / "root").tree())
    assert set(disk.tree()) == {"copied", "named", "one", "tree", "tree/three", "way"}


def test_processes_with_one_trace_are_in_it_in_the_order_of_their_calls(forks: Forks, tmp_path: Path) -> None:
    (root := tmp_path / "root").mkdir()
    disk = Disk.scan(root)
    words = [{"name": "one"}, {"name": "two"}]
    orders = [Order(put_in_turns, root, told, trace=tmp_path / "trace", who=who) for who, told in enumerate(words)]
    (outcomes,) = forks.run_groups([orders])
    assert [one.code for one in outcomes] == [0, 0], outcomes
    calls = shim.read_trace(tmp_path / "trace")
    whose = [call.who for call in calls]
    assert whose.count(0) == whose.count(1) and whose != sorted(whose)
    for call in calls:
        disk.apply(call)
        assert call.name != "write" or call.content.startswith(words[call.who]["name"].encode())
    assert without_identity(disk.tree()) == without_identity(Disk.scan(root).tree())


@pytest.mark.parametrize(
    ("call", "left"),
    [(1, {}), (2, {"draft": 0}), (5, {"draft": 10}), (6, {"name": 10})],
    ids=["before the file", "before its bytes", "before its name", "before the last call"],
)
def test_killed_before_the_chosen_call(forks: Forks, tmp_path: Path, call: int, left: dict[str, int]) -> None:
    outcome = forks.run(put, tmp_path, fault=Fault(call, Action.KILL))
    assert outcome.was_killed
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == left


def test_killed_halfway_through_a_write(forks: Forks, tmp_path: Path) -> None:
    assert forks.run(put, tmp_path, fault=Fault(2, Action.KILL_HALFWAY)).was_killed
    assert (tmp_path / "draft").read_bytes() == b"01234"


def test_not_killed_after_the_last_call(forks: Forks, tmp_path: Path) -> None:
    assert forks.run(put, tmp_path, fault=Fault(7, Action.KILL)).code == 0


@pytest.mark.parametrize("call", range(1, 7))
def test_the_chosen_call_fails_and_does_nothing(forks: Forks, tmp_path: Path, call: int) -> None:
    outcome = forks.run(report_errors, tmp_path, fault=Fault(call, Action.FAIL, errno.ENOSPC))
    assert [line.split()[0] for line in outcome.said] == ["ENOSPC"]
    assert (tmp_path / "name").exists() == (call > 5)


def test_a_full_disk_stays_full(forks: Forks, tmp_path: Path) -> None:
    calls = trace_of(forks, put, tmp_path)
    assert len(calls) == 6
    (tmp_path / "again").mkdir()
    fault = Fault(2, Action.FAIL_FROM_HERE, errno.ENOSPC)
    outcome = forks.run(report_errors, tmp_path / "again", fault=fault, trace=tmp_path / "full")
    assert outcome.said == ["ENOSPC None"]
    assert (tmp_path / "again/draft").read_bytes() == b""


def test_half_a_write_is_no_error(forks: Forks, tmp_path: Path) -> None:
    assert forks.run(put, tmp_path, fault=Fault(2, Action.SHORTEN)).code == 0
    assert (tmp_path / "name").read_bytes() == b"01234"


def test_what_lies_outside_the_root_is_let_alone(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    outcome = forks.run(put_beside, tmp_path / "root", fault=Fault(1, Action.KILL))
    assert outcome.code == 0
    assert (tmp_path / "name").exists()


def test_a_missing_compiler_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="C compiler named cc"):
        shim.build(tmp_path)

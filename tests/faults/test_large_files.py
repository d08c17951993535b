"""What passes the page cache by is under the laws of all else: not on the disk before an fsync, whole or an error."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import large_files
import power
import pytest
import shim
from disk_tree import build
from disks import skip_without_direct
from forks import Forks, Outcome
from large_files import newest, put_read_ahead, read_whole, save_steps
from power import Disk, Model
from shim import Action, Call, Fault, Kind

STEPS = [1, 2]
ONE_FILE = ["create", "direct", *["write"] * 2, "cached", *["write"] * 2, "direct", "write", "fsync", "close"]


@pytest.fixture(autouse=True)
def disk(tmp_path: Path) -> None:
    skip_without_direct(tmp_path)


@pytest.fixture(scope="module")
def forks(library: Path) -> Iterator[Forks]:
    with Forks(library, "large_files") as running:
        yield running


def traced(forks: Forks, folder: Path, fault: Fault | None = None) -> list[Call]:
    (folder / "root").mkdir(parents=True, exist_ok=True)
    outcome = forks.run(save_steps, folder / "root", trace=folder / "trace", fault=fault, steps=STEPS)
    assert outcome.code == 0, outcome.complained
    return shim.read_trace(folder / "trace")


def of_the_second_file(calls: list[Call]) -> list[Call]:
    return [call for call in calls if call.path == "file-2" and call.number]


def go_wrong(forks: Forks, folder: Path, fault: Fault) -> Outcome:
    folder.mkdir()
    return forks.run(save_steps, folder, fault=fault, steps=[*STEPS, 3])


def test_the_files_do_pass_the_page_cache_by(forks: Forks, tmp_path: Path) -> None:
    calls = of_the_second_file(traced(forks, tmp_path))
    assert [call.name for call in calls] == ONE_FILE
    assert [call.length for call in calls if call.name == "write"] == [68 * 1024, 64 * 1024, 100, 3996, 128 * 1024]
    assert b"".join(call.content for call in calls) == large_files.content(2)


def test_killed_at_every_call(forks: Forks, tmp_path: Path) -> None:
    faults = shim.kills(traced(forks, tmp_path / "undisturbed"))
    assert len(faults) > 40
    for fault in faults:
        (root := tmp_path / f"{fault.action.name}-{fault.call}").mkdir()
        outcome = forks.run(save_steps, root, fault=fault, steps=STEPS)
        assert outcome.was_killed, fault
        assert newest(root) >= outcome.last("acknowledged"), fault


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=["EIO", "ENOSPC", "EDQUOT"])
def test_an_error_at_any_call_fails_that_file_by_name_and_leaves_nothing_of_it(
    forks: Forks, tmp_path: Path, error: int
) -> None:
    for call in of_the_second_file(traced(forks, tmp_path / "undisturbed")):
        root = tmp_path / str(call.number)
        outcome = go_wrong(forks, root, Fault(call.number, Action.FAIL, error))
        assert [line.split()[0] for line in outcome.said] == ["acknowledged", "failed", "acknowledged"], call
        assert os.strerror(error) in outcome.said[1] and f"{root / 'file-2'}" in outcome.said[1], call
        assert newest(root) == 3 and not (root / "file-2").exists(), call


def test_a_disk_that_is_full_from_any_write_on_fails_that_file(forks: Forks, tmp_path: Path) -> None:
    for call in of_the_second_file(traced(forks, tmp_path / "undisturbed")):
        if call.name == "write":
            root = tmp_path / str(call.number)
            outcome = go_wrong(forks, root, Fault(call.number, Action.FAIL_FROM_HERE, errno.ENOSPC))
            assert outcome.last("failed") == 2 and outcome.last("acknowledged") == newest(root) == 3, call
            assert not (root / "file-2").exists(), call


def test_a_write_that_does_half_is_gone_on_with(forks: Forks, tmp_path: Path) -> None:
    writes = [call for call in of_the_second_file(traced(forks, tmp_path / "undisturbed")) if call.name == "write"]
    assert len(writes) == 5
    for call in writes:
        root = tmp_path / str(call.number)
        outcome = go_wrong(forks, root, Fault(call.number, Action.SHORTEN))
        assert outcome.last("acknowledged") == newest(root) == 3 and not outcome.last("failed"), outcome


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP], ids=["EINVAL", "ENOTSUP"])
def test_where_it_is_refused_the_same_bytes_go_through_the_page_cache_and_nobody_asks_again(
    forks: Forks, tmp_path: Path, error: int
) -> None:
    of_second = of_the_second_file(traced(forks, tmp_path / "undisturbed"))
    asked = [call.name for call in of_second].index("direct")
    for call in of_second[asked : asked + 3]:  # to pass it by, and the two writes that do
        calls = traced(forks, tmp_path / str(call.number), Fault(call.number, Action.FAIL, error))
        assert newest(tmp_path / str(call.number) / "root") == 2, call
        assert not any(later.name == "direct" for later in calls if later.number > call.number), call


@pytest.mark.parametrize("model", ["posix", "ordered"])
def test_the_power_cut_at_every_call(forks: Forks, tmp_path: Path, model: Model) -> None:
    cuts = power.cuts(*empty_disk_and_calls(forks, tmp_path / "run", model))
    assert len(cuts) > 30
    for number, cut in enumerate(cuts):
        (root := tmp_path / str(number)).mkdir()
        build(cut.tree, root)
        words = cut.told.split()
        assert newest(root) >= (int(words[1]) if words else 0), cut.after


def test_what_passed_the_page_cache_by_is_not_on_the_disk_without_an_fsync(forks: Forks, tmp_path: Path) -> None:
    disk, calls = empty_disk_and_calls(forks, tmp_path, "posix")
    for call in calls[: [call.name for call in calls].index("cached")]:
        disk.apply(call)
    assert b"" in [tree["file-1"].content for tree in disk.after_power_cut() if "file-1" in tree]


def empty_disk_and_calls(forks: Forks, folder: Path, model: Model) -> tuple[Disk, list[Call]]:
    (folder / "root").mkdir(parents=True)
    disk = Disk.scan(folder / "root", model)
    return disk, traced(forks, folder)


# Reading


def reads(forks: Forks, folder: Path) -> list[Call]:
    put_read_ahead(folder)
    outcome = forks.run(read_whole, folder, trace=folder.with_name("trace"), kinds=Kind.READS)
    assert outcome.said == ["right"]
    return shim.read_trace(folder.with_name("trace"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def go_on_reading(forks: Forks, folder: Path, fault: Fault) -> Outcome:
    put_read_ahead(folder)
    return forks.run(read_whole, folder, fault=fault, kinds=Kind.READS)


def test_a_large_file_is_read_ahead(forks: Forks, folder: Path) -> None:
    names = [call.name for call in reads(forks, folder) if call.path == "file"]
    assert names == ["open", "read", "direct", *["read"] * 3, "cached"]


def test_an_error_at_any_call_of_reading_is_raised_by_name(forks: Forks, folder: Path) -> None:
    for call in reads(forks, folder):
        if call.number and call.name != "cached":
            outcome = go_on_reading(forks, folder, Fault(call.number, Action.FAIL, errno.EIO))
            assert outcome.said == [f"failed 0 [Errno 5] Input/output error: '{folder / 'file'}'"], call


def test_a_read_that_does_half_is_gone_on_with(forks: Forks, folder: Path) -> None:
    for call in reads(forks, folder):
        if call.name == "read":
            assert go_on_reading(forks, folder, Fault(call.number, Action.SHORTEN)).said == ["right"], call


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP], ids=["EINVAL", "ENOTSUP"])
def test_where_it_is_refused_the_rest_is_read_through_the_page_cache(forks: Forks, folder: Path, error: int) -> None:
    calls = reads(forks, folder)
    names = [call.name for call in calls]
    for call in calls[names.index("direct") : names.index("cached")]:
        assert go_on_reading(forks, folder, Fault(call.number, Action.FAIL, error)).said == ["right"], call

"""The harness finds each rule of commitment that a writer breaks, and nothing in one that keeps them all."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

import power
import pytest
import shim
from disk_tree import build
from forks import Forks
from power import Disk, Model
from shim import Action, Call, Fault
from writers import Found, Writer, look, save_steps

STEPS = [2, 3]


@dataclass
class Verdict:
    points: int = 0
    lost: int = 0  # what had been acknowledged is not there
    broken: int = 0  # a record is there without the bytes it promises

    def add(self, found: Found, acknowledged: int) -> None:
        self.points += 1
        self.lost += found.newest < acknowledged
        self.broken += bool(found.broken)


def first_save(root: Path) -> Path:
    """A run in which step 1 is committed, so that there is something to lose."""
    root.mkdir(parents=True)
    Writer(root / "run").save(1)
    return root


def trace_of(forks: Forks, folder: Path, broken: str | None, fault: Fault | None = None) -> tuple[Disk, list[Call]]:
    start = Disk.scan(first_save(folder / "root"))
    outcome = forks.run(save_steps, folder / "root", trace=folder / "trace", fault=fault, steps=STEPS, broken=broken)
    assert outcome.code == 0, outcome.complained
    return start, shim.read_trace(folder / "trace")


def judge_cuts(found: list[power.PowerCut], folder: Path) -> Verdict:
    verdict = Verdict()
    folder.mkdir()
    for number, cut in enumerate(found):
        (root := folder / str(number)).mkdir()
        build(cut.tree, root)
        said = cut.told.split()
        verdict.add(look(root / "run"), int(said[1]) if said[:1] == ["acknowledged"] else 1)
    return verdict


def kill_everywhere(forks: Forks, folder: Path, broken: str | None) -> Verdict:
    verdict = Verdict()
    _, calls = trace_of(forks, folder / "trace", broken)
    for fault in shim.kills(calls):
        root = first_save(folder / f"{fault.action.name}-{fault.call}")
        outcome = forks.run(save_steps, root, fault=fault, steps=STEPS, broken=broken)
        assert outcome.was_killed, f"{fault} of {len(calls)} calls did not happen: {outcome}"
        verdict.add(look(root / "run"), outcome.last("acknowledged") or 1)
        Writer(root / "run").save(4)
        assert look(root / "run").newest == 4, f"no further save after {fault}"
    return verdict


def cut_everywhere(forks: Forks, folder: Path, broken: str | None, model: Model) -> Verdict:
    start, calls = trace_of(forks, folder / "trace", broken)
    start.model = model
    return judge_cuts(power.cuts(start, calls), folder / "cuts")


def fail_each_fsync(forks: Forks, folder: Path, broken: str | None) -> Verdict:
    """EIO from each fsync, one at a time, and then the power goes when all is done."""
    verdict = Verdict()
    _, calls = trace_of(forks, folder / "trace", broken)
    for number in [call.number for call in calls if call.name == "fsync"]:
        start, failing = trace_of(forks, folder / str(number), broken, Fault(number, Action.FAIL, errno.EIO))
        one = judge_cuts(power.cuts(start, failing, since=len(failing) - 1), folder / f"cuts-{number}")
        verdict = Verdict(verdict.points + one.points, verdict.lost + one.lost, verdict.broken + one.broken)
    return verdict


def test_a_writer_that_keeps_the_rules_survives_every_kill(forks: Forks, tmp_path: Path) -> None:
    verdict = kill_everywhere(forks, tmp_path, None)
    assert verdict.points > 40
    assert (verdict.lost, verdict.broken) == (0, 0)


@pytest.mark.parametrize("model", ["posix", "ordered"])
def test_a_writer_that_keeps_the_rules_survives_every_power_cut(forks: Forks, tmp_path: Path, model: Model) -> None:
    verdict = cut_everywhere(forks, tmp_path, None, model)
    assert verdict.points > 30
    assert (verdict.lost, verdict.broken) == (0, 0)


def test_a_writer_that_keeps_the_rules_survives_a_failed_fsync(forks: Forks, tmp_path: Path) -> None:
    verdict = fail_each_fsync(forks, tmp_path, None)
    assert verdict.points > 10
    assert (verdict.lost, verdict.broken) == (0, 0)


@pytest.mark.parametrize("broken", ["fsync of data", "fsync of folders"])
def test_a_missing_fsync_is_found_by_the_power_cut_and_only_by_it(forks: Forks, tmp_path: Path, broken: str) -> None:
    killed = kill_everywhere(forks, tmp_path / "kill", broken)
    assert (killed.lost, killed.broken) == (0, 0), "the page cache outlives a process"
    assert cut_everywhere(forks, tmp_path / "cut", broken, "posix").lost > 0


def test_missing_fsyncs_of_data_are_found_under_a_journal_too(forks: Forks, tmp_path: Path) -> None:
    assert cut_everywhere(forks, tmp_path, "fsync of data", "ordered").lost > 0


@pytest.mark.parametrize(
    ("broken", "loses", "breaks"),
    [
        ("data before the record", False, True),
        ("new one before the old one goes", True, False),
        ("record goes before its folder", False, True),
        ("record whole or not there", False, True),
    ],
)
def test_a_wrong_order_is_found_by_kills(forks: Forks, tmp_path: Path, broken: str, loses: bool, breaks: bool) -> None:
    verdict = kill_everywhere(forks, tmp_path, broken)
    assert (verdict.lost > 0, verdict.broken > 0) == (loses, breaks)


def test_a_failed_fsync_that_is_tried_again_is_found(forks: Forks, tmp_path: Path) -> None:
    verdict = fail_each_fsync(forks, tmp_path, "failed fsync is final")
    assert verdict.lost > 0

"""Whatever a power cut leaves, what distckpt acknowledged is there, and the run goes on."""

from __future__ import annotations

import errno
from pathlib import Path

import power
import pytest
import shim
from cases import built, cuts_by_model, judge
from disk_tree import without_identity
from forks import Forks
from power import Disk
from shim import Action, Call, Fault
from workload import RUN, train


def traced(trainings: Forks, root: Path, *, before: int, fault: Fault | None = None) -> tuple[Disk, list[Call]]:
    """A disk with ``before`` steps saved, all durable, and the calls of one step more, or of two with a fault."""
    root.mkdir(parents=True)
    if before:
        assert trainings.run(train, root, more=before, is_async=False).code == 0
    disk = Disk.scan(root)
    more, trace = (2 if fault else 1), root.with_name(f"{root.name}-trace")
    outcome = trainings.run(train, root, trace=trace, fault=fault, more=more, is_async=True, is_forgiving=bool(fault))
    assert outcome.code == 0 or fault, outcome.complained
    return disk, shim.read_trace(trace)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("before", [0, 3], ids=["from nothing", "with two kept"])
def test_the_power_cut_at_every_call(trainings: Forks, scratch: Path, before: int) -> None:
    disk, calls = traced(trainings, scratch / "run", before=before)
    cuts = cuts_by_model(disk, calls)
    assert all(len(one) > 100 for one in cuts.values())
    cases = built(scratch, "cut", cuts, before)
    assert judge(trainings, scratch, cases) == []
    print(f"{len(cases)} states after {len(calls)} calls, nothing lost in {len(cases)}")


def test_the_trace_of_a_run_is_complete(trainings: Forks, scratch: Path) -> None:
    disk, calls = traced(trainings, scratch / "run", before=3)
    for call in calls:
        disk.apply(call)
    assert without_identity(disk.tree()) == without_identity(Disk.scan(scratch / "run").tree())


def test_the_power_cut_after_a_failed_fsync(trainings: Forks, scratch: Path) -> None:
    """The kernel forgets bytes whose fsync failed: a checkpoint that counts on them is lost at the next power cut."""
    _, undisturbed = traced(trainings, scratch / "undisturbed", before=0)
    cases = []
    for number in [call.number for call in undisturbed if call.name == "fsync"]:
        fault = Fault(number, Action.FAIL, errno.EIO)
        disk, calls = traced(trainings, scratch / f"run-{number}", before=0, fault=fault)
        cases += built(scratch, f"fsync-{number}", {disk.model: power.cuts(disk, calls, since=len(calls) - 1)}, 0)
    assert len(cases) > 15
    assert judge(trainings, scratch, cases) == []


@pytest.mark.parametrize("made", ["runs", RUN])
def test_the_directory_of_a_run_is_durable_whoever_made_it(trainings: Forks, scratch: Path, made: str) -> None:
    """Somebody's ``mkdir``, or that of a run that was killed at once, is not on the disk because it can be seen."""
    (scratch / "root" / made).mkdir(parents=True)
    disk = Disk.scan(scratch / "root")
    disk.doubt(made)
    outcome = trainings.run(train, scratch / "root", trace=scratch / "trace", more=1, is_async=False)
    assert outcome.code == 0, outcome.complained
    calls = shim.read_trace(scratch / "trace")
    cases = built(scratch, "cut", {disk.model: power.cuts(disk, calls, since=len(calls) - 1)}, 0)
    assert all(case.acknowledged == 1 for case in cases)
    assert judge(trainings, scratch, cases) == []

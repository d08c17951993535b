"""A save that is written over what was deleted loses nothing either, whatever ends it, and leaves nothing behind."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import shim
from cases import Case, built, cuts_by_model, judge
from forks import Forks, Outcome
from power import Disk
from shim import Action, Fault
from workload import train

# Step 4 is written anew and deletes steps 2 and 3. Step 5 is written over what they have left.
BEFORE, DELETES, RECYCLES = 3, 4, 5


class Recycling:
    """A run with checkpoints, and the calls of going on from the moment when it deletes some of them."""

    def __init__(self, trainings: Forks, scratch: Path, *, is_async: bool = False) -> None:
        self.trainings, self.scratch, self.is_async = trainings, scratch, is_async
        self.start = scratch / "start"
        self.start.mkdir()
        assert trainings.run(train, self.start, more=BEFORE, is_async=False).code == 0
        self.disk = Disk.scan(self.copied("undisturbed"))
        self.train("undisturbed", more=2, trace=scratch / "trace")
        self.calls = shim.read_trace(scratch / "trace")
        over = [call for call in self.calls if call.name == "rename" and "/.spare-" in call.path]
        places = {Path(call.other).name for call in over if f"step-{RECYCLES:08}" in call.other}
        assert {"model.safetensors", "optimizer.safetensors"} <= places
        self.since, until = self.commit_of(DELETES), self.commit_of(RECYCLES)
        self.calls = self.calls[: until + 2]  # the fsync that makes it durable
        self.saving = [call for call in self.calls[self.place_of(f"acknowledged {DELETES}") : until] if call.number]

    def copied(self, name: str) -> Path:
        return shutil.copytree(self.start, self.scratch / name, symlinks=True)

    def train(self, name: str, **words: Any) -> Outcome:
        """How it goes on in the copy of that name."""
        words = {"is_async": self.is_async, "recycles": True, **words}
        return self.trainings.run(train, self.scratch / name, **words)

    def gone_wrong(self, fault: Fault, **words: Any) -> tuple[Outcome, str]:
        """How it goes on in a copy where that happens, and the name of the copy."""
        name = self.copied(f"{fault.action.name}-{fault.call}").name
        return self.train(name, fault=fault, **words), name

    def commit_of(self, step: int) -> int:
        record = f"step-{step:08}.committed"
        return next(at for at, call in enumerate(self.calls) if call.name == "link" and record in call.other)

    def place_of(self, words: str) -> int:
        return next(at for at, call in enumerate(self.calls) if call.path == words)


@pytest.mark.timeout(300)
def test_killed_at_every_call(trainings: Forks, scratch: Path) -> None:
    run = Recycling(trainings, scratch, is_async=True)
    faults = shim.kills(run.calls[run.since :])
    assert len(faults) > 100
    cases = []
    for fault in faults:
        outcome, name = run.gone_wrong(fault, more=2)
        assert outcome.was_killed, f"{fault} of {len(faults)} did not happen: {outcome}"
        cases.append(Case(name, str(fault), outcome.last("acknowledged") or BEFORE))
    assert judge(trainings, scratch, cases) == []
    print(f"killed at {len(cases)} points, nothing lost at {len(cases)}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("error", "action"),
    [(errno.EIO, Action.FAIL), (errno.ENOSPC, Action.FAIL_FROM_HERE)],
    ids=["EIO", "a disk that is full from there on"],
)
def test_an_error_at_any_call_of_it_fails_that_save_or_none(
    trainings: Forks, scratch: Path, error: int, action: Action
) -> None:
    run = Recycling(trainings, scratch)
    assert len(run.saving) > 40
    cases, wrong = [], []
    for call in run.saving:
        outcome, name = run.gone_wrong(Fault(call.number, action, error), more=3, is_forgiving=True)
        told = [" ".join(line.split()[:2]) for line in outcome.said]
        if told[1] != f"acknowledged {DELETES}" or told[-1] != f"acknowledged {RECYCLES + 1}" or outcome.code:
            wrong.append(f"{call}: {outcome}")
        if call.name == "write" and "/step-" in call.path and told[2] != f"failed {RECYCLES}":
            wrong.append(f"{call}: {told}")
        cases.append(Case(name, str(call), RECYCLES + 1))
    assert wrong == []
    assert judge(trainings, scratch, cases) == []


@pytest.mark.timeout(400)
def test_the_power_cut_at_every_call(trainings: Forks, scratch: Path) -> None:
    run = Recycling(trainings, scratch)
    cuts = cuts_by_model(run.disk, run.calls, since=run.since)
    assert all(len(one) > 100 for one in cuts.values())
    cases = built(scratch, "cut", cuts, BEFORE)
    assert judge(trainings, scratch, cases) == []
    print(f"{len(cases)} states, nothing lost in {len(cases)}")


def test_what_a_killed_run_would_have_written_over_is_swept_by_the_next(trainings: Forks, scratch: Path) -> None:
    run = Recycling(trainings, scratch)
    _, name = run.gone_wrong(Fault(run.saving[0].number, Action.KILL), more=2)
    assert len(spares_in(scratch / name)) >= 2
    assert run.train(name, more=1).code == 0 and spares_in(scratch / name) == []


def spares_in(root: Path) -> list[str]:
    return [path.name for path in root.rglob(".spare-*")]

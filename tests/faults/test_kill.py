"""Killed at any call of a run, distckpt has lost nothing that it acknowledged, and goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import shim
from cases import Case, judge
from forks import Forks
from workload import train


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("before", "is_async"),
    [(0, False), (3, False), (3, True)],
    ids=["from nothing", "with two kept", "with two kept, in the background"],
)
def test_killed_at_every_call(trainings: Forks, scratch: Path, before: int, is_async: bool) -> None:
    start = scratch / "start"
    start.mkdir()
    assert trainings.run(train, start, more=before, is_async=False).code == 0
    shutil.copytree(start, scratch / "undisturbed", symlinks=True)
    trainings.run(train, scratch / "undisturbed", trace=scratch / "trace", more=1, is_async=is_async)
    faults = shim.kills(shim.read_trace(scratch / "trace"))
    assert len(faults) > 90

    cases = []
    for fault in faults:
        root = scratch / f"{fault.action.name}-{fault.call}"
        shutil.copytree(start, root, symlinks=True)
        outcome = trainings.run(train, root, fault=fault, more=1, is_async=is_async)
        assert outcome.was_killed, f"{fault} of {len(faults)} did not happen: {outcome}"
        cases.append(Case(root.name, str(fault), outcome.last("acknowledged") or before))
    assert judge(trainings, scratch, cases) == []
    print(f"killed at {len(cases)} of {len(faults)} points, nothing lost at {len(cases)}")

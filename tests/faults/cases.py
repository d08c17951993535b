"""Places where something went wrong, and whether what was promised still holds there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import workload
from forks import Forks


@dataclass(frozen=True)
class Case:
    """A folder below the scratch folder, what happened there, and the newest step that was acknowledged before."""

    folder: str
    what: str
    acknowledged: int


def judge(trainings: Forks, scratch: Path, cases: Sequence[Case]) -> list[str]:
    """What is wrong in the cases, by case: none of it where each resumes from what was acknowledged or newer, bit by
    bit, every record holds what it promises, one more step is trained, saved and resumed, and nothing is left over."""
    folders = [case.folder for case in cases]
    outcome = trainings.run(workload.judge, scratch, cases=folders, patience_seconds=100)
    assert outcome.code == 0, outcome.complained
    verdicts = [json.loads(line) for line in outcome.said if line.startswith("[")]
    assert [verdict[0] for verdict in verdicts] == folders, "not all cases were judged"
    wrong = []
    for case, (_, resumed, again, problems) in zip(cases, verdicts, strict=True):
        if resumed < case.acknowledged:
            problems.insert(0, f"resumed from {resumed}, acknowledged was {case.acknowledged}")
        if again != resumed + 1:
            problems.append(f"the step after {resumed} was not resumed, but {again}")
        wrong += [f"{case.folder} ({case.what}): {problem}" for problem in problems]
    return wrong

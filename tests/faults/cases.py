"""Places where something went wrong, and whether what was promised still holds there."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import power
import workload
from disk_tree import build, names_of_one_file, without_identity
from forks import Forks
from power import Disk, Model, PowerCut
from shim import Call


@dataclass(frozen=True)
class Case:
    """A folder below the scratch folder, what happened there, and the newest step that was acknowledged before."""

    folder: str
    what: str
    acknowledged: int


def cuts_by_model(start: Disk, calls: Sequence[Call], *, since: int = 0) -> dict[Model, list[PowerCut]]:
    """What either model of a disk says of a power cut after each of the calls from ``since`` on."""
    found: dict[Model, list[PowerCut]] = {}
    for model in get_args(Model):
        disk = copy.deepcopy(start)
        disk.model = model
        found[model] = power.cuts(disk, calls, since=since)
    return found


def built(scratch: Path, name: str, cuts: Mapping[Model, Iterable[PowerCut]], before: int) -> list[Case]:
    """Each state that the cuts leave in a folder of its own.

    One that several leave, of either model, is there once: with the newest of the steps that were acknowledged before
    one of them, which is ``before`` where nothing was told.
    """
    cases: dict[object, Case] = {}
    for model, some in cuts.items():
        for cut in some:
            words = cut.told.split()
            acknowledged = int(words[1]) if words and words[0] == "acknowledged" else before
            state = (frozenset(without_identity(cut.tree).items()), names_of_one_file(cut.tree))
            known = cases.get(state)
            if known is None:
                (root := scratch / f"{name}-{len(cases)}").mkdir()
                build(cut.tree, root)
            elif acknowledged <= known.acknowledged:
                continue
            folder = known.folder if known else root.name
            cases[state] = Case(folder, f"{name}, {model}, {cut.after}, told {cut.told!r}", acknowledged)
    return list(cases.values())


def judge(trainings: Forks, scratch: Path, cases: Sequence[Case]) -> list[str]:
    """What is wrong in the cases, by case: none of it where each resumes from what was acknowledged or newer, bit by
    bit, every record holds what it promises, one more step is trained, saved and resumed, and nothing is left over."""
    folders = [case.folder for case in cases]
    outcome = trainings.run(workload.judge, scratch, cases=folders, patience_seconds=100 + len(folders) // 5)
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

"""Runs of two ranks that go wrong, in copies of one that has saved some steps, and whether what was promised holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sharded_training
import shim
from cases import Case
from forks import Forks, Order, Outcome
from shim import Call, Fault
from workload import RUN

BEFORE, NEXT = 3, 4
LEADER, OTHER = range(sharded_training.WORLD_SIZE)

_PAIRS = 6


@dataclass(frozen=True)
class Wrong:
    """A fault, the folder where it happened, and how both ranks ended."""

    fault: Fault
    folder: str
    outcomes: list[Outcome]

    def case(self, acknowledged: int) -> Case:
        return Case(self.folder, str(self.fault), acknowledged)


class Pairs:
    """See the module. A run that goes on saves step 4, and deletes steps 3 and 2 for it."""

    def __init__(self, ranks: Forks, scratch: Path) -> None:
        self._ranks, self.scratch = ranks, scratch
        self._meetings = 0
        self._start = scratch / "start"
        self._start.mkdir()
        ((_, outcomes),) = self._train({"start": {}}, more=BEFORE)
        assert [one.code for one in outcomes] == [0, 0], outcomes

    def copied(self, name: str) -> Path:
        """A copy of the run that has saved some steps."""
        return shutil.copytree(self._start, self.scratch / name, symlinks=True)

    def traced(self, run: Path, faults: Mapping[int, Fault] | None = None) -> list[Call]:
        """The calls of both ranks, in their order, of going on in a copy, with faults by rank."""
        trace = run.with_name(f"{run.name}-trace")
        ((_, outcomes),) = self._train({run.name: faults or {}}, trace, more=1)
        assert [one.code for one in outcomes] == [0, 0], outcomes
        return shim.read_trace(trace)

    def go_wrong(self, rank: int, faults: Sequence[Fault], **words: Any) -> list[Wrong]:
        """How it goes on where one of the faults happens on ``rank``, each in a copy."""
        names = [self.copied(f"{fault.action.name}-{fault.call}").name for fault in faults]
        found = self._train({name: {rank: fault} for name, fault in zip(names, faults, strict=True)}, **words)
        return [Wrong(fault, name, outcomes) for fault, (name, outcomes) in zip(faults, found, strict=True)]

    def judge(self, cases: Sequence[Case], every: int = 1) -> list[str]:
        """What is wrong in the cases, by case: none of it where what is committed is whole, and what was there before
        the same, bit by bit; where one rank resumes from what was acknowledged or newer, and two do, who save one step
        more, from which one resumes; and where nothing is left over then. One of ``every`` goes on so."""
        assert cases
        wrong = []
        resumed = self._told(self._alone, cases)
        for case in cases:
            (step, problems), *_ = resumed[case.folder]
            problems += self._changed(self.scratch / case.folder / RUN)
            if step < case.acknowledged:
                problems.append(f"resumed from {step}, acknowledged was {case.acknowledged}")
            wrong += [f"{case.folder} ({case.what}): {problem}" for problem in problems]
        some = cases[::every]
        went_on, again = self._told(self._as_two, some), self._told(self._alone, some)
        for case in some:
            steps = [step for told in (went_on, again) for step, _ in told[case.folder]]
            problems = [problem for told in (went_on, again) for _, more in told[case.folder] for problem in more]
            ((step, _),) = resumed[case.folder]
            if steps != [step, step, step + 1]:
                problems.append(f"resumed from {step}, and then, by two, and by one what they saved, from {steps}")
            wrong += [f"{case.folder} ({case.what}), going on: {problem}" for problem in problems]
        return wrong

    def _train(
        self, runs: Mapping[str, Mapping[int, Fault]], trace: Path | None = None, **words: Any
    ) -> list[tuple[str, list[Outcome]]]:
        """How both ranks ended in each of these folders, with faults by rank."""
        work = sharded_training.train
        groups = [self._pair(work, name, trace, faults=faults, **words) for name, faults in runs.items()]
        return list(zip(runs, self._ranks.run_groups(groups), strict=True))

    def _alone(self, cases: list[str]) -> list[Order]:
        return [Order(sharded_training.verify, self.scratch, {"cases": cases}, patience_seconds=200)]

    def _as_two(self, cases: list[str]) -> list[Order]:
        return self._pair(sharded_training.go_on, ".", cases=cases, patience_seconds=200)

    def _pair(
        self,
        work: Callable[..., object],
        name: str,
        trace: Path | None = None,
        *,
        faults: Mapping[int, Fault] | None = None,
        patience_seconds: int = 60,
        **words: Any,
    ) -> list[Order]:
        self._meetings += 1
        words = {"meeting": str(self.scratch / f"meeting-{self._meetings}"), **words}
        return [
            Order(
                work,
                self.scratch / name,
                {"rank": rank, **words},
                (faults or {}).get(rank),
                trace=trace,
                who=rank,
                patience_seconds=patience_seconds,
            )
            for rank in (LEADER, OTHER)
        ]

    def _told(
        self, orders: Callable[[list[str]], list[Order]], cases: Sequence[Case]
    ) -> dict[str, list[tuple[int, list[str]]]]:
        """By case, what each rank said of it."""
        folders = [case.folder for case in cases]
        told: dict[str, list[tuple[int, list[str]]]] = {folder: [] for folder in folders}
        groups = [orders(folders[nth::_PAIRS]) for nth in range(min(_PAIRS, len(folders)))]
        for group in self._ranks.run_groups(groups):
            for outcome in group:
                assert outcome.code == 0, outcome.complained
                for line in outcome.said:
                    folder, step, problems = json.loads(line)
                    told[folder].append((step, problems))
        assert len({len(one) for one in told.values()}) == 1, "not all cases were judged"
        return told

    def _changed(self, run: Path) -> list[str]:
        """Checkpoints that were there before and still are, of which a file is another, or gone."""
        before = self._start / RUN
        there = [record.stem for record in before.glob("*.committed") if (run / record.name).exists()]
        return [f"{name} has changed" for name in there if _content(before / name) != _content(run / name)]


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def words_of(outcome: Outcome) -> list[str]:
    """What it said, in a few words: what became of a step, and on which ranks."""
    return [" ".join(line.split()[:3]) for line in outcome.said]

"""An error of the disk fails the save that met it, by name, and touches neither what is committed nor the next save."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import shim
from cases import Case, judge
from forks import Forks, Outcome
from shim import Action, Call, Fault, Kind
from workload import RUN, train

BEFORE = 3
NEXT = BEFORE + 1


class Disk:
    """A run with checkpoints, the calls of going on with it, and copies of it in which one of them goes wrong."""

    def __init__(self, trainings: Forks, scratch: Path, kinds: Kind) -> None:
        self._trainings, self._scratch, self._kinds = trainings, scratch, kinds
        self._start = scratch / "start"
        self._start.mkdir()
        assert trainings.run(train, self._start, more=BEFORE, is_async=False).code == 0
        shutil.copytree(self._start, scratch / "undisturbed", symlinks=True)
        trainings.run(train, scratch / "undisturbed", trace=scratch / "trace", kinds=kinds, more=1, is_async=False)
        calls = shim.read_trace(scratch / "trace")
        words = [call.path for call in calls]
        resumed, acknowledged = words.index(f"resumed {BEFORE}"), words.index(f"acknowledged {NEXT}")
        record = next(at for at, call in enumerate(calls) if call.name == "link" and call.other.endswith(".committed"))
        sealed = next(at for at, call in enumerate(calls) if at > record and call.name == "fsync") + 1
        ended = next(at for at, call in enumerate(calls) if at > acknowledged and f"{RUN}/.draft-run" in call.path)
        before = [*calls[:resumed], *calls[resumed + 1 : sealed]]
        self.starting = [call for call in calls[:resumed] if not is_tidying(call)]
        self.saving = [call for call in calls[resumed + 1 : sealed] if not is_tidying(call)]
        self.harmless = [call for call in before if is_tidying(call)]
        self.harmless += [call for call in calls[sealed:ended] if call.number]
        self.cases: list[Case] = []

    def go_wrong(self, call: Call, action: Action, error: int = 0) -> Outcome:
        """What two more steps come to when ``call`` suffers ``action``."""
        root = self._scratch / f"{action.name}-{call.number}"
        shutil.copytree(self._start, root, symlinks=True)
        fault = Fault(call.number, action, error)
        outcome = self._trainings.run(
            train, root, fault=fault, kinds=self._kinds, more=2, is_async=False, is_forgiving=True
        )
        self.cases.append(Case(root.name, str(call), outcome.last("acknowledged") or BEFORE))
        return outcome


def is_tidying(call: Call) -> bool:
    """Whether it removes the draft of what is published already."""
    return call.name == "unlink" and "/.draft-" in call.path


def words_of(outcome: Outcome) -> list[str]:
    return [" ".join(line.split()[:2]) for line in outcome.said]


def names_error(text: str, error: int, place: Path) -> bool:
    return os.strerror(error) in text and str(place) in text


def failed_by_name(disk: Disk, scratch: Path, calls: Iterable[Call], action: Action, error: int) -> list[str]:
    """The calls whose failure did not fail the next save with the error and the place, and only that one."""
    wrong = []
    for call in calls:
        outcome = disk.go_wrong(call, action, error)
        expected = [f"resumed {BEFORE}", f"failed {NEXT}", f"acknowledged {NEXT + 1}"]
        if words_of(outcome) != expected or not names_error(outcome.said[1], error, scratch):
            wrong.append(f"{call}: {outcome.said[1:]} {outcome.complained[-300:]}")
    return wrong


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("error", "kinds"),
    [(errno.EIO, Kind.CHANGES | Kind.READS), (errno.ENOSPC, Kind.CHANGES), (errno.EDQUOT, Kind.CHANGES)],
    ids=["EIO", "ENOSPC", "EDQUOT"],
)
def test_an_error_at_any_call_before_the_commit_fails_that_save(
    trainings: Forks, scratch: Path, error: int, kinds: Kind
) -> None:
    disk = Disk(trainings, scratch, kinds)
    assert len(disk.saving) > 40
    assert failed_by_name(disk, scratch, disk.saving, Action.FAIL, error) == []
    assert judge(trainings, scratch, disk.cases) == []


def test_a_disk_that_is_full_from_any_call_on_fails_that_save(trainings: Forks, scratch: Path) -> None:
    disk = Disk(trainings, scratch, Kind.CHANGES)
    needy = [call for call in disk.saving if call.name not in {"close", "unlink", "direct", "cached"}]
    assert failed_by_name(disk, scratch, needy, Action.FAIL_FROM_HERE, errno.ENOSPC) == []
    assert judge(trainings, scratch, disk.cases) == []


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_an_error_after_the_commit_or_in_tidying_up_is_a_warning(trainings: Forks, scratch: Path, error: int) -> None:
    disk = Disk(trainings, scratch, Kind.CHANGES)
    assert len(disk.harmless) > 30
    wrong = []
    for call in disk.harmless:
        outcome = disk.go_wrong(call, Action.FAIL, error)
        expected = [f"resumed {BEFORE}", f"acknowledged {NEXT}", f"acknowledged {NEXT + 1}"]
        if words_of(outcome) != expected or not names_error(outcome.complained, error, scratch):
            wrong.append(f"{call}: {outcome}")
    assert wrong == []
    assert judge(trainings, scratch, disk.cases) == []


def test_an_error_at_the_start_is_raised_and_loses_nothing(trainings: Forks, scratch: Path) -> None:
    disk = Disk(trainings, scratch, Kind.CHANGES)
    assert len(disk.starting) > 10
    wrong = []
    for call in disk.starting:
        outcome = disk.go_wrong(call, Action.FAIL, errno.EIO)
        if outcome.code != 1 or not names_error(outcome.complained.splitlines()[-1], errno.EIO, scratch):
            wrong.append(f"{call}: {outcome}")
    assert wrong == []
    assert judge(trainings, scratch, disk.cases) == []


def test_short_reads_and_writes_and_interruptions_are_invisible(trainings: Forks, scratch: Path) -> None:
    disk = Disk(trainings, scratch, Kind.CHANGES | Kind.READS)
    calls = [call for call in [*disk.starting, *disk.saving, *disk.harmless] if call.number]
    shortened = [(call, Action.SHORTEN, 0) for call in calls if call.name in {"read", "write"}]
    interrupted = [(call, Action.FAIL, errno.EINTR) for call in calls if call.name in {"create", "open", "fsync"}]
    for call, action, error in shortened + interrupted:
        outcome = disk.go_wrong(call, action, error)
        assert words_of(outcome) == [f"resumed {BEFORE}", f"acknowledged {NEXT}", f"acknowledged {NEXT + 1}"], call
        assert outcome.complained == "", call
    assert judge(trainings, scratch, disk.cases) == []

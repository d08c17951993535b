"""An error of the disk on one rank that is not the leader fails a sharded save on both, by name, and no other."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from forks import Forks
from sharded_cases import BEFORE, NEXT, OTHER, Pairs, words_of
from shim import Action, Fault


@pytest.mark.parametrize(
    ("error", "action", "harmless"),
    [(errno.EIO, Action.FAIL, set()), (errno.ENOSPC, Action.FAIL_FROM_HERE, {"close", "direct", "cached"})],
    ids=["EIO", "a disk that is full from there on"],
)
def test_an_error_at_any_call_of_a_rank_fails_that_save_on_both_by_name(
    ranks: Forks, scratch: Path, error: int, action: Action, harmless: set[str]
) -> None:
    pairs = Pairs(ranks, scratch)
    calls = [call for call in pairs.traced(pairs.copied("undisturbed")) if call.who == OTHER and call.number]
    faults = [Fault(call.number, action, error) for call in calls if call.name not in harmless]
    assert len(faults) > 8
    cases, wrong = [], []
    for one in pairs.go_wrong(OTHER, faults, more=2, is_forgiving=True):
        for outcome in one.outcomes:
            is_told = words_of(outcome) == [f"resumed {BEFORE}", f"failed {NEXT} [{OTHER}]", f"acknowledged {NEXT + 1}"]
            if not is_told or os.strerror(error) not in outcome.said[1] or str(scratch) not in outcome.said[1]:
                wrong.append(f"{calls[one.fault.call - 1]}: {outcome}")
        cases.append(one.case(NEXT + 1))
    assert wrong == []
    assert pairs.judge(cases) == []

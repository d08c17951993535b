"""Whichever rank is killed at any call of a sharded save: nothing is lost, the other learns it, a new run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import shim
from forks import Forks, Outcome
from sharded_cases import BEFORE, LEADER, NEXT, OTHER, Pairs, words_of
from sharded_training import DEADLINE
from shim import Action, Call, Fault

# A rank waits for the leader to come, and then for its answer; the rest is for a busy machine.
LATEST_MILLISECONDS = 2000 * DEADLINE.total_seconds() + 10_000


def calls_of(rank: int, calls: list[Call]) -> list[Call]:
    """What that rank does once it has resumed."""
    mine = [call for call in calls if call.who == rank]
    return mine[[call.path for call in mine].index(f"resumed {BEFORE}") + 1 :]


def moments(calls: list[Call]) -> list[Fault]:
    """When the leader can be killed, of a hundred calls: before each, and within each write; but not after one that
    has left the disk as it was, and after which ranks do not speak, nor before each file that is deleted."""
    faults = []
    before = Call(0, "", 0, 0, "", "", 0, 0, b"")
    for call in (one for one in calls if one.number):
        is_same = before.name in {"close", "direct", "cached"} or (before.name == "fsync" and call.name == "close")
        if not is_same and not before.name == call.name == "unlink":
            faults += shim.kills([call])
        elif call.name == "write":
            faults += shim.kills([call])[1:]
        before = call
    return faults


def names_lost(outcome: Outcome, rank: int) -> bool:
    """Whether it was told in time that this rank is lost, and no other."""
    word, who, milliseconds, *_ = outcome.said[-1].split()
    return (word, who) == ("lost", f"[{rank}]") and int(milliseconds) < LATEST_MILLISECONDS and not outcome.code


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("lost", "host", "every"),
    [(OTHER, LEADER, 1), (LEADER, LEADER, 1), (LEADER, OTHER, 8)],
    ids=["a rank", "the leader, and with it the store of all ranks", "the leader alone"],
)
def test_a_rank_that_is_killed_at_any_call_is_named_and_nothing_is_lost(
    ranks: Forks, scratch: Path, lost: int, host: int, every: int
) -> None:
    pairs = Pairs(ranks, scratch)
    calls = calls_of(lost, pairs.traced(pairs.copied("undisturbed")))
    faults = shim.kills(calls) if lost == OTHER else moments(calls)[::every]
    assert len(faults) > {OTHER: 15, LEADER: 60 // every}[lost]
    # Whoever is killed later has been told of the save, and the other needs nothing more of it.
    told = [call.path for call in calls].index(f"acknowledged {NEXT}")
    last = max(call.number for call in calls[:told])
    cases, wrong = [], []
    for one in pairs.go_wrong(lost, faults, more=1, host=host):
        assert one.outcomes[lost].was_killed, f"{one.fault} of {len(faults)} did not happen: {one.outcomes}"
        if one.fault.call <= last and not names_lost(one.outcomes[1 - lost], lost):
            wrong.append(f"{one.fault}: {one.outcomes[1 - lost]}")
        cases.append(one.case(max(outcome.last("acknowledged") for outcome in one.outcomes) or BEFORE))
    assert wrong == []
    assert pairs.judge(cases, every=2) == []


@pytest.mark.parametrize(("lost", "host"), [(OTHER, LEADER), (LEADER, OTHER)], ids=["a rank", "the leader"])
def test_who_trains_on_meanwhile_learns_it_at_the_next_save(ranks: Forks, scratch: Path, lost: int, host: int) -> None:
    pairs = Pairs(ranks, scratch)
    calls = calls_of(lost, pairs.traced(pairs.copied("undisturbed")))
    own = [call for call in calls if f"/step-{NEXT:08d}/rank-" in call.path]
    cases = []
    for one in pairs.go_wrong(lost, shim.kills(own)[::5], more=2, host=host, waits=False):
        survivor = one.outcomes[1 - lost]
        assert one.outcomes[lost].was_killed and names_lost(survivor, lost), one
        assert f"save of step {NEXT} " in survivor.said[-1], one
        cases.append(one.case(BEFORE))
    assert pairs.judge(cases) == []


def test_a_rank_that_comes_too_late_learns_it_and_spoils_nothing(ranks: Forks, scratch: Path) -> None:
    """It goes on to write when the leader has given the save up."""
    pairs = Pairs(ranks, scratch)
    calls = [call for call in calls_of(OTHER, pairs.traced(pairs.copied("undisturbed"))) if call.number]
    late = int(1000 * DEADLINE.total_seconds()) + 1500
    faults = [Fault(call.number, Action.PAUSE, late) for call in calls[::3]]
    cases = []
    for one in pairs.go_wrong(OTHER, faults, more=2, is_forgiving=True):
        for outcome in one.outcomes:
            assert words_of(outcome) == [f"resumed {BEFORE}", f"failed {NEXT} [{OTHER}]", f"acknowledged {NEXT + 1}"], (
                one
            )
        cases.append(one.case(NEXT + 1))
    assert pairs.judge(cases) == []

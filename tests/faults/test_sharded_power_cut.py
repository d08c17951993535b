"""Whatever a power cut leaves of a sharded save, in any order in which ranks write, the old or the new one is whole."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from cases import built, cuts_by_model
from disk_tree import without_identity
from forks import Forks
from power import Disk, Model, PowerCut
from sharded_cases import BEFORE, LEADER, NEXT, OTHER, Pairs
from shim import Action, Call, Fault

SHUFFLES = 2
GOING_ON = 15

# Long enough for the other rank to do all that it does without this one.
PAUSE_MILLISECONDS = 2000


class Save:
    """The calls of a save of two ranks, in its three parts: only in the second do both write."""

    def __init__(self, calls: Sequence[Call]) -> None:
        begin = next(
            at
            for at, call in enumerate(calls)
            if f"/rank-{LEADER:05d}" in call.path or call.who == OTHER and call.number
        )
        end = next(at for at, call in enumerate(calls) if "/.draft-manifest" in call.path)
        self.before, self.between, self.after = calls[:begin], calls[begin:end], calls[end:]
        self.leaders = [call for call in self.between if call.who == LEADER]
        self.others = [call for call in self.between if call.who == OTHER]
        assert {call.who for call in [*self.before, *self.after] if call.number} == {LEADER}

    def orders(self) -> Iterator[list[Call]]:
        """Its calls, in some of the orders in which they may come: `test_the_leader_commits_when_both_have_written`."""
        turns = [LEADER] * len(self.leaders) + [OTHER] * len(self.others)
        yield self._in_turns([call.who for call in self.between])
        yield self._in_turns(turns)
        yield self._in_turns(turns[::-1])
        for seed in range(SHUFFLES):
            yield self._in_turns(random.Random(seed).sample(turns, len(turns)))

    def _in_turns(self, turns: Sequence[int]) -> list[Call]:
        calls = {LEADER: iter(self.leaders), OTHER: iter(self.others)}
        return [*self.before, *(next(calls[rank]) for rank in turns), *self.after]


def test_the_leader_commits_when_both_have_written_and_neither_waits_before(ranks: Forks, scratch: Path) -> None:
    """One rank that stops shows what the other does without it: so only the orders of their writing are open."""
    pairs = Pairs(ranks, scratch)
    save = Save(pairs.traced(pairs.copied("undisturbed")))
    stops = {"begin": (OTHER, save.others[0]), "end": (OTHER, save.others[-1]), "leader": (LEADER, save.leaders[0])}
    found = {
        name: Save(pairs.traced(pairs.copied(name), {rank: Fault(call.number, Action.PAUSE, PAUSE_MILLISECONDS)}))
        for name, (rank, call) in stops.items()
    }
    whose = {name: [call.who for call in one.between] for name, one in found.items()}
    leaders, others = [LEADER] * len(save.leaders), [OTHER] * len(save.others)
    assert whose["begin"] == leaders + others
    assert whose["leader"] == others + leaders
    assert whose["end"][-1] == OTHER and sorted(whose["end"]) == leaders + others


@pytest.mark.timeout(300)
def test_the_power_cut_at_every_call_in_many_orders_of_them(ranks: Forks, scratch: Path) -> None:
    pairs = Pairs(ranks, scratch)
    run = pairs.copied("run")
    disk = Disk.scan(run)
    save = Save(pairs.traced(run))
    cuts: dict[Model, list[PowerCut]] = {"posix": [], "ordered": []}
    for calls in save.orders():
        for model, found in cuts_by_model(disk, calls).items():
            cuts[model] += found
        end = copy.deepcopy(disk)
        for call in calls:
            end.apply(call)
        assert without_identity(end.tree()) == without_identity(Disk.scan(run).tree())
    cases = built(scratch, "cut", cuts, BEFORE)
    assert len(cases) > 600 and {case.acknowledged for case in cases} == {BEFORE, NEXT}
    assert pairs.judge(cases, every=GOING_ON) == []
    print(f"{len(cases)} states, nothing lost in {len(cases)}")

"""How all ranks come to know who writes what: once, and anew where the state has become another.

It happens on the training thread, at a step at which all ranks save. Saves after that need no word about it.
"""

from __future__ import annotations

from collections.abc import Callable

from distckpt.formats import Planner, Snapshot
from distckpt.ranks import Ranks, first_of_each, from_leader, is_among, to_leader, together

_DURING = "plan of a save"


def plan(ranks: Ranks, planner: Planner, capture: Callable[[], Snapshot]) -> None:
    """Every rank writes by one plan from now on. Collective.

    Raises:
        RankFailure: on all ranks, where the state of one cannot be stored, or where they do not hold it whole and
            alike.
    """
    firsts = together(ranks, f"{_DURING} (look)", lambda: planner.look(capture(), ranks.rank), first_of_each)
    told = to_leader(ranks, f"{_DURING} (tell)", lambda: planner.tell(is_first=is_among(ranks.rank, firsts)))
    planner.take(ranks.rank, from_leader(ranks, _DURING, lambda: planner.plan(told)))

"""How all ranks come to know who writes what: once, and anew where the state has become another.

It happens on the training thread, at a step at which all ranks save. Saves after that need no word about it.
"""

from __future__ import annotations

from collections.abc import Callable

from distckpt.formats import Planner, Snapshot
from distckpt.ranks import Ranks, from_leader, to_leader, together

_DURING = "plan of a save"


def plan(ranks: Ranks, planner: Planner, capture: Callable[[], Snapshot]) -> None:
    """Every rank writes by one plan from now on. Collective.

    Raises:
        RankFailure: on all ranks, where the state of one cannot be stored, or where they do not hold it whole and
            alike.
    """
    digests = together(ranks, f"{_DURING} (look)", lambda: planner.look(capture(), ranks.rank))
    told = to_leader(ranks, f"{_DURING} (tell)", lambda: planner.tell(ranks.rank, digests))
    planner.take(ranks.rank, from_leader(ranks, _DURING, lambda: planner.plan(told)))

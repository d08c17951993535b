"""What takes the snapshots of a program's state: its parts, captured and laid out in one format, and staged."""

from __future__ import annotations

from distckpt.engine.memory import Size
from distckpt.engine.stager import Stager
from distckpt.formats import Format, Snapshot, Staged
from distckpt.ranks import Ranks, is_leader
from distckpt.state import Parts


class Capturing:
    """One rank's snapshots of ``parts``, in ``format``, by ``stager``."""

    def __init__(self, parts: Parts, format: Format, stager: Stager, ranks: Ranks) -> None:
        self._parts = parts
        self._format = format
        self._stager = stager
        self._ranks = ranks

    def reserve(self, size: Size) -> None:
        """There is memory for what this rank will write of a state of that size.

        Raises:
            DistckptError: where the system gives none.
        """
        if self._is_shared_out:
            share = size.spread_bytes + size.whole_bytes // self._ranks.world_size
            self._stager.reserve(share, is_pinned=size.is_on_device)
        elif is_leader(self._ranks):
            self._stager.reserve(size.total_bytes, is_pinned=size.is_on_device)

    def check(self) -> None:
        """Ranks that write a part each can tell what is the same on several of them; one that writes all has all.

        Raises:
            TypeError: as `Parts.require_names`, `Parts.require_whole`.
        """
        if not self._is_shared_out:
            self._parts.require_whole()
        elif self._ranks.world_size > 1:
            self._parts.require_names()

    def capture(self) -> Snapshot:
        """The state as it is now: references, no copies. Collective for parts whose ``state_dict`` is.

        Raises:
            TypeError: where several ranks could not tell whether they have the same, see `Parts.capture_shared`.
        """
        leads = is_leader(self._ranks)
        shared = self._parts.capture_shared(
            is_leader=leads, by_name=self._is_shared_out, needs_names=self._ranks.world_size > 1
        )
        return Snapshot(shared if leads or self._is_shared_out else {}, self._parts.capture_own())

    def take(self) -> Staged:
        """This rank's files of it, to be staged next."""
        return self._stager.take(self._format.lay_out(self.capture(), self._ranks.rank))

    @property
    def _is_shared_out(self) -> bool:
        """Whether every rank writes what is the job's, and not the leader alone."""
        return self._format.planner is not None

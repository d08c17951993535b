"""What ranks pay to agree on a plan, and to commit a save, through the store that they agree through.

The leader is a process with all that is real: a TCPStore of torch, `distckpt.planning.plan`, `distckpt.saving.save`, a
directory. The other ranks are objects in a second process, each a `BoardRanks`, which share a few connections and do
what `plan` and `save` do on a rank, one after another: first all speak, then, when the leader has answered, all hear
it. So no rank looks in vain; what such looks cost is measured apart.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import proc
import torch.distributed as dist

from distckpt.attempt import Attempt, Holder
from distckpt.catalog import Catalog, Draft
from distckpt.formats import Snapshot, Written
from distckpt.formats.held import Told
from distckpt.formats.sharded import Sharded
from distckpt.formats.sharded_plan import Plan, make_plan
from distckpt.planning import plan
from distckpt.progress import Progress
from distckpt.ranks import Json, Ranks, first_of_each, from_leader, is_among, to_leader, together
from distckpt.ranks.board import _IDLE_LOOKS_PER_SECOND, Board, BoardRanks
from distckpt.ranks.process_group import C10dBoard
from distckpt.saving import Job as Save
from distckpt.saving import _write, save
from distckpt.stores import Store
from distckpt.stores.local import LocalStore
from scaling.jobs import Job
from scaling.planning import files_of

TIMEOUT = timedelta(seconds=600)
CONNECTIONS = 16
LOOKS = 20_000
LEAST_PAUSE_SECONDS = 0.05  # of who listens
SAVES = 2  # of which the last is told
LOOK = "0" * 32
NO_FOLDER = Draft("", "", is_folder=False)
# As `distckpt.formats.Written` has them.
MEASURES = (
    *("stage_seconds", "waited_seconds", "fill_seconds", "hash_seconds", "write_seconds", "fsync_seconds"),
    *("arena_bytes", "retakes"),
)


def agreed(state: str, ranks: int, tensors: int) -> dict[str, Any]:
    """One plan and the saves after it, as the leader has them."""
    here, there = multiprocessing.Pipe()
    work = multiprocessing.get_context("fork").Process(target=_other_ranks, args=(there, state, ranks, tensors))
    work.start()  # before there is a store, which has threads
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    here.send(store.port)
    leader = BoardRanks(C10dBoard(store), 0, ranks, name="scale", timeout=TIMEOUT)
    format = Sharded()
    format.planner = _Planner(Job(state, ranks, tensors), 0)  # type: ignore[assignment]
    costs: dict[str, dict[str, float]] = {}
    here.recv()
    proc.forget_peak()
    before = proc.own_peak_bytes()
    with tempfile.TemporaryDirectory() as folder:
        files = LocalStore(Path(folder))
        catalog = Catalog(files, Attempt.start(files, Holder.here()))
        with _spent(costs, "plan"):
            plan(leader, format.planner, Snapshot)
        for nth in range(SAVES):
            job, after = _save_of(nth, 0), lambda *told: None
            with _spent(costs, "save"):
                save(job, format=format, store=files, ranks=leader, catalog=catalog, after=after)
        catalog.attempt.end()
    peak = proc.own_peak_bytes()
    heard = here.recv()
    here.send("look")
    with _spent(costs, "looks"):
        here.recv()
    work.join()
    return {
        "state": state,
        "ranks": ranks,
        "tensors": tensors,
        "plan": costs["plan"] | heard["plan"],
        "save": costs["save"] | heard["save"],
        "save_seconds": sum(costs["save"].values()),
        "more_memory_bytes": peak - before,
        "look_seconds": sum(costs["looks"].values()) / LOOKS,
        "idle_looks_per_second": min(_IDLE_LOOKS_PER_SECOND, (ranks - 1) / LEAST_PAUSE_SECONDS),
    }


@contextmanager
def _spent(costs: dict[str, dict[str, float]], what: str) -> Iterator[None]:
    """The CPU time of the thread that leads, and of all others of its process: those of the store."""
    own, all_of_them = time.thread_time(), time.process_time()
    yield
    own, all_of_them = time.thread_time() - own, time.process_time() - all_of_them
    costs[what] = {"leader_seconds": own, "store_seconds": all_of_them - own}


class _Planner:
    """Of a rank that looked already; see `distckpt.formats.Planner`."""

    def __init__(self, job: Job, rank: int) -> None:
        self._job = job
        self._rank = rank
        self.is_due = True
        self.made = Plan((), {}, {})

    def look(self, snapshot: Snapshot, rank: int) -> str:
        return LOOK

    def tell(self, *, is_first: bool) -> Json:
        return self._job.held_by(self._rank).tell(is_schema_told=True) if is_first else self._job.told_by(self._rank)

    def plan(self, told: Sequence[Json]) -> Json:
        self.made = make_plan([Told.parse(one) for one in told])
        return self.made.answer

    def take(self, rank: int, answer: Json) -> None:
        self.is_due = False

    def check_written(self, written: Sequence[Written]) -> None:
        """There is nothing but tensors."""


class _Nothing:
    """A rank's files, which are written already; see `distckpt.formats.Staged`."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def write(self, store: Store, path: str) -> Written:
        return Written(tuple(files_of(self._rank)), None, dict.fromkeys(MEASURES, 1.234567))

    def stage(self) -> None: ...
    def settle(self) -> None: ...
    def release(self) -> None: ...


def _save_of(nth: int, rank: int) -> Save:
    return Save(Progress(nth), ("interval",), lambda: _Nothing(rank))


class _NotYet(BaseException):
    """The leader has not answered, and nobody is to wait for that."""


class _Counted:
    """A board that counts what is said on it. Those who speak, and are to hear later, say it once."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._said: set[str] = set()
        self.is_only_spoken_to = False
        self.said_bytes = self.heard_bytes = 0

    def post(self, key: str, value: str) -> None:
        if key in self._said:
            self._said.remove(key)
            return
        if self.is_only_spoken_to:
            self._said.add(key)
        self._board.post(key, value)
        self.said_bytes += len(key) + len(value)

    def look(self, keys: Sequence[str]) -> Sequence[str] | None:
        if self.is_only_spoken_to:
            raise _NotYet
        found = self._board.look(keys)
        self.heard_bytes += sum(map(len, keys)) + sum(map(len, found or ()))
        return found

    def remove(self, key: str) -> None:
        self._board.remove(key)


class _Others:
    """All ranks but the leader."""

    def __init__(self, port: int, count: int) -> None:
        stores = [dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT) for _ in range(CONNECTIONS)]
        self._boards = [_Counted(C10dBoard(store)) for store in stores]
        self.ranks = [
            BoardRanks(self._boards[rank % CONNECTIONS], rank, count, name="scale", timeout=TIMEOUT)
            for rank in range(1, count)
        ]

    def plan(self, told: Sequence[Json]) -> None:
        """As `distckpt.planning.plan`."""
        during, firsts = "plan of a save", list[Json]()
        self.speak_and_hear(lambda mine: firsts.append(together(mine, f"{during} (look)", lambda: LOOK, first_of_each)))
        assert not any(is_among(mine.rank, firsts[0]) for mine in self.ranks), "the leader tells for all"
        self.speak_and_hear(lambda mine: to_leader(mine, f"{during} (tell)", lambda: told[mine.rank]))
        self.hear(lambda mine: from_leader(mine, during, lambda: None))

    def save(self, nth: int) -> None:
        """As `distckpt.saving.save`, without a disk."""
        during = f"save of step {nth}"

        def write(mine: Ranks) -> None:
            to_leader(mine, f"{during} (write)", lambda: _write(_save_of(nth, mine.rank), None, NO_FOLDER))

        self.speak_and_hear(lambda mine: together(mine, f"{during} (snapshot)", lambda: True, all))
        self.hear(lambda mine: from_leader(mine, f"{during} (begin)", lambda: None))
        self.speak_and_hear(write)
        self.hear(lambda mine: from_leader(mine, f"{during} (commit)", lambda: None))

    def hear(self, work: Callable[[Ranks], Any]) -> None:
        """Each does it; the first one waits for the leader."""
        for mine in self.ranks:
            work(mine)

    def speak_and_hear(self, work: Callable[[Ranks], Any]) -> None:
        """Each does it, of which the leader waits for all, and all for the leader."""
        for board in self._boards:
            board.is_only_spoken_to = True
        for mine in self.ranks:
            try:
                work(copy.copy(mine))
            except _NotYet:
                continue
        for board in self._boards:
            board.is_only_spoken_to = False
        self.hear(work)

    @contextmanager
    def counted(self, costs: dict[str, Mapping[str, float]], what: str) -> Iterator[None]:
        for board in self._boards:
            board.said_bytes = board.heard_bytes = 0
        begin = time.process_time()
        yield
        costs[what] = {
            "rank_seconds": (time.process_time() - begin) / len(self.ranks),
            "said_bytes": sum(board.said_bytes for board in self._boards),
            "heard_bytes": sum(board.heard_bytes for board in self._boards),
        }


def _other_ranks(pipe: Connection, state: str, count: int, tensors: int) -> None:
    """What `plan` and `save` do on each rank but the leader."""
    job = Job(state, count, tensors)
    others = _Others(pipe.recv(), count)
    told = [json.loads(json.dumps(job.told_by(rank))) for rank in range(count)]
    costs: dict[str, Mapping[str, float]] = {}
    pipe.send("ready")
    with others.counted(costs, "plan"):
        others.plan(told)
    for nth in range(SAVES):
        with others.counted(costs, "save"):
            others.save(nth)
    pipe.send(costs)
    pipe.recv()
    for _ in range(LOOKS):
        others.ranks[0].listen(0)
    pipe.send("looked")

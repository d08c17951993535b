"""What the leader asks for is done by all ranks at the same boundary, however far apart they are."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest

from distckpt.agreeing import Request, Requests, Stopwatch
from distckpt.errors import RankFailure
from distckpt.ranks import Ranks, Solo, Summary
from distckpt.ranks.board import BoardRanks
from distckpt.testing import MemoryBoard, on_threads, thread_ranks

SOON = timedelta(seconds=10)
BOUNDARIES = 1000


def train(ranks: Ranks, asked_at: dict[int, str], meeting: threading.Barrier | None, seed: int) -> list[Any]:
    """What was due at which boundary. With ``meeting`` each step waits for all ranks, as training's collectives do."""
    requests = Requests(ranks, SOON)
    dawdle = random.Random(seed * 100 + ranks.rank)
    due = []
    try:
        for boundary in range(1, BOUNDARIES + 1):
            if meeting is not None:
                meeting.wait(20)
            elif dawdle.random() < 0.03:
                threading.Event().wait(dawdle.random() * 0.01)
            if ranks.rank == 0 and boundary in asked_at:
                requests.ask(Request(asked_at[boundary], "because"))
            due += [(boundary, request.what) for request in requests.due(boundary)]
    finally:
        requests.close()
    return due


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("meets", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_act_at_the_same_boundary_in_the_order_in_which_it_was_asked(world_size, meets, seed):
    choose = random.Random(seed)
    asked_at = {choose.randrange(1, BOUNDARIES // 2): f"request {nth}" for nth in range(4)}
    meeting = threading.Barrier(world_size) if meets else None
    told = on_threads(thread_ranks(world_size), lambda ranks: train(ranks, asked_at, meeting, seed))
    assert all(due == told[0] for due in told), told
    assert isinstance(told[0], list)
    asked = [asked_at[boundary] for boundary in sorted(asked_at)]
    done = [what for _, what in told[0]]
    assert done == asked[: len(done)] and (done == asked or not meets)


def test_one_process_acts_at_its_next_boundary():
    requests = Requests(Solo(), SOON)
    assert requests.due(1) == []
    requests.ask(Request("save", "asked"))
    assert requests.due(2) == [Request("save", "asked")]
    assert requests.due(3) == []


def test_a_rank_that_does_not_answer_is_named_at_the_next_boundary():
    ranks = thread_ranks(2, timeout=timedelta(seconds=0.3))
    leader = Requests(ranks[0], timedelta(seconds=0.3))
    leader.ask(Request("save", "asked"))
    boundary = 0
    with pytest.raises(RankFailure, match="rank 1: did not come"):
        while True:  # each look is a flag until the listener gave rank 1 up
            boundary += 1
            leader.due(boundary)
    leader.close()


class Halting:
    """Ranks whose exchanges wait until they are let: one that is stopped for a while, as by SIGSTOP."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.may_go_on = threading.Event()
        self.is_asked = threading.Semaphore(0)
        self.has_answered = threading.Semaphore(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ranks, name)

    def exchange(self, during: str, value: Any, summary: Summary) -> Any:
        self.is_asked.release()
        assert self.may_go_on.wait(20)
        try:
            return self._ranks.exchange(during, value, summary)
        finally:
            self.has_answered.release()


class Pair:
    """The requests of a leader and of another rank, which may halt. They give each other up soon."""

    def __init__(self) -> None:
        first, second = thread_ranks(2, timeout=timedelta(seconds=0.3))
        self.halting = Halting(second)
        self.leader = Requests(first, SOON)
        self.other = Requests(self.halting, SOON)

    def ask(self, what: str) -> None:
        self.leader.ask(Request(what, "asked"))
        assert self.halting.is_asked.acquire(timeout=20)

    def close(self) -> None:
        self.halting.may_go_on.set()
        self.other.close()
        self.leader.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    one = Pair()
    yield one
    one.close()


def next_due(requests: Requests, boundary: int) -> tuple[int, list[Request] | str]:
    """The boundary after that one at which something is due or raised, and what."""
    while True:
        boundary += 1
        try:
            if due := requests.due(boundary):
                return boundary, due
        except RankFailure as failure:
            return boundary, str(failure)


def test_a_rank_that_halted_for_too_long_costs_that_request_and_no_later_one(pair):
    pair.ask("first")
    at, told = next_due(pair.leader, 0)
    pair.halting.may_go_on.set()
    other_at, other_told = next_due(pair.other, 0)
    assert other_told == told and "rank 1: did not come" in told
    both = {0: (pair.leader, at), 1: (pair.other, other_at)}
    pair.ask("second")
    first, second = on_threads(thread_ranks(2), lambda ranks: next_due(*both[ranks.rank]))
    assert first == second == (first[0], [Request("second", "asked")])


def test_what_was_agreed_before_a_failure_is_done_by_all_and_the_failure_is_raised_where_nothing_is(pair):
    far = 10**9
    pair.other.due(far)
    pair.halting.may_go_on.set()
    pair.ask("agreed")
    assert pair.halting.has_answered.acquire(timeout=20)
    pair.halting.may_go_on.clear()
    pair.ask("forgotten")
    assert "rank 1: did not come" in next_due(pair.leader, 0)[1]
    pair.halting.may_go_on.set()
    for requests in (pair.leader, pair.other):
        assert requests.due(far + 1) == [Request("agreed", "asked")]
    with pytest.raises(RankFailure, match="rank 1: did not come"):
        pair.other.due(far + 2)


def test_what_is_asked_at_the_end_is_not_waited_for():
    leader, other = (Requests(ranks, SOON) for ranks in thread_ranks(2))
    other.close()
    began = time.monotonic()
    with leader._changed:  # so that the listener sees both at once
        leader.ask(Request("save", "asked"))
        leader._closing.set()
    leader.close()
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("is_leader_first", [True, False])
def test_close_waits_for_no_listener_however_patient_it_is(monkeypatch, is_leader_first):
    monkeypatch.setattr("distckpt.agreeing._PATIENCE_SECONDS", 60)
    is_begun = threading.Event()

    def close(ranks: Ranks) -> None:
        requests = Requests(ranks, SOON)
        if (ranks.rank == 0) is not is_leader_first:
            assert is_begun.wait(20)
            threading.Event().wait(0.1)  # the others are closing, or have closed
        is_begun.set()
        requests.close()

    assert on_threads(thread_ranks(3), close, seconds=20) == [None] * 3


def test_what_the_leader_asks_before_it_closes_is_answered_by_ranks_that_close_already(monkeypatch):
    monkeypatch.setattr("distckpt.agreeing._PATIENCE_SECONDS", 20)
    leader, other = (Requests(ranks, SOON) for ranks in thread_ranks(2))
    closing = threading.Thread(target=other.close)
    closing.start()
    assert other._closing.wait(20)
    threading.Event().wait(0.1)
    leader.ask(Request("save", "asked"))
    assert next_due(leader, 0)[1] == [Request("save", "asked")]
    leader.close()
    closing.join(20)
    assert not closing.is_alive()


class Frail(MemoryBoard):
    is_gone = False

    def look(self, keys: Sequence[str]) -> Sequence[str] | None:
        if self.is_gone:
            raise ConnectionError("no route to the board")
        return super().look(keys)


def test_a_rank_that_goes_on_after_the_leader_has_closed_learns_that_it_is_gone(monkeypatch):
    monkeypatch.setattr("distckpt.agreeing._PATIENCE_SECONDS", 0.02)
    board = Frail()
    leader, other = (Requests(BoardRanks(board, rank, 2, name="test", timeout=SOON), SOON) for rank in range(2))
    leader.close()
    while other._ranks._told == 0:  # type: ignore[attr-defined]
        assert other.due(1) == []
    board.is_gone = True
    assert "its store is gone" in next_due(other, 1)[1]
    other.close()


def test_close_ends_the_thread_of_every_rank():
    before = threading.active_count()
    told = on_threads(thread_ranks(3), lambda ranks: Requests(ranks, SOON).close())
    assert told == [None] * 3
    assert threading.active_count() == before


NEVER_CLOSED = """
from datetime import timedelta

import torch.distributed as dist

from distckpt.agreeing import Requests
from distckpt.ranks import board
from distckpt.ranks.process_group import detect

board.max = lambda *pauses: 0.0  # the listener is in the store nearly all the time, in which Python must not end
dist.init_process_group("gloo")
requests = Requests(detect(timedelta(seconds=10)), timedelta(seconds=10))
dist.barrier()
"""


@pytest.mark.timeout(60)
def test_a_program_of_several_ranks_that_never_closes_ends_well(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(NEVER_CLOSED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run([*launcher, str(program)], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 0, ended.stderr


def test_a_stopwatch_is_over_after_its_period_and_begins_anew(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("distckpt.agreeing.time.monotonic", lambda: now[0])
    watch = Stopwatch(timedelta(seconds=5))
    now[0] = 104.9
    assert not watch.is_over
    now[0] = 105.0
    assert watch.is_over
    watch.restart()
    assert not watch.is_over

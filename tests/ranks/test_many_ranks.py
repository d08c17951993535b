"""What agreeing costs does not outgrow the number of ranks: no rank is told more, and the leader looks in few goes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta

import pytest
from flows import Saves

from distckpt import layout
from distckpt.errors import RankFailure
from distckpt.formats.sharded import Sharded
from distckpt.manifest import Record
from distckpt.ranks import first_of_each, is_among, read_failures, tell_failures, to_leader, together
from distckpt.ranks.board import BoardRanks
from distckpt.restoring import Restored
from distckpt.testing import MemoryBoard, on_threads, thread_ranks

LONG = timedelta(seconds=20)


class Listened(MemoryBoard):
    """A board that knows how long the leader's words were, and how often whose thread looked."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, int] = {}
        self.looks: Counter[int] = Counter()

    def post(self, key: str, value: str) -> None:
        if key.endswith("/all"):
            self.told[key] = len(value)
        super().post(key, value)

    def look(self, keys: Sequence[str]) -> Sequence[str] | None:
        self.looks[threading.get_ident()] += 1
        return super().look(keys)


def told_by_the_leader(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How long each of its words was."""
    board = Listened()
    with monkeypatch.context() as patched:
        patched.setattr("distckpt.testing.MemoryBoard", lambda: board)
        work()
    return [*board.told.values()]


@pytest.mark.parametrize("damage", [False, True])
def test_no_rank_is_told_more_of_a_save_and_a_restore_where_there_are_more(tmp_path, monkeypatch, damage):
    def save(count: int) -> None:
        saves = Saves(tmp_path / f"{count}-{damage}", count, make_format=Sharded)
        for step in (1, 2):
            assert all(isinstance(one, Record) for one in saves.save(step))
        if damage:
            (saves.folder / "step-00000002" / layout.MANIFEST).write_bytes(b"{}")
        assert all(isinstance(one, Restored) for one in saves.restore())

    few, many = (told_by_the_leader(lambda count=count: save(count), monkeypatch) for count in (3, 24))
    assert len(few) == len(many) >= 12
    assert all(more < less + 16 for less, more in zip(few, many, strict=True)), (few, many)


def test_no_rank_is_told_more_of_a_failure_of_all_where_there_are_more(monkeypatch):
    def fail(count: int) -> None:
        told = on_threads(thread_ranks(count), lambda ranks: together(ranks, "work", lambda: 1 // 0))
        assert [set(one.failures) for one in told] == [set(range(count))] * count

    few, many = (told_by_the_leader(lambda count=count: fail(count), monkeypatch) for count in (5, 40))
    assert sum(many) < 1.1 * sum(few)


def test_a_summary_is_made_once_by_the_leader_and_told_to_all():
    asked = []

    def summary(told: list[int]) -> int:
        asked.append(told)
        return sum(told)

    told = on_threads(thread_ranks(4), lambda ranks: together(ranks, "work", lambda: ranks.rank + 1, summary))
    assert told == [10] * 4 and asked == [[1, 2, 3, 4]]


def test_a_summary_that_fails_is_a_failure_of_the_leader_on_all():
    told = on_threads(thread_ranks(3), lambda ranks: together(ranks, "work", lambda: ranks.rank, lambda _: 1 // 0))
    assert {str(one) for one in told} == {"work failed: rank 0: ZeroDivisionError: integer division or modulo by zero"}


def test_the_leader_alone_has_the_results_that_it_asked_for():
    assert on_threads(thread_ranks(3), lambda ranks: to_leader(ranks, "work", lambda: ranks.rank)) == [
        [0, 1, 2],
        [],
        [],
    ]


def test_the_leader_hears_many_ranks_in_few_looks():
    board, count = Listened(), 1300
    ranks = [BoardRanks(board, rank, count, name="test", timeout=LONG) for rank in range(count)]
    for rank in range(1, count):
        board.post(f"test/1/{rank}", f'{{"during": "save", "value": {rank}, "heard": 0}}')
    assert ranks[0].exchange("save", 0) == [*range(count)]
    assert board.looks[threading.get_ident()] == 3


def test_of_many_ranks_those_who_do_not_come_are_named_and_no_others():
    board, count, absent = MemoryBoard(), 1300, [5, 700, 1299]
    leader = BoardRanks(board, 0, count, name="test", timeout=timedelta(seconds=0.2))
    for rank in set(range(1, count)) - set(absent):
        board.post(f"test/1/{rank}", '{"during": "save", "value": 0, "heard": 0}')
    began = time.monotonic()
    with pytest.raises(RankFailure) as raised:
        leader.exchange("save", 0)
    assert sorted(raised.value.failures) == absent and 0.2 < time.monotonic() - began < 8


@pytest.mark.parametrize(("world_size", "least", "most"), [(2, 20, 1000), (16384, 2, 8), (200_000, 2, 3)])
def test_the_more_ranks_wait_the_less_often_each_looks(world_size, least, most):
    board = Listened()
    waiting = BoardRanks(board, 1, world_size, name="test", timeout=timedelta(seconds=1))
    began = time.monotonic()
    with pytest.raises(RankFailure, match="rank 0: did not come within 0:00:01"):
        waiting.broadcast("save", None)
    assert least <= board.looks[threading.get_ident()] <= most and time.monotonic() - began < 1.8


@pytest.mark.parametrize("told", [["a"] * 9, [*"abcdefghi"], [*"aabbacbcc"], ["a"]])
def test_of_those_that_said_the_same_the_first_is_known(told):
    firsts = first_of_each(told)
    assert [rank for rank in range(len(told)) if is_among(rank, firsts)] == [
        rank for rank, said in enumerate(told) if told.index(said) == rank
    ]


def test_failures_of_thousands_are_told_in_few_words_that_name_each():
    absent = dict.fromkeys(range(1, 10_000), "did not come")
    assert read_failures(tell_failures(absent)) == absent and len(str(tell_failures(absent))) < 100
    disks = {rank: f"disk {rank} is full" for rank in range(10_000)}
    told = read_failures(tell_failures(disks))
    assert told.keys() == disks.keys() and [told[rank] for rank in range(100)] == [disks[rank] for rank in range(100)]
    assert {told[rank] for rank in range(100, 10_000)} == {"failed as well, with words of its own"}
    assert len(str(tell_failures(disks))) < 10_000

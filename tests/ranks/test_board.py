"""What can go wrong on a board, and how much of it is left there."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest

from distckpt.errors import RankFailure
from distckpt.ranks import Ranks, together
from distckpt.ranks.board import BoardRanks
from distckpt.testing import MemoryBoard, on_threads

SOON = timedelta(seconds=0.3)
LONG = timedelta(seconds=20)


class OpenBoard(MemoryBoard):
    """A board that shows what hangs on it, and can be taken away."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()
        self.looked: set[str] = set()
        self.most = 0
        self.is_gone = False
        self.removals_left = 1_000_000

    def post(self, key, value):
        self.refuse()
        self.keys.add(key)
        self.most = max(self.most, len(self.keys))
        super().post(key, value)

    def look(self, keys):
        self.refuse()
        self.looked.update(keys)
        return super().look(keys)

    def remove(self, key):
        self.removals_left -= 1
        self.is_gone = self.is_gone or self.removals_left < 0
        self.refuse()
        self.keys.discard(key)
        super().remove(key)

    def refuse(self):
        if self.is_gone:
            raise ConnectionError("no route to the board")


@pytest.fixture
def board() -> OpenBoard:
    return OpenBoard()


def ranks_on(board, world_size=3, timeout=LONG) -> list[Ranks]:
    return [BoardRanks(board, rank, world_size, name="test", timeout=timeout) for rank in range(world_size)]


def failures(results) -> list[dict[int, str]]:
    assert all(isinstance(result, RankFailure) for result in results), results
    return [result.failures for result in results]


# Who is where


def test_ranks_that_do_different_things_are_named_on_all_with_the_same_words(board):
    told = on_threads(ranks_on(board), lambda ranks: ranks.exchange("save" if ranks.rank != 1 else "restore", None))
    assert {str(error) for error in told} == {"save failed: rank 1: was in 'restore' instead"}


def test_a_rank_that_expects_another_word_of_the_leader_knows_where_it_is(board):
    told = on_threads(ranks_on(board, 2), lambda ranks: ranks.broadcast(["save", "restore"][ranks.rank], 1))
    assert told[0] == 1 and str(told[1]) == "restore failed: rank 0: was in 'save' instead"


def test_a_rank_that_only_listens_where_all_should_speak_fails_with_the_others(board):
    def talk(ranks):
        return ranks.exchange("save", 1) if ranks.rank != 1 else ranks.broadcast("save", 1)

    told = failures(on_threads(ranks_on(board, timeout=SOON), talk))
    assert set(told[0]) == set(told[2]) == {1}


def test_a_rank_that_speaks_where_only_the_leader_does_gives_it_up(board):
    def talk(ranks):
        return ranks.exchange("save", 1) if ranks.rank == 1 else ranks.broadcast("save", 1)

    told = on_threads(ranks_on(board, timeout=SOON), talk)
    assert [told[0], told[2]] == [1, 1] and set(told[1].failures) == {0}


# Who does not come


def test_every_rank_that_does_not_come_is_named_on_those_who_did(board):
    ranks = ranks_on(board, 5, timeout=SOON)
    told = on_threads([ranks[0], ranks[2]], lambda mine: mine.exchange("save", None))
    assert [set(one) for one in failures(told)] == [{1, 3, 4}] * 2
    assert not [key for key in board.looked if key.endswith("parted/1")], "nobody waits for them once more"


@pytest.mark.parametrize("say", ["exchange", "broadcast"])
def test_a_leader_that_does_not_come_is_named_by_each(board, say):
    told = on_threads(ranks_on(board, timeout=SOON)[1:], lambda ranks: getattr(ranks, say)("save", None))
    assert [set(one) for one in failures(told)] == [{0}] * 2
    assert "did not come within 0:00:00.300000" in str(told[0])


def test_a_deadline_is_one_for_all_who_are_late(board):
    ranks = ranks_on(board, 50, timeout=SOON)
    began = time.monotonic()
    (told,) = on_threads(ranks[:1], lambda mine: mine.exchange("save", None))
    assert len(told.failures) == 49 and time.monotonic() - began < 5


def test_those_who_are_there_wait_for_a_slow_rank_no_longer_than_the_leader_does(board):
    began = time.monotonic()
    told = on_threads(ranks_on(board, 3, timeout=SOON)[:2], lambda ranks: ranks.exchange("save", None))
    assert [set(one) for one in failures(told)] == [{2}, {2}]
    assert time.monotonic() - began < 5


def test_a_rank_that_comes_too_late_learns_what_became_of_it_and_all_can_go_on(board):
    gave_up = threading.Event()

    def talk(ranks):
        if ranks.rank == 2:
            gave_up.wait(10)
        try:
            ranks.exchange("first", None)
        except RankFailure as failure:
            first = str(failure)
        gave_up.set()
        return first, ranks.exchange("second", ranks.rank)

    told = on_threads(ranks_on(board, timeout=timedelta(seconds=1)), talk)
    assert [one[1] for one in told] == [[0, 1, 2]] * 3
    assert len({one[0] for one in told}) == 1 and "rank 2: did not come" in told[2][0]


# The board


def test_a_board_that_is_gone_is_an_error_of_every_method_that_talks(board):
    ranks = ranks_on(board)
    board.is_gone = True
    for talk in (
        lambda: ranks[0].exchange("save", None),
        lambda: ranks[1].exchange("save", None),
        lambda: ranks[1].broadcast("save", None),
        lambda: ranks[0].announce(1),
        lambda: ranks[1].listen(1),
        lambda: ranks[1].close(),
    ):
        with pytest.raises(RankFailure, match="its store is gone .ConnectionError: no route to the board"):
            talk()


@pytest.mark.parametrize("removals", range(15))
def test_a_board_that_goes_while_somebody_takes_words_down_is_the_leaders_failure(board, removals):
    """As when the leader is killed while another rank still reads what it said last: that rank is not the one lost."""
    board.removals_left = removals
    told = on_threads(ranks_on(board), lambda ranks: talk_of_all_kinds(ranks, 20))
    assert [list(one) for one in failures(told)] == [[0]] * 3


def test_a_board_that_goes_after_a_failure_does_not_hide_it(board):
    def work(ranks):
        def fail():
            raise OSError(28, "No space left on device")

        part = ranks.part
        ranks.part = lambda during: [setattr(board, "is_gone", True), part(during)]
        return together(ranks, "write", fail)

    (told,) = on_threads(ranks_on(board, 1), work)
    assert "No space left on device" in str(told)


def test_a_leader_that_leaves_waits_for_the_others_a_moment_and_no_longer(board):
    left = threading.Event()

    def leave(ranks):
        if ranks.rank:
            assert not left.wait(0.05), "the leader left first"
        ranks.close()
        if not ranks.rank:
            left.set()

    assert on_threads(ranks_on(board), leave) == [None] * 3
    began = time.monotonic()
    ranks_on(OpenBoard(), timeout=SOON)[0].close()
    assert time.monotonic() - began < 5


# What is left


def talk_of_all_kinds(ranks, rounds):
    for turn in range(rounds):
        ranks.exchange("exchange", turn)
        if turn % 3 == 0:
            ranks.broadcast("broadcast", turn)
        if turn % 5 == 0:
            assert (ranks.announce(turn) if ranks.rank == 0 else ranks.listen(10)) in (None, turn)


def test_words_do_not_pile_up_on_the_board(board):
    on_threads(ranks_on(board), lambda ranks: talk_of_all_kinds(ranks, 60))
    assert board.most < 30 and len(board.keys) < 15


def test_words_of_the_leader_alone_do_not_pile_up_either(board):
    ranks = ranks_on(board)
    for turn in range(500):
        assert [mine.broadcast("report", turn) for mine in ranks] == [turn] * 3
    assert board.most < 200


def test_words_of_the_leader_stay_until_those_who_are_behind_have_read_them(board):
    leader, quick, slow = ranks_on(board, timeout=SOON)
    began = time.monotonic()
    for turn in range(200):
        leader.broadcast("report", turn)
        quick.broadcast("report", None)
    assert time.monotonic() - began < 4, "it does not wait for them"
    failures(on_threads([leader, quick], lambda ranks: ranks.exchange("save", None)))
    assert [slow.broadcast("report", None) for _ in range(200)] == list(range(200))


def test_failures_do_not_pile_up_on_the_board(board):
    def fail(ranks):
        for _ in range(50):
            with pytest.raises(RankFailure):
                together(ranks, "work", lambda: 1 // 0)
        ranks.exchange("end", None)

    on_threads(ranks_on(board), fail)
    assert len(board.keys) < 20


def test_an_announcement_stays_until_all_have_heard_it(board):
    leader, quick, slow = ranks_on(board)
    for turn in range(3):
        leader.announce(turn)
    assert [quick.listen(1) for _ in range(3)] == [0, 1, 2] and slow.listen(1) == 0
    on_threads([leader, quick, slow], lambda ranks: ranks.exchange("talk", None))
    assert {key for key in board.keys if "told" in key} == {"test/told/2", "test/told/3"}
    assert [slow.listen(1), slow.listen(1)] == [1, 2]


def test_what_the_ranks_of_one_name_say_is_not_heard_by_those_of_another(board):
    def talk(ranks):
        other = BoardRanks(board, ranks.rank, 2, name="other", timeout=LONG)
        return [ranks.exchange("talk", 1), other.exchange("talk", 2), ranks.fork("aside").exchange("talk", 3)]

    assert on_threads(ranks_on(board, 2), talk) == [[[1, 1], [2, 2], [3, 3]]] * 2


def test_who_is_hurried_among_many_does_not_sleep_until_its_turn_to_look(board):
    leader, other = (BoardRanks(board, rank, 200_000, name="test", timeout=LONG) for rank in range(2))
    hurried = threading.Event()
    heard = []
    listening = threading.Thread(target=lambda: heard.append(other.listen(60, hurried)), daemon=True)
    listening.start()
    while not board.looked:
        threading.Event().wait(0.001)
    leader.announce("word")
    hurried.set()
    listening.join(20)  # idle, so many look every 40 s
    assert heard == ["word"]

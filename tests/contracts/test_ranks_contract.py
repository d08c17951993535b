"""What all ranks promise: these tests run alone, on threads, and on processes of torch.distributed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from distckpt import errors
from distckpt.errors import DistckptError, NoCheckpoint, RankFailure, StateMismatch, Superseded
from distckpt.ranks import from_leader, is_leader, together
from distckpt.testing import thread_ranks


def test_each_rank_knows_its_place(job):
    places = job(lambda ranks: (ranks.rank, ranks.world_size, is_leader(ranks)))
    assert places == [(rank, job.world_size, rank == 0) for rank in range(job.world_size)]


@pytest.mark.parametrize("value", [None, True, 3, -1.5, "wörds\n", [1, [2]], {"a": {"b": None}}], ids=ascii)
def test_all_exchange_what_each_says_in_the_order_of_ranks(job, value):
    told = job(lambda ranks: ranks.exchange("talk", [ranks.rank, value]))
    assert told == [[[rank, value] for rank in range(job.world_size)]] * job.world_size


def test_all_hear_what_the_leader_broadcasts(job):
    assert job(lambda ranks: ranks.broadcast("talk", f"from {ranks.rank}")) == ["from 0"] * job.world_size


def test_words_are_kept_apart_round_by_round(job):
    def talk(ranks):
        return [
            (ranks.exchange("talk", turn), ranks.broadcast("tell", -turn if ranks.rank == 0 else None))
            for turn in range(50)
        ]

    assert job(talk) == [[([turn] * job.world_size, -turn) for turn in range(50)]] * job.world_size


def test_a_fork_talks_in_another_thread_and_never_mixes_its_words(job):
    def talk(ranks):
        forked = ranks.fork("aside")
        aside = []
        thread = threading.Thread(target=lambda: aside.extend(forked.exchange("aside", -turn) for turn in range(50)))
        thread.start()
        aloud = [ranks.exchange("aloud", turn) for turn in range(50)]
        thread.join()
        forked.close()
        return aloud, aside

    turns = [[turn] * job.world_size for turn in range(50)]
    assert job(talk) == [(turns, [[-one for one in turn] for turn in turns])] * job.world_size


def test_announcements_are_heard_in_order_by_all_who_listen_now_or_later(job):
    def talk(ranks):
        if is_leader(ranks):
            for turn in range(3):
                ranks.announce({"turn": turn})
        ranks.exchange("they were made", None)
        heard = [] if is_leader(ranks) else [ranks.listen(10) for _ in range(3)]
        ranks.exchange("they were heard", None)
        return heard

    heard = [{"turn": turn} for turn in range(3)]
    assert job(talk) == [[]] + [heard] * (job.world_size - 1)


def test_who_listens_in_vain_is_told_so(job):
    assert job(lambda ranks: None if is_leader(ranks) else ranks.listen(0.01)) == [None] * job.world_size


def test_who_is_hurried_waits_as_long_from_then_on_and_hears_what_is_announced_meanwhile(job):
    hurried = threading.Event()
    hurried.set()

    def talk(ranks):
        if is_leader(ranks):
            threading.Event().wait(0.1)
            return ranks.announce("late")
        return [ranks.listen(20, hurried), ranks.listen(0.01, hurried)]

    assert job(talk) == [None] + [["late", None]] * (job.world_size - 1)


def test_closing_twice_is_safe(job):
    assert job(lambda ranks: [ranks.close(), ranks.close()]) == [[None, None]] * job.world_size


# Together


def test_all_get_the_results_of_all(job):
    told = job(lambda ranks: together(ranks, "work", lambda: {"rank": ranks.rank}))
    assert told == [[{"rank": rank} for rank in range(job.world_size)]] * job.world_size


@pytest.mark.parametrize("failing", ["first", "last", "all"])
def test_what_fails_on_some_is_raised_on_all_with_the_same_words(job, failing):
    at_fault = {"first": [0], "last": [job.world_size - 1], "all": list(range(job.world_size))}[failing]

    def fail(ranks):
        if ranks.rank in at_fault:
            raise OSError(28, "No space left on device", f"disk of {ranks.rank}")

    told = job(lambda ranks: together(ranks, "write of step-00000300", lambda: fail(ranks)))
    assert {type(error) for error in told} == {RankFailure} and len({str(error) for error in told}) == 1
    words = {rank: f"OSError: [Errno 28] No space left on device: 'disk of {rank}'" for rank in at_fault}
    assert told[0].failures == words and told[0].during == "write of step-00000300"


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_would_end_a_program_is_an_error_like_any_other_beside_the_main_thread(job, kind):
    def fail(ranks):
        if ranks.rank == 0:
            raise kind("at once")

    def beside(ranks):
        with ThreadPoolExecutor(1) as pool:
            told = [together, from_leader]
            errors = [pool.submit(one, ranks, "work", lambda: fail(ranks)).exception() for one in told]
        return [(type(error), str(error)) for error in errors]

    assert job(beside) == [[(RankFailure, f"work failed: rank 0: {kind.__name__}: at once")] * 2] * job.world_size


def test_what_ends_the_program_is_raised_as_it_is_and_waits_for_no_rank():
    def interrupted():
        raise KeyboardInterrupt

    for agree in (together, from_leader):
        with pytest.raises(KeyboardInterrupt):
            agree(thread_ranks(2)[0], "work", interrupted)


def test_each_rank_knows_its_own_failure_as_the_cause(job):
    def causes(ranks):
        try:
            together(ranks, "work", lambda: 1 // ranks.rank)
        except RankFailure as failure:
            return type(failure.__cause__).__name__

    assert job(causes) == ["ZeroDivisionError"] + ["NoneType"] * (job.world_size - 1)


def test_after_a_failure_all_can_go_on(job):
    def go_on(ranks):
        raised = 0
        for turn in range(4):
            try:
                together(ranks, "work", lambda turn=turn: 1 // (turn % 2))
            except RankFailure:
                raised += 1
        return raised, ranks.exchange("after", ranks.rank)

    assert job(go_on) == [(2, list(range(job.world_size)))] * job.world_size


@pytest.mark.parametrize(
    "kind",
    [
        *(errors.DirectoryInUse, errors.Superseded, errors.NoCheckpoint, errors.DamagedCheckpoint),
        *(errors.NewerVersion, errors.StateMismatch),
    ],
)
def test_an_error_that_says_by_its_type_what_to_do_is_of_that_type_on_all(job, kind):
    def fail(ranks):
        if ranks.rank == job.world_size - 1:
            raise kind("do this")

    told = job(lambda ranks: together(ranks, "work", lambda: fail(ranks)))
    assert {type(error) for error in told} == {kind}
    assert all("do this" in str(error) for error in told)


def test_errors_of_several_types_are_told_together(job):
    def fail(ranks):
        raise NoCheckpoint("none") if ranks.rank else StateMismatch("another")

    told = job(lambda ranks: together(ranks, "work", lambda: fail(ranks)))
    assert {type(error) for error in told} == {RankFailure if job.world_size > 1 else StateMismatch}
    assert all("another" in str(error) for error in told)


def test_an_error_without_words_is_named_by_its_type(job):
    def fail(ranks):
        raise DistckptError if ranks.rank == 0 else KeyError

    told = job(lambda ranks: together(ranks, "work", lambda: fail(ranks)))
    assert "rank 0: DistckptError" in str(told[0])


# From the leader


def test_only_the_leader_works_and_all_get_its_result(job):
    def lead(ranks):
        worked = []
        result = from_leader(ranks, "choice", lambda: worked.append(1) or ["chosen", ranks.rank])
        return result, worked

    assert job(lead) == [(["chosen", 0], [1])] + [(["chosen", 0], [])] * (job.world_size - 1)


def test_what_fails_on_the_leader_is_raised_on_all(job):
    def fail():
        raise PermissionError(13, "Permission denied", "runs")

    told = job(lambda ranks: from_leader(ranks, "claim", fail))
    assert {(type(error), str(error)) for error in told} == {
        (RankFailure, "claim failed: rank 0: PermissionError: [Errno 13] Permission denied: 'runs'")
    }


def test_an_error_of_the_leader_that_says_what_to_do_is_of_its_type_on_all(job):
    def fail():
        raise Superseded("stop this process")

    told = job(lambda ranks: from_leader(ranks, "commit", fail))
    assert {type(error) for error in told} == {Superseded}


@pytest.mark.parametrize("lead", [True, False])
def test_a_leader_that_ends_after_a_failure_lets_the_others_learn_it_first(job, lead):
    def fail():
        raise Superseded("stop this process")

    def talk(ranks):
        ranks.close = lambda: None  # as a process whose main program ends by an exception does not
        return from_leader(ranks, "claim", fail) if lead else together(ranks, "claim", fail)

    assert {type(error) for error in job(talk)} == {Superseded}


# Deadlines


@pytest.mark.parametrize("job", ["2 threads", "4 threads", "2 processes"], indirect=True)  # alone there is none
def test_a_rank_that_does_not_come_is_named_on_all_others_within_the_deadline(job):
    gone = threading.Event()  # thread ranks wait for it, so that the board outlives the talk

    def talk(ranks):
        if ranks.rank == job.world_size - 1:
            gone.wait(1 if job.kind == "gloo" else 10)
            return "gone"
        try:
            return ranks.exchange("talk", None)
        finally:
            gone.set()

    *told, last = job(talk, timeout=timedelta(seconds=0.3))
    assert last == "gone"
    for error in told:
        assert isinstance(error, RankFailure) and set(error.failures) == {job.world_size - 1}
        assert "did not come within 0:00:00.3" in str(error)

"""Ranks that a test forks: what is told of each, and how long each is there."""

from __future__ import annotations

import os
import select
import signal
import threading

import pytest
import torch.distributed as dist
from rank_processes import RankProcesses


def use_the_store_when_the_leader_has_returned(rank: int) -> bool:
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        store.set("pid", str(os.getpid()))
        return True
    leader = os.pidfd_open(int(store.get("pid")))
    select.select([leader], [], [], 0.5)  # ready when it has gone, which it must not
    store.set("word", "late")
    return store.get("word") == b"late"


def test_a_rank_that_has_returned_is_there_until_all_have(run_ranks: RankProcesses) -> None:
    assert run_ranks(3, use_the_store_when_the_leader_has_returned) == [True, True, True]


def end(rank: int, how: str) -> int:
    store = dist.distributed_c10d._get_default_store()
    store.set(f"connected {rank}", "")
    if rank == 1:
        store.wait([f"connected {one}" for one in range(3)])
        if how == "raises":
            raise ValueError("not today")
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()
    return rank


@pytest.mark.parametrize(
    ("how", "words"),
    [("raises", "ValueError: not today"), ("dies", "without a word"), ("hangs", "did not end in time")],
)
def test_a_rank_that_does_not_return_fails_the_test(run_ranks: RankProcesses, how: str, words: str) -> None:
    with pytest.raises(AssertionError) as caught:
        run_ranks(3, end, how, seconds=2)
    told = str(caught.value)
    assert "rank 1: " in told and words in told and "rank 0" not in told and "rank 2" not in told


@pytest.mark.parametrize("how", ["raises", "dies", "hangs", "returns"])
def test_nobody_waits_for_a_rank_that_is_lost(run_ranks: RankProcesses, how: str) -> None:
    assert run_ranks(3, end, how, lost=(1,)) == [0, None, 2]

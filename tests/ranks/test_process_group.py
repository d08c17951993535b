"""The ranks of torch.distributed: found by looking, on real processes."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from distckpt import Checkpointer
from distckpt.ranks import Solo
from distckpt.ranks.process_group import detect

TIMEOUT = timedelta(seconds=20)


def test_a_process_without_a_group_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert isinstance(detect(TIMEOUT), Solo)


@pytest.mark.parametrize("told", ["1", "", "many"])
def test_a_launcher_of_one_process_or_of_nobody_knows_how_many_is_no_obstacle(monkeypatch, told):
    monkeypatch.setenv("WORLD_SIZE", told)
    assert isinstance(detect(TIMEOUT), Solo)


def test_processes_that_do_not_know_of_one_another_yet_are_told_what_to_call(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE is 2, .*call torch.distributed.init_process_group"):
        detect(TIMEOUT)


def test_a_group_of_one_is_alone(run_ranks):
    assert run_ranks(1, lambda rank: type(detect(TIMEOUT)).__name__) == ["Solo"]


def talk_twice(rank: int) -> list[list[str]]:
    first, second = detect(TIMEOUT), detect(TIMEOUT)
    heard = []
    talk = threading.Thread(target=lambda: heard.extend(first.exchange("talk", f"first {rank}") for _ in range(30)))
    talk.start()
    told = [second.exchange("talk", f"second {rank}") for _ in range(30)]
    talk.join()
    first.close()
    second.close()
    return [max(heard), min(heard), max(told), min(told)]


def test_the_nth_look_of_one_rank_talks_with_the_nth_of_the_others(run_ranks):
    first, second = [["first 0", "first 1"]] * 2, [["second 0", "second 1"]] * 2
    assert run_ranks(2, talk_twice) == [first + second] * 2


def look_again(rank: int) -> list[list[int]]:
    heard = []
    for turn in range(3):
        ranks = detect(TIMEOUT)
        heard.append(ranks.exchange("talk", [rank, turn]))
        ranks.close()
    return heard


def test_those_who_look_again_do_not_hear_what_was_said_before(run_ranks):
    assert run_ranks(2, look_again) == [[[[0, turn], [1, turn]] for turn in range(3)]] * 2


def checkpoint_two(rank: int, root) -> list[int]:
    parts = [torch.nn.Linear(2, 2) for _ in range(2)]
    first, second = (Checkpointer(root / str(nth), {"model": part}, timeout=TIMEOUT) for nth, part in enumerate(parts))
    for _ in range(3):
        first.step()
    second.step()
    second.save()
    first.save(wait=True)
    second.wait()
    steps = [first.latest.progress.step, second.latest.progress.step]
    first.close()
    second.close()
    return steps


def test_two_checkpointers_of_one_job_do_not_mix_their_words(run_ranks, tmp_path):
    assert run_ranks(2, checkpoint_two, tmp_path) == [[3, 1]] * 2


def train_beside(rank: int) -> list[float]:
    ranks = detect(TIMEOUT)
    talk = threading.Thread(target=lambda: [ranks.exchange("talk", turn) for turn in range(100)])
    talk.start()
    total = torch.ones(1)
    for _ in range(100):
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
    talk.join()
    ranks.close()
    return total.tolist()


def test_agreeing_in_a_thread_does_not_disturb_the_collectives_of_training(run_ranks):
    assert run_ranks(2, train_beside) == [[1.0]] * 2

"""What training reports is judged by rank 0's numbers against the records, and every rank learns the verdict."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from distckpt.best import AutoMetric, BestBy, Metric
from distckpt.errors import RankFailure
from distckpt.judging import Judge, Verdict
from distckpt.manifest import Record
from distckpt.progress import Progress
from distckpt.ranks import Solo
from distckpt.testing import on_threads, thread_ranks

LOSS = Metric("loss", "less")
ACC = Metric("acc", "greater")


def record(serial: int, **metrics: float) -> Record:
    return Record(f"step-{serial:08d}", Progress(serial), "full", 1, (), "", "", 1, serial, 0, 0, "", metrics)


def judge(*metrics: Metric, keep: int = 1, records: Any = ()) -> Judge:
    return Judge(BestBy(metrics, keep), ranks=Solo(), records=lambda: list(records))


def verdict(judge: Judge, **reported: object) -> Verdict:
    return judge.judge(judge.numbers(reported))


def test_the_first_report_is_the_best():
    assert verdict(judge(LOSS), loss=3.0) == Verdict({"loss": 3.0}, is_best=True)


@pytest.mark.parametrize(("value", "is_best"), [(1.0, True), (1.5, True), (2.0, False), (3.0, False)])
def test_a_report_is_best_if_it_beats_all_records(value, is_best):
    records = [record(1, loss=5.0), record(2, loss=2.0), record(3, acc=0.1), record(4, loss=7.0)]
    assert verdict(judge(LOSS, records=records), loss=value).is_best is is_best


@pytest.mark.parametrize(("value", "is_best"), [(2.0, True), (4.9, True), (5.0, False), (6.0, False)])
def test_it_is_best_if_it_would_be_among_those_that_are_kept(value, is_best):
    records = [record(1, loss=5.0), record(2, loss=2.0), record(3, loss=9.0)]
    assert verdict(judge(LOSS, keep=2, records=records), loss=value).is_best is is_best


def test_it_is_best_if_it_is_by_any_metric():
    records = [record(1, loss=1.0, acc=0.5)]
    assert verdict(judge(LOSS, ACC, records=records), loss=2.0, acc=0.6).is_best
    assert not verdict(judge(LOSS, ACC, records=records), loss=2.0, acc=0.5).is_best


def test_records_are_read_again_for_each_report():
    records: list[Record] = []
    one = judge(LOSS, records=records)
    assert verdict(one, loss=2.0).is_best
    records.append(record(1, loss=1.0))
    assert not verdict(one, loss=2.0).is_best


def test_without_metrics_nothing_is_best_but_numbers_are_kept():
    assert verdict(judge(), loss=2, note="text", acc=torch.tensor(0.5), flag=True) == Verdict(
        {"loss": 2.0, "acc": 0.5}, is_best=False
    )


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor(0.5), np.array([0.5]), torch.tensor([[0.5]])])
def test_a_number_of_another_library_is_one(value):
    assert verdict(judge(LOSS), loss=value).metrics == {"loss": 0.5}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None, torch.tensor(torch.nan)])
def test_what_is_not_finite_is_never_best_and_warned_of_once(caplog, value):
    with caplog.at_level(logging.WARNING, "distckpt"):
        assert verdict(judge(LOSS), loss=value, acc=1.0) == Verdict({"acc": 1.0}, is_best=False)
    (warning,) = caplog.records
    assert "metric loss is" in warning.getMessage() and "never the best" in warning.getMessage()


def test_a_metric_that_is_missing_is_named_with_the_nearest():
    with pytest.raises(
        KeyError, match=r"metric loss was not reported, but val/loss, acc were; did you mean val/loss\?"
    ):
        judge(LOSS).numbers({"val/loss": 1.0, "acc": 2.0})


@pytest.mark.parametrize("value", ["0.5", True, torch.ones(2), [0.5], 1j])
def test_a_metric_that_is_no_number_is_refused_by_its_name(value):
    with pytest.raises(TypeError, match="metric loss should be one number"):
        judge(LOSS).numbers({"loss": value})


def test_auto_takes_the_first_metric_that_is_reported_and_stays_with_it():
    best_by = BestBy(AutoMetric(), 1)
    one = Judge(best_by, ranks=Solo(), records=list)
    assert best_by.metrics == ()
    assert verdict(one, acc=0.5, loss=1.0).is_best
    assert best_by.metrics == (ACC,)
    with pytest.raises(KeyError, match="metric acc was not reported"):
        one.numbers({"loss": 1.0})


@pytest.mark.parametrize("reported", [{}, {"speed": 3.0}])
def test_auto_that_cannot_be_settled_is_an_error(reported):
    one = Judge(BestBy(AutoMetric(), 1), ranks=Solo(), records=list)
    with pytest.raises(RankFailure, match="choice of a metric failed: rank 0: ValueError"):
        verdict(one, **reported)


@pytest.mark.parametrize("asked", [(LOSS,), AutoMetric()])
def test_rank_0_decides_and_all_ranks_learn_it(asked):
    reported = [{"loss": 1.0}, {"loss": 9.0}, {"loss": float("nan")}]
    records = [record(1, loss=2.0)]

    def work(ranks: Any) -> Any:
        best_by = BestBy(asked, 1)
        one = Judge(best_by, ranks=ranks, records=lambda: records if ranks.rank == 0 else [])
        return verdict(one, **reported[ranks.rank]), best_by.metrics

    told = on_threads(thread_ranks(3), work)
    assert told == [(Verdict({"loss": 1.0}, is_best=True), (LOSS,))] * 3


def test_records_that_cannot_be_read_are_an_error_on_all_ranks():
    def gone() -> Any:
        raise OSError(5, "Input/output error", "/run")

    def work(ranks: Any) -> Any:
        return verdict(Judge(BestBy((LOSS,), 1), ranks=ranks, records=gone), loss=1.0)

    told = on_threads(thread_ranks(2), work)
    assert all(isinstance(one, RankFailure) and "Input/output error: '/run'" in str(one) for one in told)

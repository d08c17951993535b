"""Buffers are equal on all ranks after a save: means of what is continuous, rank 0's of what counts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distckpt.buffers import parse_mode, sync_buffers
from distckpt.errors import RankFailure
from distckpt.ranks import Ranks, Solo
from distckpt.ranks.process_group import detect

SOON = timedelta(seconds=10)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


class Holder(nn.Module):
    """A module with these buffers."""

    def __init__(self, persistent: bool = True, **buffers: Tensor) -> None:
        super().__init__()
        for name, buffer in buffers.items():
            self.register_buffer(f"its_{name}", buffer, persistent=persistent)


def synced(ranks: Ranks, mode: Any = "mean", **buffers: Tensor) -> dict[str, Any]:
    holder = Holder(**buffers)
    sync_buffers([holder], mode, ranks=ranks, timeout=SOON)
    assert all(getattr(holder, f"its_{name}") is buffer for name, buffer in buffers.items())
    return {name: buffer.tolist() for name, buffer in buffers.items()}


def floats(ranks: Ranks) -> dict[str, Any]:
    return synced(ranks, **{str(one)[6:]: torch.full((2,), ranks.rank + 1, dtype=one) for one in FLOATS})


def parts_of_complex_numbers(ranks: Ranks) -> dict[str, Any]:
    return synced(ranks, both=torch.tensor([1 + 1j, 4j]) * (ranks.rank + 1))


def integers(ranks: Ranks) -> dict[str, Any]:
    return synced(ranks, **{str(one)[6:]: torch.full((3,), ranks.rank + 7, dtype=one) for one in INTEGERS})


def truths(ranks: Ranks) -> dict[str, Any]:
    return synced(ranks, one=torch.tensor(ranks.rank == 0), many=torch.tensor([False, True, ranks.rank == 0]))


def shapes(ranks: Ranks) -> dict[str, Any]:
    grid = torch.arange(4.0).view(2, 2) + ranks.rank
    counts = torch.arange(6).view(2, 3) * (ranks.rank + 1)
    return synced(ranks, turned=grid.T, scalar=torch.tensor(float(ranks.rank)), empty=torch.empty(0), counts=counts.T)


def equal_values(ranks: Ranks) -> dict[str, Any]:
    torch.manual_seed(0)
    special = torch.tensor([0.1, -0.0, 5e-324, 1.7e308, torch.inf, -torch.inf], dtype=torch.float64)
    before = {str(one)[6:]: torch.randn(1000, dtype=one) for one in FLOATS} | {"special": special}
    after = {name: one.clone() for name, one in before.items()}
    synced(ranks, **after)
    return {name: torch.equal(before[name].view(torch.uint8), one.view(torch.uint8)) for name, one in after.items()}


def what_is_not_saved(ranks: Ranks) -> dict[str, Any]:
    holder = Holder(persistent=False, mine=torch.tensor(float(ranks.rank)))
    holder.register_buffer("none", None)
    holder.weight = nn.Parameter(torch.tensor(float(ranks.rank)))
    sync_buffers([holder], "mean", ranks=ranks, timeout=SOON)
    return {"buffer": holder.its_mine.item(), "parameter": holder.weight.item()}


def broadcast(ranks: Ranks) -> dict[str, Any]:
    rank = float(ranks.rank)
    return synced(
        ranks, "broadcast", float=torch.tensor([rank + 0.1]), half=torch.tensor(rank).half(), int=torch.tensor(rank)
    )


def switched_off(ranks: Ranks) -> dict[str, Any]:
    return synced(ranks, False, float=torch.tensor(float(ranks.rank)), int=torch.tensor(ranks.rank))


def not_a_number(ranks: Ranks) -> dict[str, Any]:
    words: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: words.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distckpt").addHandler(handler)
    value = torch.nan if ranks.rank == 1 else 1.0
    outer = nn.ModuleDict({"inner": Holder(bad=torch.tensor([1.0, value]), good=torch.tensor(1.0))})
    sync_buffers([outer], "mean", ranks=ranks, timeout=SOON)
    logging.getLogger("distckpt").removeHandler(handler)
    return {"words": words, "bad": str(outer["inner"].its_bad.tolist())}


def calls(ranks: Ranks) -> dict[str, Any]:
    """How many numbers a shared buffer costs, and how many calls a model without buffers."""
    counted: list[int] = []
    real = dist.all_reduce, dist.broadcast

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda tensor, *args, **words: (counted.append(tensor.numel()), call(tensor, *args, **words))[1]

    dist.all_reduce, dist.broadcast = map(counting, real)
    try:
        shared = Holder(one=torch.ones(5), count=torch.ones(3, dtype=torch.int16))
        twice = nn.ModuleList([shared, Holder(again=shared.its_one)])
        sync_buffers([twice, shared], "mean", ranks=ranks, timeout=SOON)
        of_shared = counted.copy()
        counted.clear()
        sync_buffers([nn.Linear(2, 2)], "mean", ranks=ranks, timeout=SOON)
        return {"shared": of_shared, "none": counted}
    finally:
        dist.all_reduce, dist.broadcast = real


CASES = [floats, parts_of_complex_numbers, integers, truths, shapes, equal_values, what_is_not_saved, broadcast]
CASES += [switched_off, not_a_number, calls]


def on_each_rank(rank: int) -> dict[str, Any]:
    ranks = detect(SOON)
    return {case.__name__: case(ranks) for case in CASES}


_told: dict[int, list[dict[str, Any]]] = {}


@pytest.fixture(params=[2, 3, 4])
def told(request: pytest.FixtureRequest, run_ranks: Any) -> list[dict[str, Any]]:
    """What each rank found: one run for all tests."""
    if request.param not in _told:
        _told[request.param] = run_ranks(request.param, on_each_rank)
    return _told[request.param]


def case(told: list[dict[str, Any]], which: Any) -> list[dict[str, Any]]:
    return [one[which.__name__] for one in told]


def test_floating_point_and_complex_buffers_hold_the_mean(told):
    mean = (len(told) + 1) / 2
    assert all(one == {str(dtype)[6:]: [mean, mean] for dtype in FLOATS} for one in case(told, floats))
    assert all(one["both"] == [mean * (1 + 1j), mean * 4j] for one in case(told, parts_of_complex_numbers))


def test_integers_and_truths_are_those_of_rank_0(told):
    assert all(one == {str(dtype)[6:]: [7, 7, 7] for dtype in INTEGERS} for one in case(told, integers))
    assert all(one == {"one": True, "many": [False, True, True]} for one in case(told, truths))


def test_buffers_of_every_shape_and_stride_are_made_equal_in_place(told):
    mean = (len(told) - 1) / 2
    for one in case(told, shapes):
        assert one["turned"] == [[mean, mean + 2], [mean + 1, mean + 3]]
        assert one["scalar"] == mean and one["empty"] == []
        assert one["counts"] == [[0, 3], [1, 4], [2, 5]]


def test_values_that_are_equal_on_all_ranks_keep_every_bit(told):
    assert all(set(one.values()) == {True} for one in case(told, equal_values)), case(told, equal_values)


def test_what_no_checkpoint_holds_is_left_alone(told):
    assert case(told, what_is_not_saved) == [{"buffer": rank, "parameter": rank} for rank in range(len(told))]


def test_broadcast_gives_all_ranks_what_rank_0_has(told):
    assert all(one == {"float": [pytest.approx(0.1)], "half": 0.0, "int": 0.0} for one in case(told, broadcast))


def test_switched_off_nothing_is_changed(told):
    assert case(told, switched_off) == [{"float": rank, "int": rank} for rank in range(len(told))]


def test_a_buffer_that_is_not_finite_afterwards_is_named(told):
    for one in case(told, not_a_number):
        assert one["bad"] == "[1.0, nan]"
        (words,) = one["words"]
        assert words.endswith("not finite: inner.its_bad")


def test_a_shared_buffer_travels_once_and_a_model_without_buffers_costs_nothing(told):
    assert all(one == {"shared": [5, 6], "none": []} for one in case(told, calls))


def leave_one_out(rank: int) -> str:
    ranks = detect(timedelta(seconds=1))
    if rank == 1:
        return "was elsewhere"
    try:
        sync_buffers([Holder(one=torch.ones(1))], "mean", ranks=ranks, timeout=timedelta(seconds=1))
    except RankFailure as failure:
        return str(failure)
    return "nothing was raised"


def test_a_rank_that_does_not_come_is_named(run_ranks):
    first, _, third = run_ranks(3, leave_one_out, seconds=20)
    assert "rank 1: did not come within" in first and "rank 1" in third


def test_one_process_changes_nothing():
    assert synced(Solo(), float=torch.tensor(0.1)) == {"float": torch.tensor(0.1).item()}


@pytest.mark.parametrize("word", ["mean", "broadcast", False])
def test_the_words_there_are_pass(word):
    assert parse_mode(word) is word


@pytest.mark.parametrize("word", [True, None, 0, "", "Mean", "average", 1.0, [], ["mean"], torch.ones(2)])
def test_every_other_word_is_refused(word):
    with pytest.raises(ValueError, match='sync_buffers should be "mean", "broadcast" or False, is'):
        parse_mode(word)

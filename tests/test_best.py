from __future__ import annotations

import logging
import math
import subprocess
import sys
from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt.best import (
    DEFAULT_GREATER_KEYS,
    DEFAULT_LESS_KEYS,
    AutoMetric,
    Metric,
    as_number,
    improves,
    infer_rule,
    parse_keys,
    parse_metrics,
    ranking,
)
from distckpt.manifest import Record
from distckpt.progress import Progress

ACC = Metric("acc", "greater")
LOSS = Metric("loss", "less")


def record(serial: int, *, attempt: int = 1, **metrics: float) -> Record:
    return Record(
        name=f"step-{serial:08d}",
        progress=Progress(serial),
        format="full",
        world_size=1,
        reasons=("interval",),
        created="2026-01-01T00:00:00+00:00",
        run="run",
        attempt=attempt,
        serial=serial,
        total_bytes=1,
        content_bytes=1,
        content_xxh3_128="0" * 32,
        metrics=metrics,
    )


# What the words mean


@pytest.mark.parametrize(
    ("metric", "rule"),
    [
        ("acc", "greater"),
        ("ACC", "greater"),
        ("loss", "less"),
        ("AR@100", "greater"),
        ("coco/bbox_mAP", "greater"),
        ("map_50", "greater"),
        ("val/loss", "less"),
        ("TRAIN_LOSS", "less"),
        ("loss_accuracy", "greater"),
        ("stop_loss", "greater"),
    ],
)
def test_a_rule_is_inferred_from_the_documented_keys_whatever_the_case(metric, rule):
    assert infer_rule(metric, DEFAULT_GREATER_KEYS, DEFAULT_LESS_KEYS) == rule


def test_an_exact_less_key_wins_over_a_greater_key_inside_it():
    assert infer_rule("acc_gap", ["acc"], ["acc_gap"]) == "less"
    assert infer_rule("acc_gap2", ["acc"], ["acc_gap"]) == "greater"


def test_an_exact_greater_key_wins_over_the_same_less_key():
    assert infer_rule("x", ["X"], ["x"]) == "greater"


@pytest.mark.parametrize("metric", ["FID", "", "psnr"])
def test_a_rule_that_cannot_be_inferred_is_an_error_that_says_what_to_do(metric):
    with pytest.raises(ValueError, match=f"Cannot infer the rule for key {metric}.*rule="):
        parse_metrics(metric)


@pytest.mark.parametrize(
    ("save_best", "rule", "metrics"),
    [
        (None, None, ()),
        (None, "nonsense", ()),
        ([], None, ()),
        ([], ["greater"], ()),
        ("acc", None, (ACC,)),
        (["acc"], None, (ACC,)),
        ("acc", "less", (Metric("acc", "less"),)),
        (["acc", "loss"], None, (ACC, LOSS)),
        (["acc", "mIoU"], "greater", (ACC, Metric("mIoU", "greater"))),
        (["acc", "mIoU"], ["less"], (Metric("acc", "less"), Metric("mIoU", "less"))),
        (["FID", "IS"], ["less", "greater"], (Metric("FID", "less"), Metric("IS", "greater"))),
    ],
)
def test_save_best_and_rule_mean_what_the_specification_says(save_best, rule, metrics):
    assert parse_metrics(save_best, rule) == metrics


@pytest.mark.parametrize("save_best", [3, ("acc",), {"acc": 1}, ["acc", 1], [None]])
def test_a_save_best_of_a_wrong_type_is_an_assertion_error(save_best):
    with pytest.raises(AssertionError, match='"save_best" should be a str or list of str or None'):
        parse_metrics(save_best)


def test_auto_stands_alone():
    with pytest.raises(AssertionError, match='Only support one "auto" in "save_best" list'):
        parse_metrics(["auto", "acc"])


def test_a_metric_given_twice_is_an_assertion_error():
    with pytest.raises(AssertionError, match='Find duplicate element in "save_best"'):
        parse_metrics(["acc", "loss", "acc"])


@pytest.mark.parametrize("rule", [1, ("less",), [None], [None, None], ["less", 1]])
def test_a_rule_of_a_wrong_type_is_an_assertion_error(rule):
    with pytest.raises(AssertionError, match='"rule" should be a str or list of str or None'):
        parse_metrics(["acc", "loss"], rule)


@pytest.mark.parametrize(("save_best", "rule"), [(["acc"], ["less"] * 2), (["a", "b"], ["less"] * 3), ("auto", [])])
def test_as_many_rules_as_metrics_or_one_are_asked_for(save_best, rule):
    with pytest.raises(AssertionError, match='Number of "rule" must be 1 or the same'):
        parse_metrics(save_best, rule)


def test_a_list_of_rules_without_metrics_is_a_type_error():
    with pytest.raises(TypeError, match='"rule" is a list.*"save_best" names none'):
        parse_metrics(None, ["greater"])


@pytest.mark.parametrize(("save_best", "rule"), [("acc", "bad"), ("auto", ""), (["acc", "loss"], ["greater", "Less"])])
def test_an_unknown_rule_is_a_key_error_that_names_it(save_best, rule):
    with pytest.raises(KeyError, match="rule must be greater, less or None, but got (bad|Less|)"):
        parse_metrics(save_best, rule)


@pytest.mark.parametrize("save_best", [["a/mAP", "a_mAP"], ["acc", "top 1", "top_1"]])
def test_two_metrics_that_would_share_a_label_are_refused_by_name(save_best):
    with pytest.raises(ValueError, match=r"would both be labelled best-") as caught:
        parse_metrics(save_best)
    assert all(repr(name) in str(caught.value) for name in save_best[-2:])


def test_given_keys_replace_the_defaults():
    assert parse_metrics("FID", greater_keys="fid") == (Metric("FID", "greater"),)
    with pytest.raises(ValueError, match="Cannot infer the rule for key acc"):
        parse_metrics("acc", greater_keys=["mIoU"])


@pytest.mark.parametrize("keys", [["acc"], ("acc",)])
def test_keys_keep_the_type_they_were_given_in(keys):
    assert parse_keys(keys, DEFAULT_GREATER_KEYS, "greater_keys") is keys


def test_a_single_key_becomes_a_tuple_and_none_the_defaults():
    assert parse_keys("acc", DEFAULT_GREATER_KEYS, "greater_keys") == ("acc",)
    assert parse_keys(None, DEFAULT_LESS_KEYS, "less_keys") is DEFAULT_LESS_KEYS


@pytest.mark.parametrize("word", ["greater_keys", "less_keys"])
@pytest.mark.parametrize("keys", [[1], ("acc", None), 5])
def test_keys_that_are_no_str_are_an_assertion_error_even_without_a_metric(word, keys):
    with pytest.raises(AssertionError, match=f'"{word}" should be'):
        parse_metrics(None, **{word: keys})


@pytest.mark.parametrize("words", ["3", "['auto', 'acc']", "['acc', 'acc']", "'acc', 1", "'acc', ['less', 'less']"])
def test_python_without_assertions_refuses_the_same_words(words):
    code = f"from distckpt.best import parse_metrics; parse_metrics({words})"
    run = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "AssertionError: " in run.stderr


def test_deciding_needs_neither_torch_nor_numpy():
    code = "import sys, distckpt.best, distckpt.retention; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# Auto


@pytest.mark.parametrize("save_best", ["auto", ["auto"]])
def test_auto_is_the_first_metric_reported_with_its_inferred_rule(save_best):
    auto = parse_metrics(save_best)
    assert isinstance(auto, AutoMetric)
    assert auto.settle({"val/loss": 0.5, "acc": 0.1}) == Metric("val/loss", "less")


def test_auto_with_a_rule_takes_any_metric():
    auto = parse_metrics("auto", ["greater"])
    assert auto.settle({"FID": 1.0}) == Metric("FID", "greater")


def test_auto_infers_with_the_keys_that_were_given():
    auto = parse_metrics("auto", less_keys=["Fid"])
    assert auto.settle({"FID": 1.0}) == Metric("FID", "less")


@pytest.mark.parametrize(("metrics", "message"), [({"FID": 1.0}, "for key FID"), ({}, "none was")])
def test_auto_that_cannot_settle_is_a_value_error(metrics, message):
    with pytest.raises(ValueError, match=message):
        parse_metrics("auto").settle(metrics)


# What was reported


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        Fraction(1, 2),
        numpy.float32(0.5),
        numpy.float64(0.5),
        numpy.array(0.5),
        numpy.array([[0.5]]),
        torch.tensor(0.5),
        torch.tensor([0.5], requires_grad=True),
        torch.tensor(0.5, dtype=torch.bfloat16),
    ],
)
def test_every_single_number_is_a_float(value):
    number = as_number(value, "acc")
    assert type(number) is float
    assert number == 0.5


@pytest.mark.parametrize("value", [3, numpy.int64(3), torch.tensor(3), numpy.uint8(3)])
def test_every_single_integer_is_a_float(value):
    number = as_number(value, "acc")
    assert type(number) is float
    assert number == 3


@pytest.mark.parametrize(
    "value",
    [
        True,
        numpy.bool_(True),
        torch.tensor(True),
        "0.5",
        numpy.array("0.5"),
        1j,
        torch.tensor(1j),
        [0.5],
        {"acc": 0.5},
        numpy.array([1.0, 2.0]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([]),
        torch.empty((), device="meta"),
        torch.Tensor,
    ],
)
def test_what_is_not_one_number_is_a_type_error_that_names_the_metric(value):
    with pytest.raises(TypeError, match="metric val/acc should be one number, is "):
        as_number(value, "val/acc")


@pytest.mark.parametrize(
    "value",
    [None, math.nan, math.inf, -math.inf, numpy.float32("nan"), torch.tensor(math.inf), 10**400, numpy.array([None])],
)
def test_what_can_never_be_best_is_none_with_a_warning_that_names_the_metric(value, caplog):
    with caplog.at_level(logging.WARNING, logger="distckpt"):
        assert as_number(value, "val/acc") is None
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]
    assert "val/acc" in caplog.text


def test_a_number_gives_no_warning(caplog):
    assert as_number(0.5, "acc") == 0.5
    assert not caplog.records


def test_a_metrics_value_is_taken_from_the_report_as_a_number():
    assert ACC.value_in({"loss": 2, "acc": torch.tensor(1)}) == 1.0
    assert ACC.value_in({"acc": None}) is None


@pytest.mark.parametrize(
    ("name", "reported", "nearest"),
    [
        ("mAP", ["loss", "coco/bbox_mAP"], "coco/bbox_mAP"),
        ("acurracy", ["loss", "accuracy"], "accuracy"),
        ("Acc", ["loss", "acc"], "acc"),
        ("val/cityscapes/mIoU", ["mIoU", "mAcc"], "mIoU"),
    ],
)
def test_a_missing_metric_is_a_key_error_with_what_was_reported_and_the_nearest(name, reported, nearest):
    with pytest.raises(KeyError) as caught:
        Metric(name, "greater").value_in(dict.fromkeys(reported, 1.0))
    text = str(caught.value)
    assert f"metric {name} was not reported, but {', '.join(reported)} were" in text
    assert f"did you mean {nearest}?" in text


def test_a_missing_metric_that_is_near_nothing_has_no_nearest():
    with pytest.raises(KeyError) as caught:
        ACC.value_in({"loss": 1.0})
    assert "loss" in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_a_metric_missing_among_none_is_a_key_error_too():
    with pytest.raises(KeyError, match="metric acc was not reported: no metric was"):
        ACC.value_in({})


# Which is best


def test_better_is_strict_so_ties_keep_the_first():
    assert ACC.is_better(0.6, 0.5)
    assert LOSS.is_better(0.4, 0.5)
    assert not any(metric.is_better(0.5, 0.5) for metric in (ACC, LOSS))


def test_the_ranking_is_best_first_then_older_first_and_leaves_out_who_does_not_carry_the_metric():
    records = [record(1, acc=0.5), record(2), record(3, acc=0.9), record(4, acc=0.5), record(5, acc=math.nan)]
    assert [one.serial for one in ranking(ACC, reversed(records))] == [3, 1, 4]
    assert [one.serial for one in ranking(Metric("acc", "less"), records)] == [1, 4, 3]


def test_of_equals_the_older_is_told_by_attempt_before_serial():
    older, newer = record(9, attempt=1, acc=0.5), record(1, attempt=2, acc=0.5)
    assert ranking(ACC, [newer, older]) == [older, newer]


@pytest.mark.parametrize(
    ("value", "keep", "expected"),
    [
        (0.8, 1, False),
        (0.9, 1, False),
        (0.95, 1, True),
        (0.7, 2, False),
        (0.75, 2, True),
        (0.1, 3, False),
        (0.2, 3, True),
        (0.0, 4, True),
        (None, 4, False),
        (math.nan, 4, False),
        (math.inf, 4, False),
    ],
)
def test_a_value_improves_where_it_would_be_among_the_best_few(value, keep, expected):
    records = [record(1, acc=0.1), record(2, acc=0.9), record(3), record(4, acc=0.7)]
    assert improves(ACC, value, records, keep) is expected


def test_the_first_value_is_the_best_whatever_it_is():
    assert improves(ACC, -1e300, [record(1, loss=0.1)])


VALUES = st.floats(-2, 2) | st.sampled_from([0.0, -0.0, 1.0])


@given(values=st.lists(VALUES, max_size=8), value=VALUES, keep=st.integers(1, 4), metric=st.sampled_from([ACC, LOSS]))
def test_a_value_improves_exactly_if_its_record_is_then_ranked_among_the_best(values, value, keep, metric):
    records = [record(serial, **{metric.name: one}) for serial, one in enumerate(values)]
    new = record(len(values), **{metric.name: value})
    assert improves(metric, value, records, keep) == (new in ranking(metric, [*records, new])[:keep])


@given(values=st.lists(VALUES, min_size=1, max_size=12), metric=st.sampled_from([ACC, LOSS]))
def test_the_first_of_the_ranking_is_the_one_that_a_running_best_ends_with(values, metric):
    running = 0
    for index, value in enumerate(values):
        if metric.is_better(value, values[running]):
            running = index
    records = [record(serial, **{metric.name: one}) for serial, one in enumerate(values)]
    assert ranking(metric, records)[0].serial == running

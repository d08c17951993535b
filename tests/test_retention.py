from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.best import AutoMetric, Metric, ranking
from distckpt.manifest import Record
from distckpt.progress import Progress
from distckpt.retention import (
    KeepBest,
    KeepEvery,
    KeepFor,
    KeepLast,
    KeepNewest,
    KeepOnceBest,
    Retention,
    parse_bytes,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
ACC = Metric("acc", "greater")
LOSS = Metric("val/loss", "less")


def record(step, *, reasons=("interval",), metrics=None, size=1, created=NOW, attempt=1, serial=None) -> Record:
    return Record(
        name=f"step-{step:08d}",
        progress=Progress(step),
        format="full",
        world_size=1,
        reasons=reasons,
        created=created if isinstance(created, str) else created.isoformat(timespec="milliseconds"),
        run="run",
        attempt=attempt,
        serial=step if serial is None else serial,
        total_bytes=size,
        content_bytes=1,
        content_xxh3_128="0" * 32,
        metrics=metrics or {},
    )


def steps(records) -> list[int]:
    return [one.progress.step for one in records]


def kept_steps(retention: Retention, records) -> list[int]:
    return [int(name.removeprefix("step-")) for name in retention.kept(records, NOW)]


# Each rule alone


def test_the_last_few_are_kept():
    records = [record(step) for step in (1, 2, 3, 4)]
    assert KeepLast(2).kept(records) == {"step-00000003": "last 2", "step-00000004": "last 2"}


def test_the_last_few_do_not_count_what_was_saved_for_being_best_alone():
    why = {1: ("interval",), 2: ("best",), 3: ("interval", "best"), 4: ("best",), 5: ("asked",), 6: ("last",)}
    records = [record(step, reasons=reasons) for step, reasons in why.items()]
    assert [int(name[-1]) for name in KeepLast(3).kept(records)] == [3, 5, 6]
    assert [int(name[-1]) for name in KeepLast().kept(records)] == [1, 3, 5, 6]


def test_the_best_few_are_kept_with_their_place_and_metric():
    records = [record(step, metrics={"val/loss": loss}) for step, loss in ((1, 0.5), (2, 0.3), (3, 0.5), (4, 0.9))]
    assert KeepBest(LOSS, 2).kept(records) == {
        "step-00000002": "best #1 val/loss",
        "step-00000001": "best #2 val/loss",
    }


def test_what_was_ever_best_is_kept_where_the_metric_is_not_known_yet():
    records = [record(1, reasons=("interval", "best")), record(2), record(3, reasons=("best",))]
    assert KeepOnceBest().kept(records) == {"step-00000001": "was best", "step-00000003": "was best"}


def test_every_nth_step_is_kept():
    records = [record(step) for step in (5, 10, 15, 20)]
    assert KeepEvery(10).kept(records) == {"step-00000010": "every 10", "step-00000020": "every 10"}


@pytest.mark.parametrize(
    ("created", "why"),
    [
        (NOW - timedelta(days=7), "newer than 7d"),
        (NOW - timedelta(days=7, milliseconds=1), None),
        ("2026-02-28T12:00:00Z", "newer than 7d"),
        ("2026-02-28T12:00:00", "newer than 7d"),
        ("2026-02-01T12:00:00", None),
        ("2026-02-22T13:30:00+02:00", None),
        ("2026-02-22T10:30:00-02:00", "newer than 7d"),
        (NOW + timedelta(milliseconds=1), "of unknown age"),
        ("", "of unknown age"),
        ("yesterday", "of unknown age"),
        ("0001-01-01T00:00:00+23:59", None),
        ("9999-12-31T23:59:59-23:59", "of unknown age"),
    ],
)
def test_the_young_are_kept_and_those_of_unknown_age(created, why):
    kept = KeepFor(timedelta(days=7), NOW).kept([record(1, created=created)])
    assert kept == ({} if why is None else {"step-00000001": why})


def test_a_now_without_a_time_zone_is_refused():
    with pytest.raises(ValueError, match="now should have a time zone"):
        KeepFor(timedelta(days=7), datetime(2026, 3, 1))


@pytest.mark.parametrize("rule", [lambda: KeepLast(0), lambda: KeepBest(ACC, 0), lambda: KeepEvery(0)])
def test_a_rule_that_would_keep_nothing_is_refused(rule):
    with pytest.raises(ValueError, match=r"Keep\w+\(0\) keeps nothing"):
        rule()


def test_no_rule_finds_anything_to_keep_among_none():
    rules = [KeepNewest(), KeepLast(2), KeepBest(ACC), KeepOnceBest(), KeepEvery(2), KeepFor(timedelta(1), NOW)]
    assert [rule.kept([]) for rule in rules] == [{}] * 6
    assert Retention.parse(max_keep_ckpts=1).kept([], NOW) == {}


# All rules together


def test_what_is_kept_is_told_oldest_first_with_every_reason_why():
    old = NOW - timedelta(days=30)
    records = [
        record(5000, created=old),
        record(6000, created=old),
        record(7000, created=old, reasons=("best",), metrics={"val/loss": 0.1}),
        record(8000, metrics={"val/loss": 0.2}),
        record(9000),
    ]
    retention = Retention.parse(max_keep_ckpts=1, metrics=(LOSS,), keep_every=5000, keep_for="7d")
    assert list(retention.kept(records, NOW).items()) == [
        ("step-00005000", "every 5000"),
        ("step-00007000", "best #1 val/loss"),
        ("step-00008000", "newer than 7d"),
        ("step-00009000", "last 1, newer than 7d, newest"),
    ]
    assert steps(retention.to_delete(records, NOW)) == [6000]


def test_the_bests_of_several_metrics_are_all_kept():
    records = [record(step, reasons=("best",), metrics=metrics) for step, metrics in BEST_OF_TWO.items()]
    retention = Retention.parse(max_keep_ckpts=1, metrics=(ACC, LOSS))
    assert retention.kept(records, NOW) == {
        "step-00000001": "best #1 acc",
        "step-00000003": "best #1 val/loss",
        "step-00000004": "newest",
    }


BEST_OF_TWO = {
    1: {"acc": 0.9, "val/loss": 0.9},
    2: {"acc": 0.8, "val/loss": 0.8},
    3: {"acc": 0.1, "val/loss": 0.1},
    4: {"acc": 0.2, "val/loss": 0.2},
}


def test_a_former_best_goes_where_it_was_nothing_else_even_without_a_limit():
    records = [record(1, reasons=("best",), metrics={"acc": 0.1}), record(2, metrics={"acc": 0.2}), record(3)]
    assert steps(Retention.parse(metrics=(ACC,)).to_delete(records, NOW)) == [1]


def test_until_auto_is_settled_no_former_best_goes():
    records = [record(1, reasons=("interval", "best"), metrics={"acc": 0.1}), record(2), record(3)]
    assert steps(Retention.parse(max_keep_ckpts=1, metrics=AutoMetric()).to_delete(records, NOW)) == [2]


def test_the_newest_is_told_by_attempt_and_serial_not_by_step_or_clock():
    taken_back = record(2, attempt=2, serial=1, created=NOW - timedelta(days=9))
    records = [taken_back, record(5), record(9)]
    assert kept_steps(Retention.parse(max_keep_ckpts=1), records) == [2]


def test_a_budget_takes_the_oldest_first_until_the_rest_fits():
    records = [record(step, size=100) for step in (1, 2, 3, 4)]
    assert kept_steps(Retention.parse(keep_bytes=200), records) == [3, 4]
    assert kept_steps(Retention.parse(keep_bytes=399), records) == [2, 3, 4]
    assert kept_steps(Retention.parse(keep_bytes=400), records) == [1, 2, 3, 4]


def test_a_budget_counts_only_what_is_kept():
    records = [record(step, size=100) for step in (1, 2, 3, 4)]
    assert kept_steps(Retention.parse(max_keep_ckpts=2, keep_bytes=200), records) == [3, 4]


def test_a_budget_never_takes_the_newest_or_the_best_and_says_by_how_much_they_are_over():
    records = [record(1, size=70, metrics={"acc": 0.9}), record(2, size=80), record(3, size=90)]
    retention = Retention.parse(metrics=(ACC,), keep_bytes=100)
    assert kept_steps(retention, records) == [1, 3]
    assert retention.over_bytes(records, NOW) == 60


def test_what_fits_is_not_over():
    records = [record(step, size=100) for step in (1, 2, 3)]
    assert Retention.parse(keep_bytes=100).over_bytes(records, NOW) == 0
    assert Retention.parse().over_bytes(records, NOW) == 0


# The words


@pytest.mark.parametrize("unlimited", [-1, 0, -5])
def test_a_limit_that_is_not_positive_is_none(unlimited):
    assert Retention.parse(max_keep_ckpts=unlimited) == Retention.parse()
    assert kept_steps(Retention.parse(max_keep_ckpts=unlimited), [record(1), record(2)]) == [1, 2]


def test_each_word_reaches_its_rule():
    retention = Retention.parse(
        max_keep_ckpts=3, metrics=[ACC, LOSS], max_keep_best=2, keep_every=10, keep_for="1h30min", keep_bytes="2TB"
    )
    assert retention == Retention(
        rules=(KeepLast(3), KeepEvery(10)),
        bests=(KeepBest(ACC, 2), KeepBest(LOSS, 2)),
        keep_for=timedelta(minutes=90),
        keep_bytes=2 * 10**12,
    )


@pytest.mark.parametrize(
    ("word", "value"),
    [(word, value) for word in ("max_keep_ckpts", "max_keep_best") for value in (None, True, 1.0, "3", [3])]
    + [("keep_every", value) for value in (False, 1e3, "1000", (5,))]
    + [("keep_for", value) for value in (7, 1.5, True, ["7d"])]
    + [("keep_bytes", value) for value in (True, 1e12, ["2TB"], b"2TB")],
)
def test_a_word_of_a_wrong_type_is_a_type_error_that_names_it_and_its_value(word, value):
    with pytest.raises(TypeError, match=f"^{word}: ") as caught:
        Retention.parse(**{word: value})
    assert ascii(value) in str(caught.value)


@pytest.mark.parametrize(
    ("word", "value"),
    [(word, value) for word in ("max_keep_best", "keep_every", "keep_bytes") for value in (0, -1)]
    + [("keep_for", value) for value in ("", "7", "a week", "0s", timedelta(0), timedelta(-1))]
    + [("keep_bytes", value) for value in ("", "2", "TB", "-2TB", "2T", "2 T B", "0GB", "0.1B", "2iB", "1e3GB")],
)
def test_a_word_of_a_wrong_value_is_a_value_error_that_names_it_and_its_value(word, value):
    with pytest.raises(ValueError, match=f"^{word}: ") as caught:
        Retention.parse(**{word: value})
    assert ascii(value) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        ("1B", 1),
        ("10kB", 10_000),
        ("10 KiB", 10_240),
        ("500GB", 500 * 10**9),
        ("2TB", 2 * 10**12),
        ("1.5TiB", 3 * 2**39),
        ("2tb", 2 * 10**12),
        (" 0.1PB ", 10**14),
        ("3MiB", 3 * 2**20),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes(text, "keep_bytes") == size


# What holds for every run and every policy

REASONS = st.sampled_from(
    [("interval",), ("best",), ("interval", "best"), ("asked",), ("epoch",), ("last", "interval")]
)
VALUES = st.sampled_from([None, 0.0, 0.25, 0.5, 1.0])
CREATED = st.sampled_from([(NOW - timedelta(hours=age)).isoformat() for age in (-9, 0, 1, 2, 40, 60, 160, 200)] + ["?"])
SAVE = st.tuples(st.integers(0, 12), REASONS, VALUES, VALUES, st.integers(0, 9), CREATED, st.booleans())


@st.composite
def runs(draw, min_size=0):
    """The records of a run in the order of their saves, in which a later attempt may begin at an earlier step."""
    records, attempt = [], 1
    saves = draw(st.lists(SAVE, min_size=min_size, max_size=10))
    for serial, (step, reasons, acc, loss, size, created, restarted) in enumerate(saves):
        attempt += restarted
        metrics = {name: value for name, value in ((ACC.name, acc), (LOSS.name, loss)) if value is not None}
        made = record(
            step, reasons=reasons, metrics=metrics, size=size, created=created, attempt=attempt, serial=serial
        )
        records.append(replace(made, name=f"{made.name}.{serial + 2}"))
    return records


UNSETTLED = st.just(AutoMetric())
ANY_METRICS = st.lists(st.sampled_from([ACC, LOSS]), unique=True) | UNSETTLED
BUDGETS = st.integers(1, 40)
ANY_BUDGET = st.none() | BUDGETS


def policies(*, metrics=ANY_METRICS, keep_bytes=ANY_BUDGET):
    return st.builds(
        Retention.parse,
        max_keep_ckpts=st.integers(-1, 4),
        metrics=metrics,
        max_keep_best=st.integers(1, 3),
        keep_every=st.none() | st.integers(1, 5),
        keep_for=st.none() | st.sampled_from(["1h", "2d", "7d"]),
        keep_bytes=keep_bytes,
    )


def left_of(retention: Retention, records) -> list[Record]:
    gone = retention.to_delete(records, NOW)
    return [one for one in records if one not in gone]


def names(records) -> set[str]:
    return {one.name for one in records}


def firm(retention: Retention, records) -> set[str]:
    bests = set().union(*(rule.kept(records) for rule in retention.bests))
    return bests | names(records[-1:])


@given(records=runs(), retention=policies())
def test_each_is_either_kept_or_deleted_oldest_first(records, retention):
    gone = retention.to_delete(records, NOW)
    kept = list(retention.kept(records, NOW))
    assert [one.name for one in records if one not in gone] == kept
    assert [one for one in records if one.name not in kept] == gone


@given(records=runs(min_size=1), retention=policies())
def test_the_newest_is_never_deleted(records, retention):
    assert records[-1] in left_of(retention, records)


@given(records=runs(), retention=policies(metrics=st.just((ACC, LOSS))))
def test_one_of_the_best_is_never_deleted(records, retention):
    left = left_of(retention, records)
    for rule in retention.bests:
        assert names(ranking(rule.metric, records)[: rule.n]) <= names(left)


@given(records=runs(), retention=policies(keep_bytes=st.none()))
def test_without_a_budget_whatever_any_rule_keeps_is_kept_and_nothing_else(records, retention):
    rules = [*retention.rules, *retention.bests]
    if retention.keep_for is not None:
        rules.append(KeepFor(retention.keep_for, NOW))
    union = set().union(*(rule.kept(records) for rule in rules)) | names(records[-1:])
    assert names(left_of(retention, records)) == union


@given(records=runs(), retention=policies(keep_bytes=BUDGETS))
def test_the_budget_is_honoured_unless_only_the_newest_and_the_best_are_left(records, retention):
    left = left_of(retention, records)
    total = sum(one.total_bytes for one in left)
    assert total <= retention.keep_bytes or names(left) == firm(retention, records)
    assert retention.over_bytes(records, NOW) == max(0, total - retention.keep_bytes)


@given(records=runs(), retention=policies(keep_bytes=BUDGETS))
def test_the_budget_takes_no_more_than_it_must_and_the_oldest_first(records, retention):
    unlimited = Retention(retention.rules, bests=retention.bests, keep_for=retention.keep_for)
    taken = [one for one in left_of(unlimited, records) if one not in left_of(retention, records)]
    soft = [one for one in left_of(unlimited, records) if one.name not in firm(retention, records)]
    assert taken == soft[: len(taken)]
    if taken:
        left_bytes = sum(one.total_bytes for one in left_of(retention, records))
        assert left_bytes + taken[-1].total_bytes > retention.keep_bytes


@given(records=runs(), retention=policies())
def test_after_the_deletion_there_is_nothing_more_to_delete(records, retention):
    assert retention.to_delete(left_of(retention, records), NOW) == []


@given(records=runs(), retention=policies(), seed=st.integers(0, 99))
def test_the_order_in_which_records_are_listed_does_not_matter(records, retention, seed):
    shuffled = random.Random(seed).sample(records, len(records))
    assert list(retention.kept(shuffled, NOW).items()) == list(retention.kept(records, NOW).items())


@given(records=runs(min_size=1), retention=policies(metrics=st.just((ACC, LOSS))))
def test_over_a_whole_run_the_best_so_far_and_the_newest_are_always_there(records, retention):
    there: list[Record] = []
    for saved, newest in enumerate(records, start=1):
        there = left_of(retention, [*there, newest])
        assert there[-1] == newest
        for metric in (ACC, LOSS):
            assert ranking(metric, there)[:1] == ranking(metric, records[:saved])[:1]


@given(records=runs(min_size=1), retention=policies(metrics=UNSETTLED))
def test_over_a_run_whose_metric_is_not_known_yet_no_best_is_lost(records, retention):
    there: list[Record] = []
    for newest in records:
        there = left_of(retention, [*there, newest])
    assert names(one for one in records if "best" in one.reasons) <= names(there)

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distckpt.schedule import Schedule, parse_duration, spell_duration

MINUTE = timedelta(minutes=1)


def due_counts(schedule: Schedule, until: int) -> list[int]:
    return [count for count in range(1, until + 1) if schedule.due(count)]


@pytest.mark.parametrize(
    ("interval", "begin", "counts"),
    [
        (1, 0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (4, 0, [4, 8]),
        (2, 3, [3, 5, 7, 9]),
        (2, 2, [2, 4, 6, 8, 10]),
        (3, 9, [9]),
        (3, 11, []),
        (100, 1, [1]),
    ],
)
def test_saving_starts_at_save_begin_and_counts_from_there(interval, begin, counts):
    assert due_counts(Schedule.parse(interval, begin=begin), 10) == counts


@given(interval=st.integers(-3, 12), begin=st.integers(0, 20), done=st.integers(0, 60))
def test_a_step_interval_is_due_where_the_specification_says(interval, begin, done):
    # Hook.every_n_*, with a counter that is one behind what is done.
    counter = done - 1
    d = counter + 1 - begin
    assert Schedule.parse(interval, begin=begin).due(done) == (d >= 0 and interval > 0 and d % interval == 0)


@pytest.mark.parametrize("interval", [-1, 0, -7, [-1], (0, -1)])
def test_an_interval_that_is_not_positive_means_never(interval):
    schedule = Schedule.parse(interval)
    assert due_counts(schedule, 50) == []
    assert schedule.period is None


def test_each_step_interval_of_a_list_is_obeyed():
    assert due_counts(Schedule.parse([4, 6, -1]), 12) == [4, 6, 8, 12]


def test_steps_and_durations_mix_and_the_shortest_duration_is_the_period():
    schedule = Schedule.parse([5, "1h", timedelta(minutes=20), "90min"])
    assert due_counts(schedule, 10) == [5, 10]
    assert schedule.period == 20 * MINUTE


def test_a_duration_alone_makes_no_step_due():
    schedule = Schedule.parse("15min", begin=3)
    assert schedule.period == 15 * MINUTE
    assert due_counts(schedule, 20) == []


@pytest.mark.parametrize("stride", [1, 2, 3, 7])
def test_where_several_steps_are_done_at_once_it_is_due_with_the_first_that_was_passed(stride):
    schedule = Schedule.parse([4, 6], begin=2)
    passed = {count for count in range(1, 60) if schedule.due(count)}
    for count in range(stride, 60, stride):
        assert schedule.due(count, count - stride) is bool(passed & {*range(count - stride + 1, count + 1)}), count
    assert not schedule.due(6, 6)


def test_equal_words_give_equal_schedules():
    assert Schedule.parse((5, "60min"), begin=2) == Schedule.parse([5, timedelta(hours=1)], begin=2)


@pytest.mark.parametrize("interval", [None, True, False, 0.5, 2.0, b"2h", {5}, [None], [True], [[5]], [5, ("1h",)]])
def test_an_interval_of_a_wrong_type_is_named(interval):
    with pytest.raises(TypeError, match=r"interval: .* should be .*an int.*15min") as caught:
        Schedule.parse(interval)
    culprit = interval[-1] if isinstance(interval, list) else interval
    assert ascii(culprit) in str(caught.value)


@pytest.mark.parametrize(
    "interval",
    ["", " ", "fast", "5", "-5min", "0s", "0h0min", "15m", "30min1h", "1h1h", "1,5h", "\u0663min", "3\u017f"],
)
def test_an_interval_that_is_no_duration_is_named(interval):
    with pytest.raises(ValueError, match="interval: ") as caught:
        Schedule.parse(["2h", interval])
    assert ascii(interval) in str(caught.value)
    assert "a number of steps is an int" in str(caught.value)


@pytest.mark.parametrize("interval", [timedelta(0), timedelta(minutes=-5)])
def test_a_duration_that_is_not_longer_than_zero_is_refused(interval):
    with pytest.raises(ValueError, match=r"interval: .* longer than zero"):
        Schedule.parse(interval)


@pytest.mark.parametrize("interval", [[], ()])
def test_an_empty_list_is_refused_as_never_has_its_own_word(interval):
    with pytest.raises(ValueError, match=r"interval: an empty (list|tuple) .* -1 means never"):
        Schedule.parse(interval)


def test_a_negative_save_begin_is_refused_with_its_value():
    with pytest.raises(ValueError, match="save_begin should not be less than 0, but got -2"):
        Schedule.parse(1, begin=-2)


@pytest.mark.parametrize("begin", [None, True, 1.0, "1"])
def test_a_save_begin_of_a_wrong_type_is_refused_with_its_value(begin):
    with pytest.raises(TypeError, match="save_begin: .* should be an int") as caught:
        Schedule.parse(1, begin=begin)
    assert ascii(begin) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("15min", 15),
        ("90s", 1.5),
        ("2h", 120),
        ("1d", 1440),
        ("2w", 20160),
        ("1h30min", 90),
        ("1 h 30 min", 90),
        ("  1.5H\n", 90),
        ("1 day 2 hours 3 minutes 30 seconds", 1563.5),
        ("3hrs", 180),
        ("30secs", 0.5),
    ],
)
def test_durations_are_read_as_people_write_them(text, minutes):
    assert parse_duration(text, "keep_for") == minutes * MINUTE


@pytest.mark.parametrize("text", ["", "fast", "15m"])
def test_a_text_that_is_no_duration_is_answered_with_ones_that_are(text):
    with pytest.raises(ValueError, match=f"^keep_for: '{text}' is no duration; .*\"15min\""):
        parse_duration(text, "keep_for")


@pytest.mark.parametrize("value", [5, 1.5, None, True, ["7d"]])
def test_a_duration_of_a_wrong_type_names_the_word_it_was_given_for(value):
    with pytest.raises(TypeError, match="keep_for: .* should be a duration"):
        parse_duration(value, "keep_for")


def test_a_duration_beyond_counting_is_a_value_error():
    with pytest.raises(ValueError, match="keep_for: '99999999999d' is longer than can be counted"):
        parse_duration("99999999999d", "keep_for")


@given(st.timedeltas(min_value=timedelta(microseconds=1), max_value=timedelta(days=100_000)))
@example(timedelta(days=7))
@example(timedelta(microseconds=10))
def test_a_duration_spelled_and_parsed_is_the_same(duration):
    assert parse_duration(spell_duration(duration), "keep_for") == duration


def test_a_duration_is_spelled_without_what_is_zero():
    assert spell_duration(timedelta(days=7)) == "7d"
    assert spell_duration(timedelta(minutes=90)) == "1h30min"
    assert spell_duration(timedelta(seconds=90.5)) == "1min30.5s"


@given(st.text("0123456789. -+dhminsw\n\u0663\u017f", max_size=12))
def test_whatever_the_text_it_is_a_positive_duration_or_a_value_error(text):
    try:
        assert parse_duration(text, "keep_for") > timedelta(0)
    except ValueError as error:
        assert str(error).startswith("keep_for: ")

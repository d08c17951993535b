"""Numbers are the same after they were told in short, and what is no such telling is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distckpt.progressions import condensed, is_rising, read, told

runs = st.builds(
    lambda first, step, count: [*range(first, first + step * count, step)],
    *(st.integers(20, 60), st.sampled_from([-3, -1, 1, 2, 7]), st.integers(1, 7)),
)
numbers = st.lists(st.one_of(runs, st.lists(st.integers(0, 1 << 60), max_size=3)), max_size=5).map(
    lambda of: sum(of, [])
)


@given(numbers)
@example([7, 7, 7, 7, 7])
@example([0, 1, 2, 3, 3, 2, 1, 0])
def test_what_was_told_is_read_again(many):
    assert [*read(json.loads(json.dumps(told(many))), len(many), "they")] == many


@given(numbers)
def test_the_same_numbers_are_equal_however_they_come(many):
    once = condensed(many)
    assert [*once] == many and isinstance(once, (range, tuple))
    assert condensed(once) == condensed(tuple(many)) == read(told(once), len(many), "they") == once


@given(numbers)
def test_it_is_known_whether_they_rise(many):
    rises = sorted(set(many)) == many
    assert is_rising(many) == is_rising(condensed(many)) == rises


def test_a_million_that_are_equally_far_apart_are_three():
    many = range(5, 5 + 49 * 1_000_000, 49)
    assert told(many) == told([*many]) == [[5, 49, 1_000_000]]
    assert condensed([*many]) == many == read([[5, 49, 1_000_000]], 1_000_000, "they")


def test_few_are_told_one_by_one():
    assert told([1, 2, 3]) == [1, 2, 3] == told(range(1, 4))
    assert told([0, 5, 6, 7, 8, 20]) == [0, [5, 1, 4], 20]


@pytest.mark.parametrize(
    "words",
    [
        *(
            None,
            {},
            3,
            "3",
            [-1],
            [True],
            [1.0],
            ["1"],
            [None],
            [[]],
            [[1, 1]],
            [[0, 1, 2, 3]],
            [[0, 0, 2]],
            [[0, 1, 0]],
        ),
        *([[0, 1, -1]], [[3, -1, 5]], [[0, 1, 11]], [[0, 1, 1 << 70]], [[0, True, 2]], [[0, 1.0, 2]], [[-3, 1, 9]]),
        *([0] * 11, [[0, 1, 6], [0, 1, 6]]),
    ],
    ids=ascii,
)
def test_what_is_no_telling_of_ten_numbers_is_refused(words):
    with pytest.raises(ValueError, match="they"):
        read(words, 10, "they")

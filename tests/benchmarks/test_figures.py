"""What samples amount to, and what is not told because it may be noise."""

from __future__ import annotations

import pytest
from figures import NOISE, TOO_FEW, Figure, added, figure, ratio, slowdown, undisturbed, undisturbed_pairs
from hypothesis import given
from hypothesis import strategies as st


def turn(quiet: float, *steps: float, foreign_share: float = 0.0) -> dict[str, object]:
    return {"quiet": [quiet], "steps": list(steps), "foreign_share": foreign_share}


def around(median: float, reach: float, count: int = 20) -> Figure:
    return Figure(median, median - reach, median + reach, count)


def test_a_figure_is_the_median_between_the_quartiles() -> None:
    assert figure([1, 2, 3, 4, 100]) == Figure(3, 2, 4, 5)
    assert figure([7]) == Figure(7, 7, 7, 1)
    assert figure([]) is None


def test_what_a_save_adds_is_what_its_steps_took_longer_than_the_controls_in_the_same_places() -> None:
    control = [turn(1.0, 2.0, 1.0)] * 3
    assert added([turn(1.0, 2.5, 1.25)], control) == pytest.approx([0.75])


def test_a_process_that_is_slower_anyhow_adds_nothing_by_that() -> None:
    control = [turn(1.0, 1.0, 1.0)] * 3
    assert added([turn(1.25, 1.25, 1.25)] * 3, control) == pytest.approx([0.0] * 3)


def test_steps_that_a_turn_went_on_for_count_against_the_last_place() -> None:
    control = [turn(1.0, 2.0, 1.0)] * 3
    assert added([turn(1.0, 2.0, 1.0, 1.5, 1.5)], control) == pytest.approx([1.0])


def test_one_disturbed_step_of_the_control_moves_nothing() -> None:
    control = [turn(1.0, 1.0), turn(1.0, 9.0), turn(1.0, 1.0)]
    assert added([turn(1.0, 1.5)], control) == pytest.approx([0.5])


def test_without_turns_nothing_is_added() -> None:
    assert added([], []) == []


def test_a_pair_is_thrown_away_when_either_was_disturbed() -> None:
    turns = [turn(1, 1, foreign_share=share) for share in (0.0, 0.2, 0.0, 0.1)]
    control = [turn(2, 2, foreign_share=share) for share in (0.0, 0.0, 0.2, 0.1)]
    assert undisturbed_pairs(turns, control, 0.1) == ([turns[0], turns[3]], [control[0], control[3]])
    assert undisturbed(turns, 0.1) == [turns[0], turns[2], turns[3]]


def test_a_slowdown_is_against_the_steps_before_and_after() -> None:
    row = {"steps": [1.5, 1.7], "quiet_before": [1.0] * 3, "quiet_after": [2.0] * 3}
    assert slowdown(row) == Figure(pytest.approx(1.6 / 1.5 - 1), pytest.approx(-0.2), pytest.approx(0.6), 2)


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        (around(1.0, 0.1), around(2.0, 0.1), "0.50x"),
        (around(3.0, 0.1), around(2.0, 0.1), "1.50x"),
        (around(1.0, 0.1), around(1.1, 0.3), NOISE),
        (around(1.0, 0.3), around(1.1, 0.01), NOISE),
        (around(0.1, 0.2), around(2.0, 0.1), "< 0.15x"),
        (around(2.0, 0.1), around(0.1, 0.2), "> 6.67x"),
        (around(-0.5, 0.1), around(2.0, 0.1), NOISE),
        (around(1.0, 0.1, count=2), around(2.0, 0.1), TOO_FEW),
        (None, around(2.0, 0.1), "-"),
        (around(2.0, 0.1), None, "-"),
    ],
)
def test_a_ratio_is_told_as_far_as_it_is_known(one: Figure | None, other: Figure | None, told: str) -> None:
    assert ratio(one, other) == told


@given(st.floats(0.01, 10), st.floats(0.01, 10), st.floats(0, 10))
def test_no_ratio_is_told_of_figures_whose_spread_is_larger_than_their_difference(
    one: float, other: float, reach: float
) -> None:
    is_told = ratio(around(one, reach), around(other, 0.0)) != NOISE
    assert not is_told or abs(one - other) > 2 * reach * (1 - 1e-9)

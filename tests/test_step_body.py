import pytest

from distckpt.step_body import StepBody, Wishes


@pytest.fixture
def body() -> StepBody:
    body = StepBody()
    body.begin(3)
    return body


def test_all_that_is_reported_in_a_body_is_of_its_step_the_last_word_counting(body):
    body.report({"loss": 2.0, "acc": 0.5})
    body.report({"loss": 1.0, "other": None})
    assert body.end().reported == {"loss": 1.0, "acc": 0.5, "other": None}


@pytest.mark.parametrize("waits", [(True, False), (False, True), (True, True), (False, False)])
def test_a_save_that_was_asked_for_twice_is_waited_for_if_one_of_them_says_so(body, waits):
    for wait in waits:
        body.ask("why", wait=wait)
    assert body.end().asked == {"why": any(waits)}


def test_what_was_said_in_a_body_is_forgotten_with_it(body):
    body.report({"loss": 2.0})
    body.ask("why", wait=False)
    body.leave()
    body.end()
    body.begin(4)
    body.require_whole()
    assert body.is_open and body.end() == Wishes(None, {}) and not body.is_open


def test_a_body_that_was_left_is_named(body):
    body.require_whole()
    body.leave()
    with pytest.raises(RuntimeError, match=r"^step 3 was left before its end, .*: call step\(\) if it is done"):
        body.require_whole()

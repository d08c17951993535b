"""Pieces are made one ahead, each where it is asked for, and never more."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.engine.ahead import ahead

pytestmark = pytest.mark.timeout(60)


def is_making() -> bool:
    return any(thread.name == "distckpt-ahead" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not is_making()


@given(st.lists(st.one_of(st.integers(), st.none()), max_size=20))
def test_all_pieces_come_in_their_order(pieces):
    with ahead(pieces) as coming:
        assert list(coming) == pieces


class Asked:
    """Tells what was asked for."""

    def __init__(self) -> None:
        self.asked = [threading.Event() for _ in range(4)]

    def __iter__(self) -> Iterator[int]:
        for nth, event in enumerate(self.asked):
            event.set()
            yield nth


def test_the_next_is_made_while_one_is_used_and_the_one_behind_it_is_not():
    pieces = Asked()
    with ahead(pieces) as coming:
        one = iter(coming)
        assert not pieces.asked[0].is_set()
        assert next(one) == 0
        assert pieces.asked[1].wait(20)
        assert not pieces.asked[2].wait(0.05)
        assert next(one) == 1 and pieces.asked[2].wait(20)


@pytest.mark.parametrize("error", [ValueError("no more"), SystemExit("no more"), KeyboardInterrupt("no more")])
def test_what_making_one_raises_is_raised_where_it_is_asked_for(error):
    def pieces() -> Iterator[int]:
        yield 1
        raise error

    with ahead(pieces()) as coming:
        one = iter(coming)
        assert next(one) == 1
        with pytest.raises(type(error), match="no more"):
            next(one)


def test_who_stops_in_the_middle_waits_for_the_one_that_is_being_made():
    begun, go_on, made = threading.Event(), threading.Event(), []

    def pieces() -> Iterator[int]:
        yield 1
        begun.set()
        assert go_on.wait(20)
        made.append(2)
        yield 2

    with pytest.raises(KeyError), ahead(pieces()) as coming:
        next(iter(coming))
        assert begun.wait(20)
        threading.Timer(0.05, go_on.set).start()
        raise KeyError
    assert made == [2]


def test_without_a_thread_each_is_made_where_it_is_asked_for(monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with ahead(iter(range(3))) as coming:
        assert list(coming) == [0, 1, 2]

"""The fakes for tests keep the contracts of the real ones (see tests/contracts), and fail exactly when told to."""

from __future__ import annotations

import threading
import time

import pytest

from distckpt.ranks import Solo
from distckpt.stores.local import LocalStore
from distckpt.testing import FaultyStore, on_threads, thread_ranks


@pytest.fixture
def store(tmp_path) -> LocalStore:
    return LocalStore(tmp_path)


def use(store) -> None:
    store.make_folder("a")
    with store.create("a/file") as sink:
        sink.write(b"bytes")
    store.settle("a")
    store.settle()
    store.put("b", b"")
    store.link("b", "c")
    store.point("latest", "a")
    store.delete("b")


OPERATIONS = ["make_folder a", "create a/file", "settle a", "settle", "put b", "link b", "point latest", "delete b"]


# A store that fails


def test_what_changes_something_is_told_in_order_and_what_only_looks_is_not(store):
    counted = FaultyStore(store)
    use(counted)
    assert counted.list() == ["a", "c", "latest"] and counted.exists("a") and counted.read("a/file") == b"bytes"
    assert counted.operations == OPERATIONS and counted.url == store.url


@pytest.mark.parametrize("moment", range(len(OPERATIONS)))
def test_the_operation_of_that_number_fails_before_it_changes_anything_and_no_other_does(store, moment):
    faulty = FaultyStore(store, fail_at=moment)
    with pytest.raises(OSError, match="No space left on device"):
        use(faulty)
    assert faulty.operations == OPERATIONS[: moment + 1]
    assert len(store.list()) == [0, 1, 1, 1, 1, 2, 3, 4][moment]
    faulty.append("log", b"it goes on")
    assert store.read("log") == b"it goes on"


def test_it_fails_with_the_error_that_it_was_given(store):
    with pytest.raises(KeyboardInterrupt):
        use(FaultyStore(store, fail_at=2, error=KeyboardInterrupt()))


class Busy(list):
    """A list whose length another thread changes between a look and an append, if it can."""

    def __len__(self):
        length = super().__len__()
        time.sleep(0.0001)
        return length


def test_of_many_threads_one_fails(store):
    faulty = FaultyStore(store, fail_at=20)
    faulty.operations = Busy()

    def write(ranks):
        failed = 0
        for _ in range(20):
            try:
                faulty.append(f"log-{ranks.rank}", b"line")
            except OSError:
                failed += 1
        return failed

    for _ in range(12):
        faulty.operations.clear()
        assert sum(on_threads(thread_ranks(4), write)) == 1
        assert len(faulty.operations) == 80


# Ranks that are threads


def test_one_rank_alone_is_the_real_thing():
    assert [type(ranks) for ranks in thread_ranks(1)] == [Solo]


def test_what_each_rank_returned_or_raised_is_told_by_rank():
    def work(ranks):
        if ranks.rank == 1:
            raise KeyboardInterrupt("of rank 1")
        return ranks.rank * 10

    first, second, third = on_threads(thread_ranks(3), work)
    assert (first, third) == (0, 20) and isinstance(second, KeyboardInterrupt)


def test_ranks_that_hang_are_named_and_do_not_hang_the_test():
    go = threading.Event()
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] have not ended within 0.05 seconds"):
        on_threads(thread_ranks(3), lambda ranks: ranks.rank and go.wait(10), seconds=0.05)
    go.set()

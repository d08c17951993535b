"""A digest is worked out behind whoever reads: it is the same, and what goes wrong with it is raised."""

from __future__ import annotations

import threading

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distckpt.formats.hashing import behind

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not any(thread.name == "distckpt-hash" for thread in threading.enumerate())


def refuse(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.fixture(params=["a thread", "none"])
def threads(request, monkeypatch):
    if request.param == "none":
        monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.usefixtures("threads")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=50), max_size=20))
def test_all_that_is_told_is_in_the_digest_in_its_order(pieces):
    digest = xxhash.xxh3_128()
    with behind(digest) as hashed:
        for piece in pieces:
            hashed.update(piece)
    assert digest.digest() == xxhash.xxh3_128(b"".join(pieces)).digest()


@pytest.mark.usefixtures("threads")
def test_memory_may_change_once_it_is_drained():
    digest, memory = xxhash.xxh3_128(), bytearray(b"one")
    with behind(digest) as hashed:
        hashed.update(memory)
        hashed.drain()
        memory[:] = b"two"
        hashed.update(memory)
    assert digest.digest() == xxhash.xxh3_128(b"onetwo").digest()


class Slow:
    """A digest that begins when it may."""

    def __init__(self) -> None:
        self.may_begin = threading.Event()
        self.seen: list[bytes] = []

    def update(self, data: bytes) -> None:
        assert self.may_begin.wait(20)
        self.seen.append(data)


def test_whoever_reads_does_not_wait():
    digest = Slow()
    with behind(digest) as hashed:
        hashed.update(b"one")
        hashed.update(b"two")
        assert digest.seen == []
        digest.may_begin.set()
    assert digest.seen == [b"one", b"two"]


class Broken:
    def update(self, data: bytes) -> None:
        raise MemoryError("no more")


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("is_drained", [True, False])
def test_what_goes_wrong_is_raised_where_it_is_waited_for(is_drained):
    with pytest.raises(MemoryError, match="no more"), behind(Broken()) as hashed:
        hashed.update(b"one")
        if is_drained:
            hashed.drain()
        hashed.update(b"two")


@pytest.mark.usefixtures("threads")
def test_an_error_of_whoever_reads_is_the_one_that_is_raised():
    with pytest.raises(KeyError), behind(Broken()) as hashed:
        hashed.update(b"one")
        raise KeyError

"""A copy is shared by threads, block by block, and goes as far as there is room for it."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from engine.trainings import Background
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distckpt.engine import copying
from distckpt.engine.copying import BLOCK_BYTES, SMALL_BYTES, Copy, Piece, cut, move

pytestmark = pytest.mark.timeout(30)

BLOCK = 4096  # of the tests that make theirs small


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "BLOCK_BYTES", BLOCK)


def random_bytes(count: int) -> Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8)


def pieces_of(source: Tensor) -> list[Piece]:
    """One for each block of it."""
    return [Piece(0, source.nbytes, source.data_ptr)]


class Gate:
    """A source that can be asked for, and then stands still until it is opened."""

    def __init__(self, source: Tensor) -> None:
        self.asked = threading.Event()
        self.opened = threading.Event()
        self._source = source

    def __call__(self) -> int:
        self.asked.set()
        assert self.opened.wait(20), "nobody opened the gate"
        return self._source.data_ptr()


# Pieces


@given(st.integers(0, 5 * BLOCK_BYTES), st.integers(1, 5 * BLOCK_BYTES))
def test_pieces_are_all_of_it_and_each_lies_in_one_block(offset, count):
    pieces = cut(Piece(offset, count, lambda: 0))
    assert [one.offset for one in pieces] == [offset + one.skipped for one in pieces]
    assert [one.skipped for one in pieces[1:]] == [one.skipped + one.size for one in pieces[:-1]]
    assert pieces[0].skipped == 0 and sum(one.size for one in pieces) == count
    for one in pieces:
        assert one.size > 0 and one.offset // BLOCK_BYTES == (one.offset + one.size - 1) // BLOCK_BYTES


@pytest.mark.parametrize("count", [1, 7, SMALL_BYTES - 1, SMALL_BYTES, 3 * SMALL_BYTES + 5])
def test_so_many_bytes_are_moved_and_none_beside_them(count):
    source, target = random_bytes(count + 2), torch.zeros(count + 2, dtype=torch.uint8)
    move(target.data_ptr() + 1, source.data_ptr() + 1, count)
    assert torch.equal(target[1:-1], source[1:-1]) and not target[0] and not target[-1]


def test_bytes_of_python_are_moved_too():
    target = ctypes.create_string_buffer(6)
    move(ctypes.addressof(target), b"a\0b\0c", 5)
    assert target.raw == b"a\0b\0c\0"


# All of a copy


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_threads_share_a_copy_and_together_copy_all_of_it(threads, blocks):
    source, target = random_bytes(300 * BLOCK + 17), torch.zeros(301 * BLOCK, dtype=torch.uint8)
    copy = Copy(target, 301 * BLOCK, pieces_of(source))
    copy.start(threads)
    copy.work()
    copy.wait()
    assert torch.equal(target[: source.nbytes], source)


def test_a_copy_of_nothing_is_done():
    copy = Copy(torch.empty(0, dtype=torch.uint8), BLOCK_BYTES, [])
    copy.start(3)
    copy.work()
    copy.wait()
    copy.wait_for(0)


def test_whoever_needs_a_block_waits_for_all_up_to_that_one_and_for_none_behind(blocks):
    source, target = random_bytes(3 * BLOCK), torch.zeros(3 * BLOCK, dtype=torch.uint8)
    first, second = Gate(source), Gate(source[BLOCK : BLOCK + 100])
    rest = Piece(BLOCK + 100, 2 * BLOCK - 100, source[BLOCK + 100 :].data_ptr)
    copy = Copy(target, 3 * BLOCK, [rest, Piece(BLOCK, 100, second), Piece(0, BLOCK, first)])
    copy.start(2)
    assert first.asked.wait(20) and second.asked.wait(20)
    copy.work()
    waiting = [Background(lambda: copy.wait_for(0)), Background(lambda: copy.wait_for(2))]
    assert not waiting[0].ended(0.05)
    first.opened.set()
    waiting[0].result()
    assert not waiting[1].ended(0.05)
    second.opened.set()
    waiting[1].result()
    copy.wait()
    assert torch.equal(target, source)


# A window


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_where_there_is_room_for_a_few_blocks_all_pass_by_in_their_order(window, threads, blocks):
    source, target = random_bytes(20 * BLOCK + 99), torch.zeros(window * BLOCK, dtype=torch.uint8)
    copy = Copy(target, window * BLOCK, pieces_of(source))
    copy.start(threads)
    for block in range(21):
        copy.free(block)
        copy.wait_for(block)
        expected = source[block * BLOCK : (block + 1) * BLOCK]
        begin = block % window * BLOCK
        assert torch.equal(target[begin : begin + expected.nbytes], expected)
    copy.wait()


def test_no_block_is_overwritten_before_it_was_freed(blocks):
    source, target = random_bytes(4 * BLOCK), torch.zeros(2 * BLOCK, dtype=torch.uint8)
    copy = Copy(target, 2 * BLOCK, pieces_of(source))
    working = Background(copy.work)
    copy.wait_for(1)
    assert not working.ended(0.05)
    assert torch.equal(target, source[: 2 * BLOCK])
    copy.free(1)
    copy.wait_for(2)
    assert torch.equal(target, torch.cat([source[2 * BLOCK : 3 * BLOCK], source[BLOCK : 2 * BLOCK]]))
    copy.free(2)
    working.result()


# Failures


class Broken(RuntimeError):
    pass


def broken() -> int:
    raise Broken("no such tensor")


@pytest.mark.parametrize("wait", [Copy.wait, lambda copy: copy.wait_for(1), lambda copy: copy.wait_for(0)])
def test_what_goes_wrong_is_raised_where_the_copy_is_waited_for(wait, blocks):
    target = torch.zeros(2 * BLOCK, dtype=torch.uint8)
    copy = Copy(target, 2 * BLOCK, [Piece(0, 1, target.data_ptr), Piece(BLOCK, 1, broken)])
    copy.start(1)
    copy.work()
    with pytest.raises(Broken):
        wait(copy)


@pytest.mark.parametrize("waits", [Copy.wait, lambda copy: copy.wait_for(3), Copy.work])
def test_a_failure_ends_every_wait(waits, blocks):
    source, target = random_bytes(4 * BLOCK), torch.zeros(2 * BLOCK, dtype=torch.uint8)
    copy = Copy(target, 2 * BLOCK, pieces_of(source))
    working, waiting = Background(copy.work), Background(lambda: waits(copy))
    copy.wait_for(1)
    copy.fail(Broken())
    working.result()
    if waits is Copy.work:
        waiting.result()
    else:
        pytest.raises(Broken, waiting.result)


def test_the_first_failure_is_told():
    copy = Copy(torch.empty(1, dtype=torch.uint8), BLOCK_BYTES, [Piece(0, 1, broken)])
    copy.fail(Broken("first"))
    copy.fail(OSError("second"))
    pytest.raises(Broken, copy.wait)


def test_once_it_was_ended_no_thread_touches_the_memory(blocks):
    source, target = random_bytes(2 * BLOCK), torch.zeros(2 * BLOCK, dtype=torch.uint8)
    gate = Gate(source)
    copy = Copy(target, 2 * BLOCK, [Piece(0, BLOCK, gate), Piece(BLOCK, BLOCK, source.data_ptr)])
    copy.start(1)
    assert gate.asked.wait(20)
    ending = Background(lambda: copy.end(Broken()))
    assert not ending.ended(0.05)
    gate.opened.set()
    ending.result()
    assert torch.equal(target[:BLOCK], source[:BLOCK]) and not target[BLOCK:].any()
    copy.work()
    copy.start(2)
    assert not target[BLOCK:].any()


def test_nothing_is_begun_after_the_end(blocks):
    source, target = random_bytes(BLOCK), torch.zeros(BLOCK, dtype=torch.uint8)
    copy = Copy(target, BLOCK, pieces_of(source))
    copy.end(Broken())
    copy.work()
    assert not target.any()
    pytest.raises(Broken, copy.wait)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """The next `move` on the main thread is where somebody presses Ctrl-C."""

    def move_and_interrupt(target: int, source: int | bytes, count: int) -> None:
        move(target, source, count)
        monkeypatch.setattr(copying, "move", move)
        signal.raise_signal(signal.SIGINT)

    yield lambda: monkeypatch.setattr(copying, "move", move_and_interrupt)


def test_an_interrupt_of_whoever_helps_is_his_and_the_copy_fails_by_words(interrupted, blocks):
    source, target = random_bytes(3 * BLOCK), torch.zeros(3 * BLOCK, dtype=torch.uint8)
    copy = Copy(target, 3 * BLOCK, pieces_of(source))
    interrupted()
    with pytest.raises(KeyboardInterrupt):
        copy.work()
    with pytest.raises(Exception, match="KeyboardInterrupt"):  # no BaseException: it would end another thread
        copy.wait()

"""How a file is read: from the page cache where it is there, ahead and past it where it is not."""

from __future__ import annotations

import errno
import fcntl
import mmap
import multiprocessing
import os
import threading
from pathlib import Path

import pytest
from disks import PAGE_BYTES, drop_from_cache, memory, pages_in_cache, skip_without_direct
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distckpt.stores.file_source import is_cached
from distckpt.stores.local import LocalStore

MIB = 1024 * 1024
BLOCK = 8 * MIB
CONTENT = memory(3 * BLOCK + MIB + 100)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> LocalStore:
    """With a file of three blocks and a bit."""
    folder = tmp_path_factory.mktemp("disk")
    skip_without_direct(folder)
    (folder / "file").write_bytes(CONTENT)
    return LocalStore(folder)


@pytest.fixture
def cold(store) -> LocalStore:
    """Its file is on the disk only, and it knows nothing of the disk yet."""
    drop_from_cache(store.root / "file")
    return LocalStore(store.root)


@pytest.fixture
def warm(store) -> LocalStore:
    """Its file is in the page cache, too."""
    (store.root / "file").read_bytes()
    return LocalStore(store.root)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not is_reading_ahead()


def is_reading_ahead() -> bool:
    return any(thread.name == "distckpt-read-ahead" for thread in threading.enumerate())


class Reads:
    """What `os.preadv` read so far, how and where; in the thread that reads ahead, a test may have it fail."""

    def __init__(self, monkeypatch):
        self.told: list[tuple[str, int]] = []
        self.end = 0  # of all that it was asked for in the thread
        self.failures: dict[int, BaseException] = {}  # by where they happen
        self.lengths: dict[int, int] = {}  # of reads that are short, likewise
        self._real = os.preadv
        monkeypatch.setattr(os, "preadv", self._preadv)

    def _preadv(self, fd, buffers, offset, flags=0):
        if flags:
            return self._real(fd, buffers, offset, flags)
        direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        if direct and offset in self.failures:
            raise self.failures[offset]
        self.told.append(("direct" if direct else "cached", offset))
        if direct:
            self.end = max(self.end, offset + len(buffers[0]))
            buffers = [buffers[0][: self.lengths.get(offset)]]
        return self._real(fd, buffers, offset)


@pytest.fixture
def reads(monkeypatch) -> Reads:
    return Reads(monkeypatch)


def content(store, step=5 * MIB) -> bytearray:
    data = bytearray((store.root / "file").stat().st_size)
    with store.open("file") as source:
        for start in range(0, len(data), step):
            source.read_into(memoryview(data)[start : start + step])
    return data


# Which way


def test_a_file_on_the_disk_is_read_ahead_and_the_page_cache_stays_as_it_was(cold, reads):
    assert content(cold) == CONTENT
    assert reads.told == [("direct", offset) for offset in range(0, len(CONTENT), BLOCK)]
    assert pages_in_cache(cold.root / "file") < 128 < len(CONTENT) // PAGE_BYTES // 10
    assert len(CONTENT) <= reads.end < len(CONTENT) + PAGE_BYTES, "nor is the disk asked for more"


def test_a_file_in_the_page_cache_is_read_from_there(warm, reads):
    assert content(warm) == CONTENT
    assert {how for how, _ in reads.told} == {"cached"}


def test_who_reads_a_header_only_reads_nothing_ahead(cold, reads):
    with cold.open("file") as source:
        for size in (8, 200_000):
            source.read_into(bytearray(size))
        assert not is_reading_ahead()
    assert reads.told == [("cached", 0), ("cached", 8)]


def test_behind_a_header_the_rest_is_read_ahead_from_the_page_where_it_begins(cold, reads):
    target = bytearray(len(CONTENT))
    with cold.open("file") as source:
        for start, end in ((0, 8), (8, 5000), (5000, len(target))):
            source.read_into(memoryview(target)[start:end])
    assert target == CONTENT
    assert reads.told[:3] == [("cached", 0), ("cached", 8), ("direct", 4096)]


def test_a_small_file_is_read_through_the_page_cache(cold, reads, tmp_path):
    (tmp_path / "file").write_bytes(CONTENT[: BLOCK - 1])
    drop_from_cache(tmp_path / "file")
    assert content(LocalStore(tmp_path)) == CONTENT[: BLOCK - 1]
    assert {how for how, _ in reads.told} == {"cached"}


@pytest.mark.parametrize(("share", "expected"), [(0, False), (0.5, False), (0.95, True), (1, True)])
def test_a_file_is_in_the_page_cache_if_nine_tenths_of_it_are(cold, share, expected):
    with (cold.root / "file").open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.read(int(share * len(CONTENT)))
        assert is_cached(file.fileno(), len(CONTENT)) is expected


def test_to_ask_whether_it_is_there_brings_nothing_there(cold):
    with (cold.root / "file").open("rb", buffering=0) as file:
        for _ in range(10):
            assert not is_cached(file.fileno(), len(CONTENT))
    assert pages_in_cache(cold.root / "file") == 0


def test_where_nobody_tells_what_is_in_the_page_cache_it_is_read_through_it(cold, reads, monkeypatch):
    real = mmap.mmap

    def mapped(fd, *args, **named):
        if fd != -1:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return real(fd, *args, **named)

    monkeypatch.setattr(mmap, "mmap", mapped)
    assert content(cold) == CONTENT
    assert {how for how, _ in reads.told} == {"cached"}


# What comes out


SIZES = st.lists(st.one_of(st.integers(0, 70_000), st.integers(0, 3 * BLOCK)), max_size=12)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SIZES, st.booleans())
def test_pieces_of_any_size_follow_one_another(store, sizes, is_cold):
    if is_cold:
        drop_from_cache(store.root / "file")
    at = 0
    with store.open("file") as source:
        for size in sizes:
            target = bytearray(size)
            if at + size > len(CONTENT):
                with pytest.raises(EOFError, match=f"ends {at + size - len(CONTENT)} bytes too early"):
                    source.read_into(target)
                return
            source.read_into(target)
            assert target == CONTENT[at : at + size]
            at += size


@pytest.mark.parametrize("size", [4000, 20 * MIB])
def test_memory_that_cannot_be_written_is_refused(cold, size):
    with cold.open("file") as source:
        source.read_into(bytearray(2 * MIB))
        with pytest.raises(TypeError):
            source.read_into(bytes(size))


def test_two_files_are_read_at_a_time(cold):
    targets = [bytearray(len(CONTENT)), bytearray(len(CONTENT))]
    with cold.open("file") as one, cold.open("file") as other:
        for start in range(0, len(CONTENT), 2 * MIB):
            for source, target in zip((one, other), targets, strict=True):
                source.read_into(memoryview(target)[start : start + 2 * MIB])
    assert targets[0] == targets[1] == CONTENT


def test_the_next_file_is_read_into_the_same_memory(cold, monkeypatch):
    asked = []
    real = mmap.mmap

    def counted(fd, *args, **named):
        if fd == -1:
            asked.append(args)
        return real(fd, *args, **named)

    monkeypatch.setattr(mmap, "mmap", counted)
    for _ in range(3):
        drop_from_cache(cold.root / "file")
        assert content(cold) == CONTENT
    assert len(asked) == 1


def test_a_child_of_a_fork_reads_with_what_it_has_from_its_parent(cold):
    assert content(cold) == CONTENT
    drop_from_cache(cold.root / "file")
    reader, writer = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: writer.send(content(cold) == CONTENT))
    child.start()
    assert reader.poll(20) and reader.recv()
    child.join(20)


# Where something goes wrong


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
@pytest.mark.parametrize("at", [0, BLOCK])
def test_a_disk_that_refuses_the_read_itself_is_read_through_the_page_cache_from_there(cold, reads, number, at):
    reads.failures[at] = OSError(number, os.strerror(number))
    assert content(cold) == CONTENT
    assert [how for how, _ in reads.told[: at // BLOCK + 1]] == ["direct"] * (at // BLOCK) + ["cached"]
    reads.told.clear()
    drop_from_cache(cold.root / "file")
    assert content(cold) == CONTENT
    assert {how for how, _ in reads.told} == {"cached"}, "nor is it tried again"


@pytest.mark.parametrize("length", [4096, 512])
def test_a_short_read_is_gone_on_with_and_is_no_refusal(cold, reads, length):
    reads.lengths[BLOCK] = length
    assert content(cold) == CONTENT
    assert reads.told[2] == ("cached" if length % PAGE_BYTES else "direct", BLOCK + length)
    reads.lengths.clear()
    reads.told.clear()
    drop_from_cache(cold.root / "file")
    assert content(cold) == CONTENT
    assert {how for how, _ in reads.told} == {"direct"}


def test_a_disk_that_refuses_to_be_asked_is_read_through_the_page_cache(cold, reads, monkeypatch):
    def refuse(fd, command, flags=0):
        if command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, command, flags)

    real = fcntl.fcntl
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert content(cold) == CONTENT
    assert {how for how, _ in reads.told} == {"cached"}


def test_without_memory_to_read_ahead_it_is_read_through_the_page_cache(cold, reads, monkeypatch):
    real = mmap.mmap

    def refuse(fd, *args, **named):
        if fd == -1:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(fd, *args, **named)

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert content(cold) == CONTENT
    assert {how for how, _ in reads.told} == {"cached"}


def test_without_a_thread_to_read_ahead_it_is_read_through_the_page_cache(cold, reads, monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert content(cold) == CONTENT
    assert {how for how, _ in reads.told} == {"cached"}


def test_an_error_of_the_thread_is_raised_where_its_bytes_are_asked_for_each_time(cold, reads):
    reads.failures[BLOCK] = OSError(errno.EIO, os.strerror(errno.EIO))
    target = bytearray(BLOCK)
    with cold.open("file") as source:
        source.read_into(target)
        assert target == CONTENT[:BLOCK]
        for _ in range(2):
            with pytest.raises(OSError, match="file") as raised:
                source.read_into(bytearray(1))
            assert raised.value.errno == errno.EIO


def test_what_is_no_error_of_the_disk_is_raised_too(cold, reads):
    reads.failures[0] = MemoryError()
    with pytest.raises(MemoryError):
        content(cold)


@pytest.mark.parametrize("size", [2 * MIB, BLOCK])
def test_who_stops_in_the_middle_leaves_no_thread(cold, size):
    with pytest.raises(KeyError), cold.open("file") as source:
        source.read_into(bytearray(size))
        assert is_reading_ahead()
        raise KeyError
    assert not is_reading_ahead()


@pytest.fixture
def zeros(tmp_path) -> Path:
    """A file of six blocks of zeros on the disk."""
    skip_without_direct(tmp_path)
    (tmp_path / "file").write_bytes(bytes(6 * BLOCK))
    drop_from_cache(tmp_path / "file")
    return tmp_path / "file"


@pytest.mark.parametrize("size", [0, PAGE_BYTES, 5 * BLOCK, 5 * BLOCK + 100])
def test_a_file_that_shrinks_while_it_is_read_ahead_is_an_error(zeros, size):
    with LocalStore(zeros.parent).open("file") as source:
        source.read_into(bytearray(2 * MIB))
        assert is_reading_ahead()
        os.truncate(zeros, size)
        with pytest.raises(EOFError, match="too early"):
            source.read_into(bytearray(source.size_bytes - 2 * MIB))


def test_a_file_that_grows_while_it_is_read_ahead_has_its_old_bytes_and_then_the_new_ones(zeros):
    with LocalStore(zeros.parent).open("file") as source:
        source.read_into(bytearray(2 * MIB))
        with zeros.open("ab") as file:
            file.write(CONTENT[:200_000])
        target = bytearray(source.size_bytes - 2 * MIB + 200_000)
        source.read_into(target)
    assert target == bytes(source.size_bytes - 2 * MIB) + CONTENT[:200_000]


# Parts of a file


PARTS = [(0, 100), (5 * MIB + 17, 9 * MIB + 1), (9 * MIB + 200, 9 * MIB + 300), (12 * MIB, 21 * MIB)]


@pytest.mark.parametrize("is_expected", [True, False])
@pytest.mark.parametrize("parts", [PARTS, [*PARTS, (len(CONTENT) - 7, len(CONTENT))], PARTS[1:]])
def test_what_is_skipped_is_not_handed_out(cold, parts, is_expected):
    with cold.open("file") as source:
        if is_expected:
            source.expect(parts)
        at = 0
        for begin, end in parts:
            source.skip(begin - at)
            found = bytearray(end - begin)
            source.read_into(found)
            assert found == CONTENT[begin:end]
            at = end
        source.skip(len(CONTENT) - at)
        with pytest.raises(EOFError):
            source.read_into(bytearray(1))


def test_of_what_is_not_expected_nothing_is_read_ahead(cold, reads):
    with cold.open("file") as source:
        source.expect([(2 * MIB, 3 * MIB), (12 * MIB, 21 * MIB)])
        found = bytearray(10 * MIB)
        source.skip(2 * MIB)
        source.read_into(memoryview(found)[:MIB])
        source.skip(9 * MIB)
        source.read_into(memoryview(found)[MIB:])
    assert found == bytes(CONTENT[2 * MIB : 3 * MIB]) + bytes(CONTENT[12 * MIB : 21 * MIB])
    assert reads.told == [("direct", 2 * MIB), ("direct", 12 * MIB), ("direct", 20 * MIB)]


def test_a_file_of_which_little_is_expected_is_read_through_the_page_cache(cold, reads):
    with cold.open("file") as source:
        source.expect([(20 * MIB, 21 * MIB)])
        source.skip(20 * MIB)
        found = bytearray(MIB)
        source.read_into(found)
    assert found == CONTENT[20 * MIB : 21 * MIB] and {how for how, _ in reads.told} == {"cached"}


@pytest.mark.parametrize("neighbours, by_all, way", [(1, True, "direct"), (2, False, "direct"), (2, True, "cached")])
def test_what_several_processes_read_together_is_read_into_the_page_cache_once(cold, reads, neighbours, by_all, way):
    cold.neighbours = neighbours
    with cold.open("file") as source:
        source.expect([(0, len(CONTENT))], by_all=by_all)
        found = bytearray(len(CONTENT))
        source.read_into(found)
    assert found == CONTENT and {how for how, _ in reads.told} <= {way, "cached"} and (way, 0) in reads.told
    assert (pages_in_cache(cold.root / "file") > len(CONTENT) // PAGE_BYTES // 2) is (way == "cached")

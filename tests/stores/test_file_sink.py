"""What passes the page cache by on its way to a file, and what becomes of it where the file system refuses that."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from disks import PAGE_BYTES, drop_from_cache, memory, pages_in_cache, skip_without_direct
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distckpt.stores import file_sink
from distckpt.stores.local import LocalStore

MIB = 1024 * 1024


@pytest.fixture
def disk(tmp_path) -> Path:
    skip_without_direct(tmp_path)
    return tmp_path


@pytest.fixture
def writes(monkeypatch) -> list[tuple[str, int]]:
    """What `os.write` was asked to write so far: how, and how many bytes."""
    told: list[tuple[str, int]] = []
    real = os.write

    def write(fd, data):
        told.append((way(fd), len(data)))
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    return told


def way(fd: int) -> str:
    return "direct" if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT else "cached"


def create(store, *pieces):
    with store.create("file") as sink:
        for piece in pieces:
            sink.write(piece)


def content(store) -> bytes:
    """What is in the file, past the page cache and through it."""
    place = store.root / "file"
    through = place.read_bytes()
    target = memory(-(-len(through) // PAGE_BYTES) * PAGE_BYTES)
    fd = os.open(place, os.O_RDONLY | os.O_DIRECT)
    past = os.readv(fd, [target]) if through else 0
    os.close(fd)
    assert target[:past] == through
    return through


# What passes it by


def test_large_pages_pass_the_page_cache_by_and_the_tail_does_not(disk, writes):
    store, data = LocalStore(disk), memory(20 * MIB + 8192 + 100)
    create(store, data)
    assert writes == [("direct", 16 * MIB), ("direct", 4 * MIB + 8192), ("cached", 100)]
    assert pages_in_cache(disk / "file") == 1
    assert content(store) == data


def test_pages_behind_a_tail_that_fills_its_page_pass_it_by_again(disk, writes):
    store, pieces = LocalStore(disk), [memory(64 * 1024 + 96), memory(4000), memory(64 * 1024)]
    create(store, *pieces)
    assert [how for how, _ in writes] == ["direct", "cached", "cached", "direct"]
    assert content(store) == b"".join(pieces)


@pytest.mark.parametrize(
    "pieces",
    [
        [memory(64 * 1024 - 1)],
        [memory(128 * 1024, skip=512)],
        [b"x", memory(128 * 1024)],
        [memory(128 * 1024).toreadonly()],
        [b"x" * 128 * 1024],
    ],
    ids=["small", "not on a page of memory", "not on a page of the file", "read-only", "bytes"],
)
def test_all_else_goes_through_the_page_cache(disk, writes, pieces):
    store = LocalStore(disk)
    create(store, *pieces)
    assert {how for how, _ in writes} == {"cached"} and content(store) == b"".join(pieces)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, 40).map(lambda pages: pages * PAGE_BYTES), st.integers(0, 200_000)),
            st.sampled_from([0, 0, 0, 1, 512]),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_the_file_holds_what_was_written_in_order_however_it_lay_in_memory(disk, shapes):
    pieces = [memory(size, skip=skip, seed=nth) for nth, (size, skip, _) in enumerate(shapes)]
    store = LocalStore(disk)
    create(store, *(piece.toreadonly() if shape[2] else piece for piece, shape in zip(pieces, shapes, strict=True)))
    assert content(store) == b"".join(pieces)
    store.delete("file")


def test_a_log_is_added_to_at_its_end_wherever_that_is(disk, writes):
    store, data = LocalStore(disk), memory(128 * 1024)
    store.append("file", b"first")
    store.append("file", data)
    assert {how for how, _ in writes} == {"cached"} and store.read("file") == b"first" + bytes(data)


# Where it is refused


@pytest.fixture
def mount(tmp_path):
    """Mounts a file system, as `mount` does, in a folder that it returns."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mounted(*words):
        done = subprocess.run(["mount", *words, str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"needs to mount a file system: {done.stderr.strip()}")
        return folder

    yield mounted
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def test_a_file_system_without_it_is_written_through_the_page_cache_and_asked_once(mount, writes, caplog):
    caplog.set_level("DEBUG", logger="distckpt")
    store, data = LocalStore(mount("-t", "ramfs", "none")), memory(128 * 1024 + 5)
    for _ in range(2):
        create(store, data, data)
        assert store.read("file") == bytes(data) * 2
        store.delete("file")
    assert {how for how, _ in writes} == {"cached"}
    assert [record.levelname for record in caplog.records] == ["DEBUG"] and store.url in caplog.text


def test_a_disk_that_refuses_the_write_itself_gets_the_same_bytes_through_the_page_cache(disk, writes, monkeypatch):
    monkeypatch.setattr(file_sink, "ALIGNMENT", 1)  # memory that the disk cannot be written from
    store, pieces = LocalStore(disk), [memory(128 * 1024, skip=1), memory(128 * 1024)]
    create(store, *pieces)
    assert [how for how, _ in writes] == ["direct", "cached", "cached"], "nor is it tried again"
    assert content(store) == b"".join(pieces)


def refusing_once(monkeypatch, number, *, of="direct"):
    """`os.write` fails once with that error number, where it is to write that way."""
    real, left = os.write, [number]

    def write(fd, data):
        if left and way(fd) == of:
            raise OSError(left.pop(), os.strerror(number))
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_refusal_in_the_middle_loses_nothing(disk, monkeypatch, number):
    store, data = LocalStore(disk), memory(MIB)
    with store.create("file") as sink:
        sink.write(data)
        refusing_once(monkeypatch, number)
        sink.write(data)
        sink.write(data)
    assert content(store) == bytes(data) * 3


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_other_errors_are_errors_that_name_the_file_and_it_is_gone(disk, monkeypatch, number):
    refusing_once(monkeypatch, number)
    store = LocalStore(disk)
    with pytest.raises(OSError, match="file") as raised:
        create(store, memory(MIB))
    assert raised.value.errno == number and store.list() == []


def test_what_refuses_the_page_cache_is_an_error(disk, monkeypatch):
    refusing_once(monkeypatch, errno.EINVAL, of="cached")
    with pytest.raises(OSError, match="file") as raised:
        create(LocalStore(disk), memory(MIB, skip=1))
    assert raised.value.errno == errno.EINVAL


def test_what_cannot_be_asked_is_an_error_that_names_the_file(disk, monkeypatch):
    def refuse(fd, command, flags=0):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(OSError, match="file") as raised:
        create(LocalStore(disk), memory(MIB))
    assert raised.value.errno == errno.EIO


@pytest.mark.parametrize("first", [512, 4096, 64 * 1024 + 512])
def test_a_short_write_is_gone_on_with(disk, monkeypatch, first):
    real, told = os.write, []

    def write(fd, data):
        told.append(way(fd))
        return real(fd, data[:first] if len(told) == 1 else data)

    monkeypatch.setattr(os, "write", write)
    store, data = LocalStore(disk), memory(MIB)
    create(store, data, data)
    assert content(store) == bytes(data) * 2
    assert told == ["direct", "cached" if first % PAGE_BYTES else "direct", "direct"]


def test_a_write_that_does_nothing_is_an_error(disk, monkeypatch):
    monkeypatch.setattr(os, "write", lambda fd, data: 0)
    with pytest.raises(OSError, match="file"):
        create(LocalStore(disk), memory(MIB))


def test_a_disk_that_gets_full_is_an_error_that_names_the_file_and_it_is_gone(tmp_path, mount):
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("needs mkfs.ext4 on the PATH")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    store = LocalStore(mount("-o", "loop", str(image)))
    with pytest.raises(OSError, match="file") as raised:
        create(store, *[memory(4 * MIB)] * 6)
    assert raised.value.errno == errno.ENOSPC and "file" not in store.list()
    create(store, memory(4 * MIB))


def test_what_passed_the_page_cache_by_can_be_dropped_from_it_and_is_still_there(disk):
    store, data = LocalStore(disk), memory(MIB + 100)
    create(store, data)
    drop_from_cache(disk / "file")
    assert content(store) == data

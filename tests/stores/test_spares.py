"""A file of a deleted checkpoint is written over, unless anybody could see it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from disks import PAGE_BYTES, drop_from_cache, memory, skip_without_direct

from distckpt.stores import spares
from distckpt.stores.local import LocalStore

MIB = 1024 * 1024
SIZE = 300_000

OLD = bytes(memory(SIZE, seed=1))
NEW = bytes(memory(SIZE, seed=2))


@pytest.fixture
def store(scratch, monkeypatch) -> LocalStore:
    monkeypatch.setattr(spares, "LEAST_BYTES", 4096)
    store = LocalStore(scratch, recycles=True)
    save(store, "old", OLD)
    return store


def save(store: LocalStore, folder: str, *pieces, name: str = "file") -> None:
    store.make_folder(folder)
    with store.create(f"{folder}/{name}") as sink:
        for piece in pieces:
            sink.write(piece)


def inode(place: Path) -> int:
    return place.stat().st_ino


def recycled_into(store: LocalStore, *pieces) -> bool:
    """Whether ``pieces`` are written over the file of the folder "old", which is deleted. They are there anyway."""
    old = inode(store.root / "old" / "file")
    store.recycle_folder("old")
    save(store, "new", *pieces)
    assert (store.root / "new" / "file").read_bytes() == b"".join(pieces)
    assert left(store) == ["new"]
    return inode(store.root / "new" / "file") == old


def left(store: LocalStore) -> list[str]:
    """What there is, also what the store does not list."""
    return sorted(path.name for path in store.root.iterdir())


HOLDER = """
import ctypes, hashlib, os, sys
path, how = sys.argv[1:]
fd = os.open(path, os.O_RDWR if how == "open to write" else os.O_RDONLY)
size = os.fstat(fd).st_size
if how == "mapped":
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    at = libc.mmap(None, size, 1, 1, fd, 0)
    os.close(fd)
print("holds it", flush=True)
sys.stdin.readline()
print(hashlib.sha256(ctypes.string_at(at, size) if how == "mapped" else os.pread(fd, size, 0)).hexdigest())
"""


@contextmanager
def held(place: Path, how: str) -> Iterator[Callable[[], str]]:
    """Another process has the file open or mapped, until it is asked for the hash of what it sees there."""
    words = [sys.executable, "-c", HOLDER, str(place), how]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "holds it\n"
        yield lambda: holder.communicate("\n", timeout=20)[0].strip()
    finally:
        holder.kill()
        holder.communicate()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Written over


@pytest.mark.parametrize("recycles", [True, False])
def test_a_file_is_written_over_that_of_its_name_in_a_deleted_folder_if_that_was_asked_for(store, recycles):
    assert recycled_into(LocalStore(store.root, recycles=recycles), NEW) == recycles


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE + 1, SIZE - PAGE_BYTES, 2 * SIZE])
def test_it_may_be_smaller_or_larger_and_nothing_of_the_old_stands_behind_its_end(store, size):
    assert recycled_into(store, (NEW * 2)[:size])


def test_past_the_page_cache_too(tmp_path, monkeypatch):
    skip_without_direct(tmp_path)
    if not spares.is_local(tmp_path):
        pytest.skip(f"needs a folder on a disk of this machine's own: {tmp_path}")
    monkeypatch.setattr(spares, "LEAST_BYTES", MIB)
    store, data = LocalStore(tmp_path, recycles=True), memory(2 * MIB + 100, seed=3)
    (tmp_path / "probe").unlink(missing_ok=True)
    save(store, "old", memory(3 * MIB))
    assert (tmp_path / "old" / "file").read_bytes() == bytes(memory(3 * MIB))  # the page cache holds it
    assert recycled_into(store, data)
    drop_from_cache(tmp_path / "new" / "file")
    assert (tmp_path / "new" / "file").read_bytes() == data


@pytest.mark.parametrize("recycles", [True, False])
def test_what_one_process_deleted_another_writes_over_if_that_was_asked_for(store, recycles):
    with store.create("old/rank-1") as sink:
        sink.write(OLD)
    old = inode(store.root / "old" / "rank-1")
    store.recycle_folder("old")
    other = LocalStore(store.root, recycles=recycles)
    save(other, "new", NEW, name="rank-1")
    assert (store.root / "new" / "rank-1").read_bytes() == NEW
    assert (inode(store.root / "new" / "rank-1") == old) == recycles
    save(store, "newer", NEW)  # what is its own is there as before
    store.drop_spares()
    assert left(store) == ["new", "newer"]


def test_each_file_is_written_over_the_one_of_its_own_name_once(store):
    for name in ("model", "optimizer"):
        with store.create(f"old/{name}") as sink:
            sink.write(OLD)
    before = {name: inode(store.root / "old" / name) for name in ("model", "optimizer")}
    store.recycle_folder("old")
    for folder in ("first", "second"):
        store.make_folder(folder)
        for name in ("optimizer", "model", "other"):
            with store.create(f"{folder}/{name}") as sink:
                sink.write(NEW)
    assert {name: inode(store.root / "first" / name) for name in before} == before
    assert not before.items() & {name: inode(store.root / "second" / name) for name in before}.items()
    assert inode(store.root / "first" / "other") not in before.values()


def test_a_name_that_is_taken_stays_taken_and_the_spare_is_for_the_next(store):
    old = inode(store.root / "old" / "file")
    save(store, "taken", b"first")
    store.recycle_folder("old")
    with pytest.raises(FileExistsError):
        save(store, "taken", NEW)
    with pytest.raises(FileExistsError), store.create("taken/file"):
        pass
    assert store.read("taken/file") == b"first"
    save(store, "new", NEW)
    assert inode(store.root / "new" / "file") == old


def test_its_end_is_where_the_new_bytes_end_before_they_are_durable(store, monkeypatch):
    calls, sizes, real = [], [], os.fsync

    def fsync(fd):
        calls.append(Path(f"/proc/self/fd/{fd}").readlink())
        sizes.append(os.fstat(fd).st_size)
        real(fd)

    store.recycle_folder("old")
    monkeypatch.setattr(os, "fsync", fsync)
    save(store, "new", b"short")
    assert calls == [store.root / "new" / "file"] and sizes == [5]


def test_whoever_opens_it_afterwards_is_not_kept_waiting(store):
    store.recycle_folder("old")
    store.make_folder("new")
    with store.create("new/file"):
        os.close(os.open(store.root / "new" / "file", os.O_RDONLY | os.O_NONBLOCK))


# Unless anybody could see it


@pytest.mark.parametrize("how", ["open", "open to write", "mapped"])
def test_what_another_process_holds_keeps_its_bytes(store, how):
    with held(store.root / "old" / "file", how) as seen:
        assert not recycled_into(store, NEW)
        assert seen() == digest(OLD)


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_what_another_process_has_let_go_of_by_then_is_written_over(store, how):
    old = inode(store.root / "old" / "file")
    with held(store.root / "old" / "file", how) as seen:
        store.recycle_folder("old")
        seen()
    save(store, "new", NEW)
    assert inode(store.root / "new" / "file") == old


def test_what_another_process_has_found_since_keeps_its_bytes(store):
    store.recycle_folder("old")
    (spare,) = store.root.glob(".spare-file-*")
    with held(spare, "open") as seen:
        save(store, "new", NEW)
        assert seen() == digest(OLD)
    assert left(store) == ["new"]


def test_what_this_process_itself_holds_keeps_its_bytes(store):
    with store.open("old/file") as source:
        assert not recycled_into(store, NEW)
        target = bytearray(SIZE)
        source.read_into(target)
    assert target == OLD


@pytest.mark.parametrize("moment", ["before it is deleted", "since"])
def test_what_has_another_name_keeps_its_bytes(store, moment):
    linked = store.root.parent / f"{store.root.name}-linked"
    place = store.root / "old" / "file"
    try:
        if moment == "since":
            store.recycle_folder("old")
            (place,) = store.root.glob(".spare-file-*")
        os.link(place, linked)
        store.recycle_folder("old")
        save(store, "new", NEW)
        assert linked.read_bytes() == OLD and not linked.samefile(store.root / "new" / "file")
        assert left(store) == ["new"]
    finally:
        linked.unlink()


def as_a_link(place: Path) -> None:
    (place.parent / "deeper").mkdir()
    place.rename(place.parent / "deeper" / "file")
    place.symlink_to("deeper/file")


def in_a_folder(place: Path) -> None:
    place.rename(place.parent.parent / "outside")
    place.mkdir()
    (place.parent.parent / "outside").rename(place / "file")


def as_a_pipe(place: Path) -> None:
    place.unlink()
    os.mkfifo(place)


def small(place: Path) -> None:
    os.truncate(place, 4095)


UNFIT = [as_a_link, in_a_folder, as_a_pipe, small]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("change", UNFIT)
def test_what_is_no_large_file_is_deleted_as_ever(store, change):
    change(store.root / "old" / "file")
    store.recycle_folder("old")
    assert left(store) == []
    save(store, "new", NEW)
    assert store.read("new/file") == NEW


@pytest.mark.parametrize("where", ["to a folder", "to nothing"])
def test_where_a_link_leads_nothing_is_taken(store, where):
    (store.root / "link").symlink_to("old" if where == "to a folder" else "nowhere")
    store.recycle_folder("link")
    assert left(store) == ["old"] and store.read("old/file") == OLD


def for_the_owner_alone(place: Path) -> None:
    place.chmod(0o600)


def of_another_group(place: Path) -> None:
    os.chown(place, -1, 65534)


def of_another_user(place: Path) -> None:
    os.chown(place, 65534, -1)


def with_an_attribute(place: Path) -> None:
    try:
        os.setxattr(place, "user.whose", b"mine")
    except OSError as error:
        pytest.skip(f"needs a file system with attributes: {error}")


@pytest.mark.parametrize("change", [for_the_owner_alone, of_another_group, of_another_user, with_an_attribute])
def test_a_file_that_others_may_use_otherwise_than_a_new_one_is_not_written_over(store, change):
    if change in (of_another_group, of_another_user) and os.getuid() != 0:
        pytest.skip("needs to give files away")
    change(store.root / "old" / "file")
    assert not recycled_into(store, NEW)
    assert (store.root / "new" / "file").stat().st_mode == (store.root / "new").stat().st_mode & 0o666 | 0o100000


def test_a_umask_that_has_changed_since_holds(store):
    mask = os.umask(0o077)
    try:
        assert not recycled_into(store, NEW)
    finally:
        os.umask(mask)
    assert (store.root / "new" / "file").stat().st_mode & 0o777 == 0o600


# Where the kernel does not know, or does not tell


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EINVAL, errno.EACCES, errno.ENOLCK, errno.ENOSYS])
def test_where_there_are_no_leases_nothing_is_written_over(store, monkeypatch, number):
    real = fcntl.fcntl

    def refusing(fd, command, *words):
        if command == fcntl.F_SETLEASE:
            raise OSError(number, os.strerror(number))
        return real(fd, command, *words)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    assert not recycled_into(store, NEW)


def test_on_overlayfs_which_forgets_who_has_mapped_a_file_nothing_is_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(spares, "LEAST_BYTES", 4096)
    for name in ("lower", "upper", "work", "mounted"):
        (tmp_path / name).mkdir()
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mounted = str(tmp_path / "mounted")
    done = subprocess.run(["mount", "-t", "overlay", "none", "-o", layers, mounted], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs to mount a file system: {done.stderr.strip()}")
    try:
        store = LocalStore(mounted, recycles=True)
        save(store, "old", OLD)
        with held(store.root / "old" / "file", "mapped") as seen:
            assert not recycled_into(store, NEW)
            assert seen() == digest(OLD)
    finally:
        subprocess.run(["umount", "-l", mounted], check=True)


def asked_while_somebody_opens_it(place: str) -> None:
    """In a process of its own, as it may end."""
    store, real = LocalStore(place, recycles=True), fcntl.fcntl
    spares.LEAST_BYTES = 4096
    save(store, "old", OLD)
    store.recycle_folder("old")

    def opened(fd, command, *words):
        told = real(fd, command, *words)
        if words == (fcntl.F_WRLCK,):
            opener = "import os, sys; os.open(sys.argv[1], os.O_RDONLY | os.O_NONBLOCK)"
            path = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
            done = subprocess.run([sys.executable, "-c", opener, path], capture_output=True, text=True)
            assert "BlockingIOError" in done.stderr
        return told

    fcntl.fcntl = opened
    save(store, "new", NEW)
    print("goes on")


def test_whoever_opens_a_file_just_when_the_kernel_is_asked_does_not_end_the_process(scratch):
    code = f"import test_spares; test_spares.asked_while_somebody_opens_it({str(scratch)!r})"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=60)
    assert done.returncode != -signal.SIGIO and done.stdout == "goes on\n", done.stderr


# When something is in the way


def test_without_the_spare_a_new_file_is_written(store):
    store.recycle_folder("old")
    (spare,) = store.root.glob(".spare-file-*")
    spare.unlink()
    save(store, "new", NEW)
    assert store.read("new/file") == NEW and left(store) == ["new"]


def test_a_spare_that_cannot_be_moved_is_gone_and_a_new_file_written(store, monkeypatch):
    def rename(*args, **named):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store.recycle_folder("old")
    monkeypatch.setattr(os, "rename", rename)
    save(store, "new", NEW)
    assert store.read("new/file") == NEW and left(store) == ["new"]


def test_a_folder_whose_files_cannot_be_moved_is_deleted_as_ever(store, monkeypatch):
    def rename(*args, **named):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "rename", rename)
    store.recycle_folder("old")
    assert left(store) == []
    save(store, "new", NEW)
    assert store.read("new/file") == NEW


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_write_that_fails_in_the_middle_leaves_nothing_and_no_spare_that_the_disk_is_full_of(
    store, monkeypatch, number
):
    with store.create("old/other") as sink:
        sink.write(OLD)
    store.recycle_folder("old")
    store.make_folder("new")
    real = os.write
    with pytest.raises(OSError, match="new/file") as raised, store.create("new/file") as sink:
        sink.write(NEW[:1000])
        monkeypatch.setattr(os, "write", failing(number))
        sink.write(NEW[1000:])
    monkeypatch.setattr(os, "write", real)
    assert raised.value.errno == number and left(store) == ["new"] and store.list("new") == []
    with store.create("new/file") as sink:
        sink.write(NEW)
    assert store.read("new/file") == NEW


def failing(number: int):
    def call(*args):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(("module", "name"), [(os, "listxattr"), (os.path, "samestat")])
def test_a_folder_that_a_newer_attempt_has_made_meanwhile_keeps_its_file(store, monkeypatch, module, name):
    store.recycle_folder("old")
    store.make_folder("new")
    real = getattr(module, name)

    def overtaken(*args):
        told = real(*args)
        monkeypatch.setattr(module, name, real)
        newer = LocalStore(store.root)
        newer.move("new", "trash")
        save(newer, "new", b"of the newer attempt")
        return told

    monkeypatch.setattr(module, name, overtaken)
    with store.create("new/file") as sink:
        sink.write(NEW)
    assert store.read("new/file") == b"of the newer attempt" and store.read("trash/file") == NEW


# What is kept


def test_of_what_is_kept_only_others_see_a_name_until_it_is_dropped(store):
    store.recycle_folder("old")
    (name,) = LocalStore(store.root).list()
    assert name.startswith(".spare-file-") and store.list() == []
    store.drop_spares()
    store.drop_spares()
    assert left(store) == []


def test_only_the_files_of_the_last_folder_are_kept(store):
    save(store, "older", OLD, name="other")
    save(store, "newest", NEW)
    newest = inode(store.root / "newest" / "file")
    for folder in ("older", "old", "newest"):
        store.recycle_folder(folder)
    (spare,) = store.root.iterdir()
    assert inode(spare) == newest


def test_a_folder_that_is_not_there_leaves_nothing(store):
    shutil.rmtree(store.root / "old")
    store.recycle_folder("old")
    assert left(store) == []

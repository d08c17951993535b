"""What a directory adds to the contract of a store: which calls make it durable, and what lies there to trip over."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import signal
import stat
import tempfile
from pathlib import Path

import pytest

from distckpt.stores.local import LocalStore


@pytest.fixture
def store(tmp_path) -> LocalStore:
    return LocalStore(tmp_path / "run")


@pytest.fixture(autouse=True)
def made(store):
    store.root.mkdir()


class Calls:
    """The calls that change or settle something, by the names they were given; they are made all the same."""

    def __init__(self, monkeypatch):
        self.told: list[str] = []
        for name in ("fsync", "rename", "link", "unlink", "mkdir"):
            monkeypatch.setattr(os, name, self.watched(name, getattr(os, name)))

    def watched(self, name, real):
        def call(first, *args, **named):
            path = Path(f"/proc/self/fd/{first}").readlink() if isinstance(first, int) else os.fspath(first)
            targets = [os.fspath(arg) for arg in args if isinstance(arg, (str, Path))]
            self.told.append(" ".join([name, *map(short, [path, *targets])]))
            return real(first, *args, **named)

        return call


def short(path: str) -> str:
    name = Path(path).name
    return "draft" if name.startswith(".draft-") else name


@pytest.fixture
def calls(store, monkeypatch) -> list[str]:
    return Calls(monkeypatch).told


def failing(monkeypatch, name, number, *, only=lambda fd: True):
    """``os.<name>`` fails with that error number, for the file descriptors that ``only`` is true of."""
    real = getattr(os, name)

    def call(fd, *args, **named):
        if only(fd):
            raise OSError(number, os.strerror(number))
        return real(fd, *args, **named)

    monkeypatch.setattr(os, name, call)


def is_folder(fd: int) -> bool:
    return stat.S_ISDIR(os.fstat(fd).st_mode)


def create(store, path, *pieces):
    with store.create(path) as sink:
        for piece in pieces:
            sink.write(piece)


# The root


def test_the_root_is_made_with_its_parents_and_each_name_is_durable(tmp_path, calls):
    LocalStore(tmp_path / "a" / "b" / "c").make_root()
    assert (tmp_path / "a" / "b" / "c").is_dir()
    made = [call for call in calls if call.startswith("fsync")]
    assert made[-3:] == [f"fsync {tmp_path.name}", "fsync a", "fsync b"]


def test_a_root_that_is_there_is_taken_as_it_is(store):
    create(store, "file", b"")
    store.make_root()
    assert store.list() == ["file"]


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_a_root_where_a_file_lies_is_refused_by_name(store, below):
    create(store, "file", b"precious")
    with pytest.raises(NotADirectoryError, match="file"):
        LocalStore(store.root / "file" / below).make_root()
    assert store.read("file") == b"precious"


def refused_root(place: str) -> str:
    os.setuid(65534)
    try:
        LocalStore(place).make_root()
    except PermissionError as error:
        return str(error)
    return "nothing"


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become another user")
@pytest.mark.parametrize("below", ["", "new"])
def test_a_root_that_cannot_be_written_is_refused_by_name(below):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            told = pool.apply_async(refused_root, [str(Path(folder) / below)]).get(20)
        assert folder in told


# Durability


def test_put_makes_the_bytes_durable_before_the_name_and_the_name_before_it_returns(store, calls):
    store.put("file", b"bytes")
    assert calls == ["fsync draft", "rename draft file", "unlink draft", "fsync run"]


def test_publish_makes_the_bytes_durable_before_the_name_and_the_name_before_it_returns(store, calls):
    store.publish("file", b"bytes")
    assert calls == ["fsync draft", "link draft file", "unlink draft", "fsync run"]


def test_a_link_is_durable_when_it_is_made(store, calls):
    create(store, "file", b"bytes")
    calls.clear()
    store.link("file", "second")
    assert calls[:2] == ["link file draft", "rename draft second"] and calls[-1] == "fsync run"


def test_a_name_in_a_folder_is_durable_in_that_folder(store, calls):
    store.make_folder("folder")
    calls.clear()
    store.put("folder/file", b"")
    assert calls[0] == "fsync draft" and calls[-1] == "fsync folder"


def test_created_bytes_are_durable_at_the_end(store, calls):
    create(store, "file", b"bytes")
    assert calls == ["fsync file"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINVAL])
def test_a_file_whose_bytes_may_be_lost_is_lost(store, monkeypatch, number):
    failing(monkeypatch, "fsync", number)
    with pytest.raises(OSError, match="file") as raised:
        create(store, "file", b"bytes")
    assert raised.value.errno == number and store.list() == []


def test_a_file_that_cannot_be_closed_is_lost_and_closed_once(store, monkeypatch):
    closed = []
    real = os.close

    def close(fd):
        closed.append(fd)
        real(fd)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "close", close)
    with pytest.raises(OSError, match="file"):
        create(store, "file", b"bytes")
    monkeypatch.undo()
    assert len(closed) == 1 and store.list() == []


@pytest.mark.parametrize("method", ["put", "publish"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_what_failed_before_it_had_its_name_leaves_nothing(store, monkeypatch, method, number):
    failing(monkeypatch, "fsync", number)
    with pytest.raises(OSError, match="file"):
        getattr(store, method)("file", b"bytes")
    assert store.list() == []


@pytest.mark.parametrize("method", ["put", "publish", "link", "settle"])
def test_a_name_that_may_not_be_durable_is_an_error_that_names_the_folder(store, monkeypatch, method):
    create(store, "old", b"")
    failing(monkeypatch, "fsync", errno.EIO, only=is_folder)
    with pytest.raises(OSError, match="run"):
        match method:
            case "settle":
                store.settle()
            case "link":
                store.link("old", "file")
            case _:
                getattr(store, method)("file", b"bytes")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_settle_names_gets_one_warning_and_is_used(store, monkeypatch, caplog, number):
    failing(monkeypatch, "fsync", number, only=is_folder)
    for _ in range(3):
        store.put("file", b"bytes")
    assert store.read("file") == b"bytes"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "cannot make names durable" in caplog.text


# Calls that do less than they were asked, or say so when they did it


def test_short_writes_and_reads_are_invisible(store, monkeypatch):
    write, preadv = os.write, os.preadv
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:2]], offset))
    create(store, "file", b"0123456789", b"", b"abcdefg")
    assert store.read("file") == b"0123456789abcdefg"


def test_a_write_that_does_nothing_is_an_error_and_no_endless_loop(store, monkeypatch):
    monkeypatch.setattr(os, "write", lambda fd, data: 0)
    with pytest.raises(OSError, match="file"):
        create(store, "file", b"bytes")
    assert store.list() == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ESTALE])
def test_errors_of_writing_and_reading_name_the_file(store, monkeypatch, number):
    create(store, "file", b"bytes")
    failing(monkeypatch, "write", number)
    with pytest.raises(OSError, match="other") as written:
        create(store, "other", b"bytes")
    failing(monkeypatch, "preadv", number)
    with pytest.raises(OSError, match="file") as read:
        store.read("file")
    assert written.value.errno == read.value.errno == number


def test_a_file_that_shrinks_while_it_is_read_is_an_error(store):
    create(store, "file", b"0123456789")
    with store.open("file") as source:
        os.truncate(store.root / "file", 4)
        with pytest.raises(EOFError, match="6 bytes too early"):
            source.read_into(bytearray(10))


def test_a_link_whose_first_reply_was_lost_is_no_loss(store, monkeypatch):
    real = os.link

    def twice(source, target, **named):
        real(source, target, **named)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), source, None, target)

    monkeypatch.setattr(os, "link", twice)
    store.publish("file", b"bytes")
    assert store.read("file") == b"bytes" and store.list() == ["file"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_where_there_are_no_hard_links_names_are_still_taken_once_and_links_are_copies(store, monkeypatch, number):
    failing(monkeypatch, "link", number)
    store.publish("file", b"first")
    with pytest.raises(FileExistsError):
        store.publish("file", b"second")
    store.link("file", "copy")
    assert store.read("file") == store.read("copy") == b"first"
    assert store.list() == ["copy", "file"]


def test_a_link_that_fails_otherwise_fails(store, monkeypatch):
    failing(monkeypatch, "link", errno.EIO)
    with pytest.raises(OSError) as raised:
        store.publish("file", b"first")
    assert raised.value.errno == errno.EIO and store.list() == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_where_there_are_no_locks_nobody_is_kept_out(store, monkeypatch, number):
    def lockf(fd, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert store.hold("lock")


# Locks and processes


def test_a_forked_worker_does_not_hold_on_a_lock_that_its_parent_let_go(store):
    reader, writer = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")

    def trainer():
        store.hold("lock")
        worker = context.Process(target=signal.pause)
        worker.start()
        writer.send(worker.pid)
        os.kill(os.getpid(), signal.SIGKILL)

    trainer = context.Process(target=trainer)
    trainer.start()
    worker = reader.recv()
    os.waitpid(trainer.pid, 0)
    try:
        assert store.hold("lock")
    finally:
        os.kill(worker, signal.SIGKILL)


# What lies in the way


def fifo(place: Path) -> None:
    os.mkfifo(place)


def folder(place: Path) -> None:
    place.mkdir()


def link_to_a_file(place: Path) -> None:
    target = place.parent.parent / "outside"
    target.write_bytes(b"outside")
    place.symlink_to(target)


def link_to_nothing(place: Path) -> None:
    place.symlink_to(place.parent.parent / "nowhere")


IN_THE_WAY = [fifo, folder, link_to_a_file, link_to_nothing]


@pytest.mark.timeout(10)
@pytest.mark.parametrize("obstacle", IN_THE_WAY)
def test_what_is_no_file_is_neither_read_nor_waited_for(store, obstacle):
    obstacle(store.root / "file")
    with pytest.raises(OSError, match="file"):
        store.read("file")


@pytest.mark.timeout(10)
@pytest.mark.parametrize("obstacle", IN_THE_WAY)
@pytest.mark.parametrize("method", ["append", "create", "publish"])
def test_what_is_no_file_is_neither_written_to_nor_waited_for(store, method, obstacle):
    obstacle(store.root / "file")
    with pytest.raises(OSError, match="file"):
        create(store, "file", b"ours") if method == "create" else getattr(store, method)("file", b"ours")
    outside = store.root.parent / "outside"
    assert not outside.exists() or outside.read_bytes() == b"outside"
    assert not (store.root.parent / "nowhere").exists()


def test_nothing_is_told_to_whoever_reads_a_pipe_in_place_of_a_log(store):
    fifo(store.root / "log")
    reader = os.open(store.root / "log", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="not a regular file"):
        store.append("log", b"ours")
    assert os.read(reader, 10) == b""
    os.close(reader)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("obstacle", [fifo, link_to_a_file, link_to_nothing])
def test_put_replaces_what_is_no_file_and_not_what_it_is_a_link_to(store, obstacle):
    obstacle(store.root / "file")
    store.put("file", b"ours")
    assert store.read("file") == b"ours"
    assert {path.name for path in store.root.parent.iterdir()} <= {"run", "outside"}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("obstacle", [link_to_a_file, link_to_nothing])
def test_a_lock_is_not_made_where_a_link_leads(store, obstacle):
    obstacle(store.root / "lock")
    with pytest.raises(OSError, match="lock"):
        store.hold("lock")
    assert not (store.root.parent / "nowhere").exists()


def test_deleting_a_link_to_a_folder_deletes_the_link(store):
    outside = store.root.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    (store.root / "folder").symlink_to(outside)
    store.delete_folder("folder")
    assert store.list() == [] and (outside / "file").read_text() == "precious"


def test_deleting_a_link_to_nothing_deletes_the_link(store):
    (store.root / "folder").symlink_to("nowhere")
    store.delete_folder("folder")
    assert store.list() == []


def test_links_in_a_deleted_folder_are_not_followed(store):
    outside = store.root.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    store.make_folder("folder")
    (store.root / "folder" / "link").symlink_to(outside)
    store.delete_folder("folder")
    assert store.list() == [] and (outside / "file").read_text() == "precious"


# A writer that is late


def test_a_failed_writer_removes_its_own_file_and_not_the_one_that_has_its_name_now(store):
    store.make_folder("folder")
    with pytest.raises(KeyError), store.create("folder/file") as sink:
        sink.write(b"of the old attempt")
        store.move("folder", "trash")
        store.make_folder("folder")
        create(store, "folder/file", b"of the new attempt")
        raise KeyError
    assert store.read("folder/file") == b"of the new attempt"


# Labels


def test_a_label_is_a_relative_link_so_that_the_directory_can_be_moved(store):
    store.make_folder("step-00000001")
    store.point("latest", "step-00000001")
    assert (store.root / "latest").readlink() == Path("step-00000001")
    store.point("latest", "step-00000002")
    assert (store.root / "latest").readlink() == Path("step-00000002")


def test_free_space_is_that_of_the_file_system(store):
    status = os.statvfs(store.root)
    assert 0 < store.free_bytes() <= status.f_blocks * status.f_frsize

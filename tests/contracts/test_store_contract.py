"""What every store promises: these tests run on each that is found in distckpt/stores."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from distckpt import strict_json

LARGE = os.urandom(16 * 1024 * 1024 + 5)

OUTSIDE = ["../outside", "a/../../outside", "/outside", "..", "a\0b"]


def create(store, path, *pieces):
    with store.create(path) as sink:
        for piece in pieces:
            sink.write(piece)


def content(store, path) -> bytes:
    with store.open(path) as source:
        data = bytearray(source.size_bytes)
        source.read_into(data)
        return bytes(data)


def race(count, work):
    """How many of so many threads that do ``work(number)`` at one moment succeed, where the others find it done."""
    start = threading.Barrier(count)

    def try_it(number):
        start.wait(10)
        with suppress(FileExistsError):
            work(number)
            return True
        return False

    with ThreadPoolExecutor(count) as threads:
        return sum(threads.map(try_it, range(count)))


def in_another_process(work):
    """What ``work()`` returns in a process forked from this one."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: writer.send(work()), daemon=True)
    process.start()
    assert reader.poll(20), "the other process hangs"
    told = reader.recv()
    process.join(20)
    return told


# Listing


def test_an_empty_store_has_no_names(store):
    assert store.list() == []


def test_names_are_listed_sorted_and_those_in_folders_apart(store):
    store.make_folder("b")
    create(store, "b/inside", b"")
    for name in ("c", "a", "a.x"):
        store.put(name, b"")
    assert store.list() == ["a", "a.x", "b", "c"]
    assert store.list("b") == ["inside"]


def test_a_folder_that_is_not_there_has_no_names(store):
    assert store.list("nowhere") == []


def test_files_and_folders_exist_and_what_was_never_made_does_not(store):
    store.make_folder("folder")
    store.put("file", b"")
    assert store.exists("folder") and store.exists("file")
    assert not store.exists("other") and not store.exists("folder/file")


# Reading


def test_a_small_file_is_read_whole(store):
    store.put("file", b"bytes\0\xff")
    assert store.read("file") == b"bytes\0\xff"


def test_a_file_too_large_for_json_of_ours_is_not_read(store, monkeypatch):
    store.put("file", b"123456789")
    monkeypatch.setattr(strict_json, "LIMIT_BYTES", 8)
    with pytest.raises(OSError, match="file"):
        store.read("file")


def test_a_file_is_read_from_its_start_to_its_end_in_pieces_of_any_size(store):
    create(store, "file", b"0123456789")
    with store.open("file") as source:
        assert source.size_bytes == 10
        pieces = [bytearray(size) for size in (1, 0, 7, 2)]
        for piece in pieces:
            source.read_into(piece)
    assert b"".join(pieces) == b"0123456789"


def test_reading_beyond_the_end_is_an_error_and_no_short_answer(store):
    create(store, "file", b"0123")
    with store.open("file") as source, pytest.raises(EOFError, match="file"):
        source.read_into(bytearray(5))


@pytest.mark.parametrize("method", ["read", "open"])
def test_what_is_not_there_cannot_be_read(store, method):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        content(store, "nowhere") if method == "open" else store.read("nowhere")


@pytest.mark.parametrize("method", ["read", "open"])
def test_a_folder_cannot_be_read_as_a_file(store, method):
    store.make_folder("folder")
    with pytest.raises(OSError, match="folder"):
        content(store, "folder") if method == "open" else store.read("folder")


# Writing


def test_a_file_holds_all_that_was_written_in_order(store):
    create(store, "file", b"ab", bytearray(b"cd"), memoryview(b"-ef-")[1:3], b"")
    assert content(store, "file") == b"abcdef"


def test_a_large_file_is_written_and_read_whole(store):
    create(store, "file", LARGE)
    assert content(store, "file") == LARGE


def test_a_file_with_nothing_in_it_can_be_written(store):
    create(store, "file")
    assert content(store, "file") == b""


def test_a_file_that_is_there_is_not_written_again(store):
    create(store, "file", b"first")
    with pytest.raises(FileExistsError):
        create(store, "file", b"second")
    assert content(store, "file") == b"first"


def test_a_file_whose_writing_failed_is_not_there(store):
    with pytest.raises(KeyError), store.create("file") as sink:
        sink.write(b"half")
        raise KeyError
    assert store.list() == []


def test_a_file_cannot_be_written_into_a_folder_that_is_not_there(store):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        create(store, "nowhere/file", b"")


def test_put_replaces_what_was_there_and_leaves_nothing_else(store):
    store.put("file", b"first")
    store.put("file", b"second")
    assert store.read("file") == b"second" and store.list() == ["file"]


def test_a_reader_beside_put_sees_the_old_bytes_or_the_new_ones(store):
    versions = [bytes([digit]) * 70_000 for digit in range(2)]
    store.put("file", versions[0])
    stop = threading.Event()

    def rewrite():
        for turn in range(100):
            store.put("file", versions[turn % 2])
        stop.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    seen = set()
    while not stop.is_set():
        seen.add(store.read("file"))
    writer.join()
    assert seen <= set(versions)


def test_publish_takes_a_name_once(store):
    store.publish("file", b"first")
    with pytest.raises(FileExistsError):
        store.publish("file", b"second")
    assert store.read("file") == b"first" and store.list() == ["file"]


def test_of_those_who_publish_one_name_at_one_moment_one_wins(store):
    assert race(8, lambda number: store.publish("file", b"%d" % number * 1000)) == 1
    assert len(set(store.read("file"))) == 1 and store.list() == ["file"]


def test_a_log_grows_at_its_end(store):
    store.append("log", b"one\n")
    store.append("log", b"two\n")
    assert store.read("log") == b"one\ntwo\n"


# Folders


def test_a_new_folder_is_empty_and_its_name_is_taken(store):
    store.make_folder("folder")
    assert store.list("folder") == []
    with pytest.raises(FileExistsError):
        store.make_folder("folder")


def test_of_those_who_make_one_folder_at_one_moment_one_wins(store):
    assert race(8, lambda number: store.make_folder("folder")) == 1


def test_names_are_settled_in_the_root_and_in_a_folder(store):
    store.make_folder("folder")
    create(store, "folder/file", b"")
    store.settle("folder")
    store.settle()
    with pytest.raises(OSError, match="nowhere"):
        store.settle("nowhere")


# Other names


def test_a_file_moves_and_replaces_a_file(store):
    store.put("old", b"moved")
    store.put("new", b"replaced")
    store.move("old", "new")
    assert store.list() == ["new"] and store.read("new") == b"moved"


def test_a_folder_moves_with_what_is_in_it(store):
    store.make_folder("old")
    create(store, "old/file", b"inside")
    store.move("old", "new")
    assert store.list() == ["new"] and store.read("new/file") == b"inside"


def test_what_is_not_there_cannot_move(store):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        store.move("nowhere", "new")


def test_a_link_is_the_same_file_and_outlives_the_first_name(store):
    store.put("first", b"bytes")
    store.link("first", "second")
    assert store.list() == ["first", "second"]
    store.delete("first")
    assert store.read("second") == b"bytes" and not store.exists("first")


def test_a_link_replaces_what_had_its_name_and_not_what_that_was_a_link_to(store):
    store.put("older", b"older")
    store.link("older", "best")
    store.put("newer", b"newer")
    store.link("newer", "best")
    store.link("newer", "best")
    assert store.read("best") == b"newer" and store.read("older") == b"older"
    assert store.list() == ["best", "newer", "older"]


def test_what_is_not_there_cannot_be_linked(store):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        store.link("nowhere", "new")
    assert store.list() == []


def test_a_label_points_where_it_was_pointed_last_until_it_is_removed(store):
    for name in ("one", "two"):
        store.make_folder(name)
        store.point("latest", name)
        store.point("latest", name)
    store.point("latest", None)
    store.point("latest", None)
    assert store.list() == ["one", "two"]


def test_a_label_never_replaces_a_file(store):
    store.put("latest", b"precious")
    with pytest.raises(FileExistsError):
        store.point("latest", "one")
    store.point("latest", None)
    assert store.read("latest") == b"precious"


# Deleting


def test_a_deleted_file_is_gone_and_it_is_fine_if_it_was_not_there(store):
    store.put("file", b"")
    store.delete("file")
    store.delete("file")
    assert store.list() == []


def test_a_deleted_folder_is_gone_with_all_in_it_and_it_is_fine_if_it_was_not_there(store):
    store.make_folder("folder")
    create(store, "folder/file", b"")
    store.delete_folder("folder")
    store.delete_folder("folder")
    assert store.list() == []


def test_a_recycled_folder_is_gone_and_what_is_written_next_is_new(store):
    store.make_folder("folder")
    create(store, "folder/file", LARGE)
    store.recycle_folder("folder")
    store.recycle_folder("folder")
    assert store.list() == []
    store.make_folder("next")
    create(store, "next/file", b"short")
    assert content(store, "next/file") == b"short"
    store.drop_spares()
    store.drop_spares()
    assert store.list() == ["next"] and store.list("next") == ["file"]


# The lock


def test_a_lock_is_held_against_other_processes_until_it_is_released(store, make_store, tmp_path):
    assert store.hold("lock") and store.hold("lock")
    assert in_another_process(lambda: make_store(tmp_path).hold("lock")) is False
    store.release("lock")
    store.release("lock")
    assert in_another_process(lambda: make_store(tmp_path).hold("lock")) is True


def test_a_lock_ends_with_the_process_that_held_it(store):
    assert in_another_process(lambda: store.hold("lock")) is True
    assert store.hold("lock")
    store.release("lock")


# The rest


def test_free_space_is_a_number_or_unknown(store):
    free = store.free_bytes()
    assert free is None or free > 0


@pytest.mark.parametrize("path", OUTSIDE, ids=ascii)
@pytest.mark.parametrize(
    "method",
    [
        *("list", "read", "exists", "delete", "delete_folder", "recycle_folder", "make_folder", "settle", "hold"),
        *("put", "publish", "append", "move from", "move to", "link from", "link to", "point", "open", "create"),
    ],
)
def test_no_path_leaves_the_store(store, method, path):
    store.put("file", b"")
    with pytest.raises(ValueError, match="leaves"):
        match method.split():
            case ["put" | "publish" | "append"]:
                getattr(store, method)(path, b"")
            case [verb, "from"]:
                getattr(store, verb)(path, "new")
            case [verb, "to"]:
                getattr(store, verb)("file", path)
            case ["point"]:
                store.point(path, "file")
            case ["open" | "create"]:
                with getattr(store, method)(path):
                    pass
            case _:
                getattr(store, method)(path)
    assert store.list() == ["file"]

"""Copies of a run's files at another place: what is asked of it, and what is known after an error or a restart."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distckpt import DistckptError
from distckpt.best import BestBy, Metric
from distckpt.contest import Contest
from distckpt.copies import Copies
from distckpt.manifest import Record, digest
from distckpt.mirror import Mirror
from distckpt.progress import Progress
from distckpt.stores.local import LocalStore
from distckpt.writer import Writer

ACC = Metric("acc", "greater")


class Shelf:
    """Another place, in memory. It remembers what was asked of it, and fails at the ``fail_at``-th call."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.fail_at: int | None = None

    def _called(self, call: str) -> None:
        is_next = len(self.calls) == self.fail_at
        self.calls.append(call)
        if is_next:
            raise OSError(errno.EIO, "the network is gone")

    def upload(self, source: Path, path: str) -> None:
        self._called(f"upload {path}")
        self.held[path] = source.read_bytes()

    def put(self, obj: bytes, filepath: str) -> None:
        self._called(f"put {filepath}")
        self.held[filepath] = obj

    def download(self, path: str) -> Iterator[bytes]:
        self._called(f"download {path}")
        yield self.held[path]

    def isfile(self, filepath: str) -> bool:
        self._called(f"isfile {filepath}")
        return filepath in self.held

    def remove(self, filepath: str) -> None:
        self._called(f"remove {filepath}")
        del self.held[filepath]

    def join_path(self, root: str, name: str) -> str:
        return f"{root}/{name}"


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def mirror(folder: Path, shelf: Shelf, *, run: str = "run", root: str = "there") -> Mirror:
    started = Mirror(LocalStore(folder), str(folder), shelf, root)
    started.start(run)
    return started


def saved(folder: Path, epoch: int, *, content: str = "", reasons: tuple[str, ...] = ("interval",)) -> Record:
    name = f"epoch_{epoch}.pth"
    data = f"{epoch}{content}".encode()
    (folder / name).write_bytes(data)
    progress = Progress(epoch, epoch)
    return Record(name, progress, "pth", 1, reasons, "", "run", 1, epoch, len(data), len(data), digest(data))


def best(record: Record, acc: float, name: str = "acc") -> Record:
    return Record(
        **{**vars(record), "name": f"best_{name}_{record.name}", "reasons": ("best",), "metrics": {name: acc}}
    )


def names(shelf: Shelf) -> list[str]:
    return sorted(path.rpartition("/")[2] for path in shelf.held)


def asked(shelf: Shelf) -> list[str]:
    told, shelf.calls = shelf.calls, []
    return told


def test_what_is_up_costs_nothing_after_a_restart_either(tmp_path, shelf):
    records = [saved(tmp_path, 1), saved(tmp_path, 2)]
    mirror(tmp_path, shelf).copy(records, "epoch_2.pth")
    assert asked(shelf) == ["upload there/epoch_2.pth", "upload there/epoch_1.pth", "put there/last_checkpoint"]
    mirror(tmp_path, shelf).copy(records, "epoch_2.pth")
    assert asked(shelf) == []
    assert shelf.held["there/last_checkpoint"] == b"there/epoch_2.pth"


def test_a_file_that_was_written_again_is_copied_again(tmp_path, shelf):
    copying = mirror(tmp_path, shelf)
    copying.copy([saved(tmp_path, 1)], None)
    copying.copy([saved(tmp_path, 1, content="again")], None)
    assert shelf.held == {"there/epoch_1.pth": b"1again"}


def test_what_another_run_or_another_place_has_up_counts_for_nothing(tmp_path, shelf):
    record = saved(tmp_path, 1)
    mirror(tmp_path, shelf).copy([record], None)
    other = mirror(tmp_path, shelf, run="other")
    other.copy([record], None)
    mirror(tmp_path, shelf, run="other", root="elsewhere").copy([record], None)
    assert [call for call in asked(shelf) if "epoch_1" in call] == [
        *("upload there/epoch_1.pth", "upload there/epoch_1.pth", "upload elsewhere/epoch_1.pth")
    ]


@pytest.mark.parametrize("fail_at", range(8))
def test_wherever_it_fails_the_next_call_or_start_makes_up_for_it(tmp_path, shelf, fail_at, caplog):
    copying = mirror(tmp_path, shelf)
    (old, beaten), (new, link) = ((saved(tmp_path, epoch), best(saved(tmp_path, epoch), epoch)) for epoch in (1, 2))
    for one in (beaten, link):
        (tmp_path / one.name).write_bytes(b"")
    copying.copy([old, beaten], "epoch_1.pth")
    asked(shelf)
    shelf.fail_at = fail_at

    def work(copying: Mirror) -> None:
        copying.copy([new, link], "epoch_2.pth")
        copying.let_go({new.name, link.name})

    if fail_at < 3:
        with pytest.raises(DistckptError, match=r"there/.* could not be written: OSError.* is safe at .*copied at the"):
            work(copying)
        copying.let_go({new.name, link.name})
        assert {"epoch_1.pth", beaten.name} <= {*names(shelf)}, "what is newer is not safe yet"
        assert shelf.held["there/last_checkpoint"] == b"there/epoch_1.pth"
    elif fail_at < 7:
        with caplog.at_level(logging.WARNING, "distckpt"):
            work(copying)
        assert "could not be removed, and will be tried again" in caplog.text
    shelf.fail_at = None
    work(mirror(tmp_path, shelf))
    assert names(shelf) == ["best_acc_epoch_2.pth", "epoch_2.pth", "last_checkpoint"]


def test_a_copy_that_somebody_else_removed_is_not_removed_again(tmp_path, shelf):
    copying = mirror(tmp_path, shelf)
    copying.copy([saved(tmp_path, 1)], None)
    shelf.held.clear()
    asked(shelf)
    copying.let_go(())
    copying.let_go(())
    assert asked(shelf) == ["isfile there/epoch_1.pth"]


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"run":"run","root":"there","last":"","files":{"epoch_1.pth":1}}'])
def test_where_it_is_not_known_any_more_what_is_up_all_is_copied_again(tmp_path, shelf, damage, caplog):
    record = saved(tmp_path, 1)
    mirror(tmp_path, shelf).copy([record], None)
    (tmp_path / "copies.json").write_bytes(damage)
    asked(shelf)
    with caplog.at_level(logging.WARNING, "distckpt"):
        mirror(tmp_path, shelf).copy([record], None)
    assert "all is copied again" in caplog.text and asked(shelf) == ["upload there/epoch_1.pth"]


def test_where_a_record_cannot_be_read_the_copy_stays(tmp_path, shelf):
    copying = mirror(tmp_path, shelf)
    copying.copy([saved(tmp_path, 1)], None)
    (tmp_path / "epoch_1.pth.committed").write_bytes(b"damaged")
    copying.let_go(())
    assert names(shelf) == ["epoch_1.pth"]


def copies(
    mirror: Mirror, records: Sequence[Record] = (), *, pointed: str | None = None, keep: int = 1, **words: Any
) -> Copies:
    words = {"max_keep_ckpts": -1, **words}
    contest = Contest(BestBy((ACC,), keep))
    return Copies(mirror, contest, records=lambda: records, pointed=lambda: pointed, **words)


def test_what_was_saved_for_being_the_best_alone_is_copied_as_that(tmp_path, shelf):
    alone = saved(tmp_path, 1, reasons=("best",))
    (tmp_path / "best_acc_epoch_1.pth").write_bytes(b"1")
    records = [alone, best(alone, 0.5)]
    copies(mirror(tmp_path, shelf), records).make()
    assert names(shelf) == ["best_acc_epoch_1.pth"]
    copies(mirror(tmp_path, shelf), records, pointed=alone.name).make()
    assert names(shelf) == ["best_acc_epoch_1.pth", "epoch_1.pth", "last_checkpoint"]


def test_beside_training_what_fails_is_warned_of_and_tried_again_when_it_is_settled(tmp_path, shelf, caplog):
    making = copies(mirror(tmp_path, shelf), [saved(tmp_path, 1)], writer=Writer("copies"))
    shelf.fail_at = 0
    with caplog.at_level(logging.WARNING, "distckpt"):
        making.make()
        making.settle(60)
    making.close(60)
    assert "epoch_1.pth could not be written" in caplog.text and names(shelf) == ["epoch_1.pth"]


def test_what_was_beaten_meanwhile_stays_until_what_beat_it_is_there(tmp_path, shelf):
    links = [best(saved(tmp_path, epoch), epoch / 10) for epoch in (1, 2)]
    for one in links:
        (tmp_path / one.name).write_bytes(b"")
    records = [links[:1]]
    writer = Writer("copies")
    making = Copies(
        mirror(tmp_path, shelf),
        Contest(BestBy((ACC,), 1)),
        records=lambda: records[-1],
        pointed=lambda: None,
        max_keep_ckpts=-1,
        writer=writer,
    )
    making.make()
    writer.submit(lambda: records.append(links[1:]))
    making.follow(links[:1])
    assert writer.wait(60)
    assert [call.replace("there/best_acc_", "") for call in asked(shelf)] == [
        *("upload epoch_1.pth", "upload epoch_2.pth", "isfile epoch_1.pth", "remove epoch_1.pth")
    ]
    making.close(60)


def test_copies_that_take_too_long_are_given_up_by_name(tmp_path, shelf):
    writer, goes_on = Writer("copies"), threading.Event()
    writer.submit(lambda: goes_on.wait(60))
    making = copies(mirror(tmp_path, shelf), writer=writer)
    with pytest.raises(DistckptError, match="the copies at there are not made within 0 s"):
        making.settle(0)
    goes_on.set()
    making.close(60)


@pytest.mark.parametrize(
    ("limit", "epochs", "kept"),
    [(-1, [5, 6], [1, 2, 3]), (5, [5, 6], [1, 2, 3]), (4, [5, 6], [2, 3]), (2, [5, 6], []), (1, [5, 6], [])],
)
def test_of_the_copies_of_a_lost_directory_those_stay_that_would_have(tmp_path, shelf, limit, epochs, kept):
    before = mirror(tmp_path, shelf)
    before.copy([saved(tmp_path, epoch) for epoch in (1, 2, 3)], None)
    (tmp_path / "copies.json").unlink()
    fetched = saved(tmp_path, 4)
    before.inherit(fetched, ["epoch_1.pth", "epoch_2.pth", "epoch_3.pth"])
    left = [saved(tmp_path, epoch) for epoch in epochs]
    after = mirror(tmp_path, shelf)
    after.copy(left, "epoch_6.pth")
    copies(after, max_keep_ckpts=limit).follow(left)
    assert names(shelf) == sorted([f"epoch_{epoch}.pth" for epoch in [*kept, *epochs]] + ["last_checkpoint"])


@pytest.mark.parametrize(
    ("score", "new", "keep", "stays"),
    [
        (0.5, [0.6], 1, False),
        (0.5, [0.4], 1, True),
        (0.5, [0.5], 1, True),
        (0.5, [0.6], 2, True),
        (0.5, [0.6, 0.7], 2, False),
        (None, [0.9], 1, True),
    ],
)
def test_the_best_of_a_lost_directory_goes_when_it_is_beaten(tmp_path, shelf, score, new, keep, stays):
    shelf.held["there/best_acc_epoch_1.pth"] = shelf.held["there/best_accuracy_epoch_1.pth"] = b""
    after = mirror(tmp_path, shelf)
    after.inherit(saved(tmp_path, 1), ["best_acc_epoch_1.pth", "best_accuracy_epoch_1.pth"])
    left = [best(saved(tmp_path, epoch), acc) for epoch, acc in enumerate(new, start=2)]
    for one in left:
        (tmp_path / one.name).write_bytes(b"")
    after.copy(left, None)
    following = copies(after, keep=keep)
    following._contest.elsewhere = lambda metric: score
    following.follow(left)
    assert ("there/best_acc_epoch_1.pth" in shelf.held) is stays
    assert "there/best_accuracy_epoch_1.pth" in shelf.held, "of a metric that nobody asks for"

"""A restore takes the newest that every rank can verify, says what it passed over, and never starts from nothing."""

from __future__ import annotations

import errno
import gc
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flows import Saves

from distckpt.catalog import read_record
from distckpt.errors import NewerVersion, NoCheckpoint, RankFailure, StateMismatch
from distckpt.formats import Snapshot
from distckpt.manifest import Record
from distckpt.restoring import Restored
from distckpt.stores.local import LocalStore
from distckpt.testing import FaultyStore

FILES = ["manifest.json", "model.safetensors", "state.json", "rank-00000.json", "rank-00001.json"]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def put_instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip_a_bit,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a pipe": lambda path: put_instead(path, os.mkfifo),
    "a folder": lambda path: put_instead(path, os.mkdir),
    "a link": lambda path: put_instead(path, lambda place: place.symlink_to("/etc/passwd")),
}


@pytest.fixture
def two_saves(tmp_path):
    saves = Saves(tmp_path / "run", 2)
    for step in (1, 2):
        saves.save(step)
    return saves


def steps(told: list[object]) -> list[int]:
    assert all(isinstance(one, Restored) for one in told), told
    return [one.record.progress.step for one in told if isinstance(one, Restored)]


def test_the_newest_is_restored_with_what_is_each_ranks_own(two_saves):
    told = two_saves.restore()
    assert steps(told) == [2, 2]
    for rank, restored in enumerate(told):
        assert torch.equal(restored.fitted.snapshot.shared["model"]["weight"], torch.full((3, 2), 2.0))
        assert restored.fitted.snapshot.own["rng"] == {"rank": rank, "step": 2} and restored.skipped == ()


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_what_is_damaged_is_named_and_passed_over_by_all_ranks(two_saves, caplog, file, how):
    DAMAGE[how](two_saves.folder / "step-00000002" / file)
    told = two_saves.restore()
    assert steps(told) == [1, 1] and [one.skipped for one in told] == [("step-00000002",)] * 2
    assert "step-00000002 is damaged and passed over" in caplog.text and file in caplog.text
    assert (two_saves.folder / "step-00000002").exists(), "it is left for inspection"


def test_a_record_that_is_damaged_is_passed_over(two_saves, caplog):
    flip_a_bit(two_saves.folder / "step-00000002.committed")
    assert steps(two_saves.restore()) == [1, 1]
    assert "step-00000002 is passed over" in caplog.text


def test_a_folder_of_another_step_in_its_place_is_found(two_saves):
    folder = two_saves.folder
    shutil.rmtree(folder / "step-00000002")
    shutil.copytree(folder / "step-00000001", folder / "step-00000002")
    assert steps(two_saves.restore()) == [1, 1]


def test_with_none_that_verifies_all_ranks_raise_and_nothing_starts_from_zero(two_saves):
    for step in (1, 2):
        flip_a_bit(two_saves.folder / f"step-0000000{step}" / "rank-00001.json")
    told = two_saves.restore()
    assert [type(one) for one in told] == [NoCheckpoint] * 2
    assert "step-00000002, step-00000001" in str(told[0])


def test_records_that_cannot_be_read_are_no_empty_directory(two_saves):
    for step in (1, 2):
        (two_saves.folder / f"step-0000000{step}.committed").write_bytes(b"")
    assert [type(one) for one in two_saves.restore()] == [NoCheckpoint] * 2


def test_an_empty_directory_restores_nothing(tmp_path):
    assert Saves(tmp_path / "run", 2).restore() == [None, None]


def test_one_that_is_asked_for_by_name_is_restored_or_the_others_are_listed(two_saves):
    assert steps(two_saves.restore(name="step-00000001")) == [1, 1]
    told = two_saves.restore(name="step-00000009")
    assert [type(one) for one in told] == [NoCheckpoint] * 2
    assert "committed: step-00000001, step-00000002" in str(told[1])


def test_a_newer_version_is_refused_by_name_and_not_passed_over(two_saves):
    newest = read_record(two_saves.catalog.store, "step-00000002")
    two_saves.catalog.relabel(replace(newest, version=2))
    told = two_saves.restore()
    assert [type(one) for one in told] == [NewerVersion] * 2 and "step-00000002" in str(told[0])


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.ESTALE, errno.ENOMEM])
def test_an_error_that_may_pass_is_raised_and_sends_nobody_back(two_saves, monkeypatch, code):
    """Taken for damage it would send the run back to an older checkpoint, and retention would delete the newer."""
    real = two_saves.stores[1].open

    def open_model(path: str) -> object:
        if path == "step-00000002/model.safetensors":
            raise OSError(code, os.strerror(code), path)
        return real(path)

    monkeypatch.setattr(two_saves.stores[1], "open", open_model)
    told = two_saves.restore()
    assert [type(one) for one in told] == [RankFailure] * 2
    assert "rank 1" in str(told[0]) and os.strerror(code) in str(told[0])


def test_a_restore_changes_nothing_on_disk(two_saves):
    two_saves.stores = [FaultyStore(store) for store in two_saves.stores]
    flip_a_bit(two_saves.folder / "step-00000002" / "model.safetensors")
    two_saves.restore()
    assert [store.operations for store in two_saves.stores] == [[], []]


# What was read into the state before it turned out to be damaged


class Into:
    """A checkpoint that is read into the tensors of a rank, and what became of it."""

    def __init__(self, live: dict[str, torch.Tensor], snapshot: Snapshot) -> None:
        self.targets = [(snapshot.shared["model"][key], tensor) for key, tensor in live.items()]
        self.snapshot = snapshot
        self.is_applied = False
        self.unplaced: list[str] = []
        self.is_fit = True
        self.judged: list[set[str]] = []

    def judge(self, unplaced: set[str]) -> None:
        self.judged.append(unplaced)
        if unplaced or not self.is_fit:
            raise StateMismatch(f"it does not fit: {sorted(unplaced)}")

    def apply(self) -> None:
        self.is_applied = True


class Live:
    """The tensors of two ranks, and all that was laid beside them."""

    def __init__(self, *, refuses: int | None = None) -> None:
        self.tensors = {
            rank: {"weight": torch.zeros(3, 2), "bias": torch.zeros(2, dtype=torch.int64)} for rank in (0, 1)
        }
        self.fits: list[tuple[int, Into]] = []
        self._refuses = refuses

    def fit(self, snapshot: Snapshot, record: Record) -> Into:
        if record.progress.step == self._refuses:
            raise StateMismatch(f"step {self._refuses} does not fit.")
        self.fits.append((record.progress.step, Into(self.tensors[snapshot.own["rng"]["rank"]], snapshot)))
        return self.fits[-1][1]

    @property
    def steps(self) -> list[set[float]]:
        """Whose weights each rank holds."""
        return [set(one["weight"].flatten().tolist()) for one in self.tensors.values()]


def flip_the_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damaged_for(saves: Saves, rank: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``rank`` alone reads other bytes in that file than were written; its disk, or its cache, lost one."""
    copy = saves.folder.with_name("what it reads")
    shutil.copytree(saves.folder, copy)
    flip_the_last_bit(copy / path)
    real, lost = saves.stores[rank].open, LocalStore(copy).open
    monkeypatch.setattr(saves.stores[rank], "open", lambda asked: (lost if asked == path else real)(asked))


@pytest.mark.parametrize("rank", [0, 1])
def test_damage_that_one_rank_sees_sends_all_back_and_the_older_replaces_what_was_read(two_saves, monkeypatch, rank):
    damaged_for(two_saves, rank, "step-00000002/model.safetensors", monkeypatch)
    live = Live()
    told = two_saves.restore(live.fit)
    assert steps(told) == [1, 1] and [one.skipped for one in told] == [("step-00000002",)] * 2
    assert live.steps == [{1.0}, {1.0}] and live.tensors[0]["bias"].tolist() == [1, 2]
    assert sorted((step, fit.is_applied) for step, fit in live.fits) == [(1, True), (1, True), (2, False), (2, False)]


def test_where_nothing_is_left_the_error_says_that_the_state_is_not_what_it_was(two_saves):
    for step in (1, 2):
        flip_the_last_bit(two_saves.folder / f"step-0000000{step}" / "model.safetensors")
    live = Live()
    told = two_saves.restore(live.fit)
    assert [type(one) for one in told] == [NoCheckpoint] * 2 and not any(fit.is_applied for _, fit in live.fits)
    assert all("The state is not what it was: something of step-00000001 was read into it" in str(one) for one in told)


@pytest.mark.parametrize("file", ["state.json", "manifest.json", "rank-00001.json"])
def test_what_is_found_damaged_before_anything_is_read_leaves_the_state_and_says_nothing_else(two_saves, file):
    for step in (1, 2):
        flip_a_bit(two_saves.folder / f"step-0000000{step}" / file)
    live = Live()
    told = two_saves.restore(live.fit)
    assert [type(one) for one in told] == [NoCheckpoint] * 2 and "not what it was" not in str(told[0])
    assert live.steps == [{0.0}, {0.0}] and live.fits == []


def test_what_does_not_fit_is_raised_on_all_ranks_and_changes_nothing(two_saves):
    live = Live(refuses=2)
    told = two_saves.restore(live.fit)
    assert [type(one) for one in told] == [StateMismatch] * 2
    assert "not what it was" not in str(told[0]) and live.steps == [{0.0}, {0.0}]


def test_an_older_one_that_does_not_fit_is_told_with_what_was_read_of_the_newer(two_saves):
    flip_the_last_bit(two_saves.folder / "step-00000002" / "model.safetensors")
    told = two_saves.restore(Live(refuses=1).fit)
    assert [type(one) for one in told] == [StateMismatch] * 2
    assert "step 1 does not fit. The state is not what it was: something of step-00000002 was read" in str(told[1])


def test_an_error_that_may_pass_while_it_is_read_says_that_the_state_holds_a_part(two_saves, monkeypatch):
    opened: list[str] = []
    real = two_saves.stores[1].open

    def open_model(path: str) -> object:
        opened.append(path)
        if opened.count("step-00000002/model.safetensors") == 2:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return real(path)

    monkeypatch.setattr(two_saves.stores[1], "open", open_model)
    live = Live()
    told = two_saves.restore(live.fit)
    assert [type(one) for one in told] == [RankFailure] * 2 and not any(fit.is_applied for _, fit in live.fits)
    assert "read of step-00000002, of which the state holds a part now, failed: rank 1: OSError" in str(told[0])


@pytest.mark.parametrize("is_on", [True, False])
def test_python_looks_for_no_garbage_meanwhile_and_goes_on_afterwards(two_saves, is_on):
    seen = []

    def fit(snapshot: Snapshot, record: Record) -> Into:
        seen.append(gc.isenabled())
        raise StateMismatch("of another model")

    was_on = gc.isenabled()
    (gc.enable if is_on else gc.disable)()
    try:
        two_saves.restore(fit)
        assert gc.isenabled() == is_on and not any(seen)
    finally:
        (gc.enable if was_on else gc.disable)()


def test_what_cannot_be_put_in_on_one_rank_is_raised_on_all(two_saves):
    live = Live()

    def fit(snapshot: Snapshot, record: Record) -> Into:
        into = live.fit(snapshot, record)
        if snapshot.own["rng"]["rank"] == 1:
            into.apply = lambda: 1 / 0
        return into

    told = two_saves.restore(fit)
    assert [type(one) for one in told] == [RankFailure] * 2
    assert "load of step-00000002 failed: rank 1: ZeroDivisionError" in str(told[0])


# What some ranks have no place for


def stages(live: Live, *unplaced: list[str], unfit: int | None = None) -> Callable[[Snapshot, Record], Into]:
    """Each rank has no place for those of its list."""

    def fit(snapshot: Snapshot, record: Record) -> Into:
        into = live.fit(snapshot, record)
        into.unplaced = unplaced[snapshot.own["rng"]["rank"]]
        into.is_fit = snapshot.own["rng"]["rank"] != unfit
        return into

    return fit


@pytest.mark.parametrize("unplaced", [([], ["b"]), (["a"], ["b"]), (["a", "b"], [])], ids=str)
def test_what_one_rank_has_a_place_for_is_no_error_on_the_others(two_saves, unplaced):
    live = Live()
    assert steps(two_saves.restore(stages(live, *unplaced))) == [2, 2]
    assert [fit.judged for _, fit in live.fits] == [[set()], [set()]]


@pytest.mark.parametrize("unplaced", [(["a", "b"], ["b", "c"]), (["b"], ["b"])], ids=str)
def test_what_no_rank_has_a_place_for_is_raised_on_all_before_anything_is_read(two_saves, unplaced):
    live = Live()
    told = two_saves.restore(stages(live, *unplaced))
    assert [type(one) for one in told] == [StateMismatch] * 2 and "it does not fit: ['b']" in str(told[1])
    assert live.steps == [{0.0}, {0.0}]


def test_what_does_not_fit_one_rank_otherwise_is_raised_on_all(two_saves):
    told = two_saves.restore(stages(Live(), [], [], unfit=1))
    assert [type(one) for one in told] == [StateMismatch] * 2 and "rank 1: it does not fit" in str(told[0])


def test_where_all_has_its_place_nobody_is_asked_again(two_saves):
    live = Live()
    assert steps(two_saves.restore(stages(live, [], []))) == [2, 2]
    assert [fit.judged for _, fit in live.fits] == [[], []]

"""A restore takes the newest that every rank can verify, says what it passed over, and never starts from nothing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flows import Saves

from distckpt.catalog import read_record
from distckpt.errors import NewerVersion, NoCheckpoint, RankFailure
from distckpt.restoring import Restored
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

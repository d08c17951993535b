"""The full format: one safetensors file for each part, JSON beside it, and nothing read that was not checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from flows import read_now, write_now
from torch import nn

from distckpt.errors import DamagedCheckpoint
from distckpt.formats import Opened, Snapshot, Written
from distckpt.formats.full import FORMAT
from distckpt.manifest import FileEntry, Manifest, digest
from distckpt.progress import Progress
from distckpt.stores.local import LocalStore

FOLDER = "step-00000004"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def shared_state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    return {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "scheduler": {"last_epoch": 3}}


def own_state(rank: int) -> dict[str, Any]:
    return {
        "loader": {"at": rank, "order": torch.arange(rank + 2)},
        "loader_": {"order": [rank]},
        "rng": {"torch": b"1"},
    }


def write(store: LocalStore, world_size: int) -> Manifest:
    store.make_folder(FOLDER)
    told = [
        write_now(FORMAT, Snapshot(shared_state() if rank == 0 else {}, own_state(rank)), store, FOLDER, rank)
        for rank in range(world_size)
    ]
    return manifest_of(told)


def manifest_of(told: list[Written]) -> Manifest:
    return Manifest(
        progress=Progress(4),
        format=FORMAT.name,
        world_size=len(told),
        reasons=("asked",),
        created="",
        run="",
        attempt=1,
        serial=1,
        files=tuple(file for one in told for file in one.files),
        tensors=tuple(tensor for one in told for tensor in one.tensors),
    )


def read(store: LocalStore, manifest: Manifest, rank: int = 0, parts: Any = None) -> Snapshot:
    return read_now(FORMAT, store, FOLDER, manifest, rank, parts)


def test_files_are_called_by_part_and_by_rank(store):
    manifest = write(store, 2)
    names = ["model.safetensors", "optimizer.safetensors", "state.json"]
    names += [f"rank-0000{rank}.{kind}" for rank in range(2) for kind in ("json", "safetensors")]
    assert store.list(FOLDER) == sorted(names) == sorted(file.path for file in manifest.files)
    assert all((store.root / FOLDER / file.path).stat().st_size == file.size_bytes for file in manifest.files)


def test_stock_safetensors_reads_the_model_by_its_own_keys(store):
    write(store, 1)
    weights = safetensors.torch.load_file(store.root / FOLDER / "model.safetensors")
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model.load_state_dict(weights, strict=True)
    assert all(torch.equal(weights[key], one) for key, one in shared_state()["model"].items())


def test_what_read_with_says_reads_the_model(store, monkeypatch):
    write(store, 1)
    monkeypatch.chdir(store.root / FOLDER)
    assert eval(FORMAT.read_with, {"safetensors": safetensors}).keys() == shared_state()["model"].keys()


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_gets_what_is_shared_and_its_own(store, rank):
    snapshot = read(store, write(store, 2), rank)
    assert str(snapshot.shared) == str(shared_state())
    assert str(snapshot.own) == str(own_state(rank))


def test_a_rank_that_was_not_there_gets_nothing_of_its_own(store):
    snapshot = read(store, write(store, 2), 2)
    assert snapshot.own == {}
    assert str(snapshot.shared) == str(shared_state())


def test_only_the_parts_that_are_asked_for_are_read(store):
    manifest = write(store, 1)
    (store.root / FOLDER / "optimizer.safetensors").unlink()
    snapshot = read(store, manifest, parts=["model", "loader_"])
    assert list(snapshot.shared) == ["model"]
    assert snapshot.own == {"loader_": {"order": [0]}}


def test_the_manifest_names_every_tensor_with_its_type_and_shape(store):
    manifest = write(store, 2)
    there = {(*one.files, key, one.dtype, one.shape) for one in manifest.tensors for key in one.keys}
    assert ("model.safetensors", "0.weight", "F32", (3, 2)) in there
    assert ("optimizer.safetensors", "state.0.exp_avg", "F32", (3, 2)) in there
    assert ("rank-00001.safetensors", "loader.order", "I64", (3,)) in there
    for file in {file for one in manifest.tensors for file in one.files}:
        keys = safetensors.torch.load_file(store.root / FOLDER / file).keys()
        assert sorted(keys) == sorted(key for one in manifest.tensors if one.files == (file,) for key in one.keys)


def test_every_file_of_this_rank_is_checked_before_it_is_used(store):
    manifest = write(store, 1)
    whole = store.root / "whole"
    shutil.copytree(store.root / FOLDER, whole)
    for file in manifest.files:
        place = store.root / FOLDER / file.path
        data = place.read_bytes()
        for damaged in (data[:-1], data + b" ", data[:-1] + bytes([data[-1] ^ 1]), b""):
            place.write_bytes(damaged)
            with pytest.raises(DamagedCheckpoint, match=f"{FOLDER}/{file.path}"):
                read(store, manifest)
        place.unlink()
        with pytest.raises(OSError, match=file.path):
            read(store, manifest)
        shutil.copy(whole / file.path, place)
    assert str(read(store, manifest).shared) == str(shared_state())


def test_a_number_that_was_changed_in_what_is_no_tensor_is_found(store):
    manifest = write(store, 1)
    place = store.root / FOLDER / "state.json"
    changed = place.read_bytes().replace(b'"last_epoch":3', b'"last_epoch":4')
    assert changed != place.read_bytes()
    place.write_bytes(changed)
    with pytest.raises(DamagedCheckpoint, match=f"{FOLDER}/state.json: its bytes changed after the commit"):
        read(store, manifest)


def test_a_file_of_another_checkpoint_in_its_place_is_found(store):
    manifest = write(store, 1)
    place = store.root / FOLDER / "model.safetensors"
    safetensors.torch.save_file({"0.weight": torch.ones(3, 2)}, place)
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors"):
        read(store, manifest)


@pytest.mark.parametrize(
    "told",
    [
        {"model": 1},
        {"model": {"file": 1, "prefix": "", "state": {}}},
        {"model": {"file": "model.safetensors", "prefix": None, "state": {}}},
        {"model": {"file": "model.safetensors", "prefix": "", "state": {"w": {"$tensor": "elsewhere"}}}},
        {"model": {"file": "../other/model.safetensors", "prefix": "", "state": {"w": {"$tensor": "w"}}}},
        {"model": {"file": "model.safetensors", "prefix": "", "state": {"$tensor": ["0.bias", "torch.int64", [2]]}}},
        {"model": {"file": "model.safetensors", "prefix": "", "state": {"$numpy": ["0.bias", "torch.int64", [2]]}}},
        {"model": {"file": "model.safetensors", "prefix": ""}},
        [],
    ],
    ids=json.dumps,
)
def test_an_index_that_was_not_written_by_us_is_refused_by_name(store, told):
    manifest = write(store, 1)
    (store.root / FOLDER / "state.json").unlink()
    data = json.dumps(told).encode()
    with store.create(f"{FOLDER}/state.json") as sink:
        sink.write(data)
    entry = FileEntry("state.json", len(data), digest(data))
    files = [entry if file.path == "state.json" else file for file in manifest.files]
    with pytest.raises(DamagedCheckpoint, match="state.json"):
        read(store, manifest_of([Written(tuple(files), manifest.tensors)]))


def test_a_manifest_without_the_index_is_refused(store):
    manifest = write(store, 1)
    files = [file for file in manifest.files if file.path != "state.json"]
    with pytest.raises(DamagedCheckpoint, match=f"{FOLDER}/state.json is not in the manifest"):
        read(store, manifest_of([Written(tuple(files))]))


def test_a_value_that_cannot_be_stored_is_named_with_its_part(store):
    store.make_folder(FOLDER)
    with pytest.raises(TypeError, match=r"^extra\.inner\.0 is a builtins.object"):
        write_now(FORMAT, Snapshot({"extra": {"inner": [object()]}}), store, FOLDER)


# What is opened, and what is filled


def opened(store: LocalStore, manifest: Manifest, parts: Any = None) -> Opened:
    return FORMAT.open(store, FOLDER, manifest, 0, parts)


def test_what_is_opened_stands_for_tensors_of_the_same_types_and_shapes(store):
    shared = opened(store, write(store, 1)).snapshot.shared
    for key, value in shared_state()["model"].items():
        assert shared["model"][key].is_meta
        assert (shared["model"][key].dtype, shared["model"][key].shape) == (value.dtype, value.shape)
    assert shared["scheduler"] == {"last_epoch": 3}


def test_only_files_of_what_is_to_be_filled_are_read(store, monkeypatch):
    checkpoint = opened(store, write(store, 1))
    read: list[str] = []
    real = store.open
    monkeypatch.setattr(store, "open", lambda path: (read.append(path), real(path))[1])
    bias = torch.zeros(3)
    checkpoint.fill([(checkpoint.snapshot.shared["model"]["0.bias"], bias)])
    assert read == [f"{FOLDER}/model.safetensors"] and torch.equal(bias, shared_state()["model"]["0.bias"])


def test_a_tensor_in_several_places_is_one_stand_in_that_fills_many(store):
    store.make_folder(FOLDER)
    weight = torch.randn(300, 300)
    written = write_now(FORMAT, Snapshot({"model": {"a": weight, "b": {"c": weight}}}), store, FOLDER)
    checkpoint = opened(store, manifest_of([written]))
    standing = checkpoint.snapshot.shared["model"]["a"]
    assert checkpoint.snapshot.shared["model"]["b"]["c"] is standing
    into = [torch.zeros(300, 300).T, torch.zeros(300, 300), torch.zeros(300, 600)[:, ::2]]
    checkpoint.fill([(standing, one) for one in into])
    assert all(torch.equal(one, weight) for one in into)


def test_arrays_and_types_that_safetensors_has_no_word_for_are_filled(store):
    store.make_folder(FOLDER)
    state = {"array": np.arange(6.0).reshape(2, 3), "complex": torch.randn(3, dtype=torch.complex128), "same": None}
    state["same"] = state["complex"]
    written = write_now(FORMAT, Snapshot({"part": state}), store, FOLDER)
    checkpoint = opened(store, manifest_of([written]))
    got = checkpoint.snapshot.shared["part"]
    assert got["complex"].is_meta and got["complex"].dtype == torch.complex128 and got["same"] is got["complex"]
    into = torch.zeros(3, dtype=torch.complex128)
    checkpoint.fill([(got["complex"], into)])
    assert torch.equal(into, state["complex"]) and np.array_equal(got["array"], state["array"])


@pytest.mark.parametrize("into", [torch.zeros(3, dtype=torch.float64), torch.zeros(4), torch.zeros(3, 1)], ids=str)
def test_memory_of_another_type_or_shape_is_not_written_to(store, into):
    checkpoint = opened(store, write(store, 1))
    with pytest.raises(ValueError, match="is no place for what was torch.float32 of"):
        checkpoint.fill([(checkpoint.snapshot.shared["model"]["0.bias"], into)])
    assert not into.any()


def test_a_stand_in_of_another_checkpoint_is_refused(store):
    manifest = write(store, 1)
    other = opened(store, manifest).snapshot.shared["model"]["0.bias"]
    with pytest.raises(ValueError, match="or that is of another checkpoint"):
        opened(store, manifest).fill([(other, torch.zeros(3))])


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"shape":[3,2]', b'"shape":[2,3]'), (b'"0.bias"', b'"0.bjas"'), (b'"F32","shape":[3]', b'"I32","shape":[3]')],
)
def test_a_header_that_does_not_say_what_was_committed_is_found_before_it_is_laid_beside_anything(store, old, new):
    """Taken for what the checkpoint holds, it would be a mismatch, which sends nobody back to the one before it."""
    manifest = write(store, 1)
    place = store.root / FOLDER / "model.safetensors"
    changed = place.read_bytes().replace(old, new, 1)
    assert changed != place.read_bytes()
    place.write_bytes(changed)
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors: its tensors are not those that were committed"):
        opened(store, manifest)


def test_a_byte_that_is_lost_after_it_was_opened_is_found_when_it_is_filled(store):
    checkpoint = opened(store, write(store, 1))
    place = store.root / FOLDER / "model.safetensors"
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors: its bytes changed after the commit"):
        checkpoint.fill([(checkpoint.snapshot.shared["model"]["0.bias"], torch.zeros(3))])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_lie_there_once_and_stock_safetensors_loads_them(store):
    model = Tied()
    store.make_folder(FOLDER)
    write_now(FORMAT, Snapshot({"model": model.state_dict()}), store, FOLDER)
    place = store.root / FOLDER / "model.safetensors"
    assert list(safetensors.torch.load_file(place)) == ["embedding.weight"]
    other = Tied()
    safetensors.torch.load_model(other, place)
    assert torch.equal(other.head.weight, model.head.weight) and other.head.weight is other.embedding.weight

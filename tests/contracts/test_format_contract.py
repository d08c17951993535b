"""What every format promises: these tests run on each that is found in distckpt/formats."""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint
from flows import read_now, write_now

from distckpt.attempt import Attempt, Holder
from distckpt.catalog import Catalog, read_manifest
from distckpt.errors import DamagedCheckpoint, NewerVersion
from distckpt.formats import Snapshot
from distckpt.formats.known import get_format
from distckpt.formats.streaming import runs
from distckpt.layout import CLAIM, MANIFEST
from distckpt.manifest import Manifest, Record, digest
from distckpt.progress import Progress
from distckpt.stores.local import LocalStore
from distckpt.testing import FaultyStore

WORLD_SIZE = 3
FILE_NAME = "epoch_1.pth"


def shared_state() -> dict[str, Any]:
    torch.manual_seed(0)
    weight = torch.randn(64, 32)
    return {
        "model": OrderedDict(
            [("layer.weight", weight), ("layer.bias", weight[0]), ("norm.steps", torch.tensor(7)), ("tied", weight)]
        ),
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, 6).t()}, 1: {}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "amsgrad": False, "foreach": None, "params": [0, 1]}],
        },
        "scheduler": {"last_epoch": 3, "limit": math.inf, "name": "cosine ü", "milestones": [1, [2, []], {}]},
        "ema": {"half": torch.randn(5).bfloat16(), "nothing": torch.empty(0, 3), "mask": torch.tensor([True, False])},
    }


def blocks_of(data: bytes) -> dict[str, Any]:
    """What lies beside a file that is read in parts."""
    size = 256 << 10
    return {"block_bytes": size, "xxh3_128": [digest(data[at : at + size]) for at in range(0, len(data), size)]}


def snapshot_of(rank: int) -> Snapshot:
    return Snapshot(
        shared_state(), {"rng": {"torch": torch.arange(rank, rank + 9), "seed": 2**40 + rank}, "loader": {"at": rank}}
    )


class Committed:
    """A checkpoint of so many ranks in that format, as a save makes it."""

    def __init__(self, format, root: Path, world_size: int = WORLD_SIZE) -> None:
        root.mkdir(exist_ok=True)
        self.format = format
        self.store = LocalStore(root)
        self.counted = [FaultyStore(LocalStore(root)) for _ in range(world_size)]
        catalog = Catalog(self.store, Attempt.start(self.store, Holder("here", 1, "")))
        draft = catalog.begin(Progress(1), None if format.is_folder else FILE_NAME)
        self.written = [
            write_now(format, snapshot_of(rank), store, draft.path, rank) for rank, store in enumerate(self.counted)
        ]
        files = [file for one in self.written for file in one.files]
        if not format.is_folder:
            (file,) = files
            files = [type(file)(draft.name, file.size_bytes, file.xxh3_128)]
        tensors = format.tensors_of(self.written)
        manifest = Manifest(Progress(1), format.name, world_size, (), "", "", 0, 0, tuple(files), tensors)
        self.record: Record = catalog.commit(draft, manifest)
        self.manifest = read_manifest(self.store, self.record)

    @property
    def files(self) -> dict[str, Path]:
        """Where each file lies."""
        place = self.store.root / self.record.name if self.format.is_folder else self.store.root
        return {file.path: place / file.path for file in self.manifest.files}

    def read(self, rank: int = 0, parts=None) -> Snapshot:
        return read_now(self.format, self.store, self.record.name, self.manifest, rank, parts)

    def faults(self) -> list[str]:
        """What each rank says that cannot read it whole."""
        told = []
        for rank in range(WORLD_SIZE):
            try:
                self.read(rank)
            except (DamagedCheckpoint, OSError, EOFError) as error:
                told.append(str(error))
        return told


@pytest.fixture
def committed(format, tmp_path) -> Committed:
    return Committed(format, tmp_path / "run")


def same(one: Any, other: Any) -> bool:
    """Whether the values are equal to the last bit, and of the same types."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


# What is written is read


def test_records_know_the_format_by_its_name(format):
    assert get_format(format.name) is format


def test_a_name_that_nobody_has_is_of_a_newer_version():
    with pytest.raises(NewerVersion, match="'of tomorrow' is not known to this distckpt"):
        get_format("of tomorrow")


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_every_rank_gets_what_is_shared_to_the_last_bit(committed, rank):
    assert same(committed.read(rank).shared, shared_state())


def test_every_rank_gets_what_is_its_own_where_ranks_have_something_of_their_own(committed):
    for rank in range(WORLD_SIZE):
        own = committed.read(rank).own
        assert same(own, snapshot_of(rank).own) if committed.format.is_folder else own == {}


def test_a_rank_that_was_not_there_gets_nothing_of_anybody_elses(committed):
    restored = committed.read(WORLD_SIZE)
    assert restored.own == {} and same(restored.shared, shared_state())


def test_only_the_parts_that_are_asked_for_are_given(committed):
    restored = committed.read(1, parts=["optimizer", "rng"])
    assert list(restored.shared) == ["optimizer"] and set(restored.own) <= {"rng"}
    assert committed.read(0, parts=[]).shared == {}


def test_a_state_with_nothing_in_it_is_a_state(format, tmp_path):
    store = LocalStore(tmp_path)
    store.make_folder("draft")
    path = "draft" if format.is_folder else "draft/file"
    written = write_now(format, Snapshot(), store, path)
    manifest = Manifest(Progress(1), format.name, 1, (), "", "", 0, 0, written.files)
    assert read_now(format, store, path, manifest) == Snapshot({}, {})


def test_writing_changes_nothing_of_the_state(format, tmp_path):
    snapshot = snapshot_of(0)
    store = LocalStore(tmp_path)
    store.make_folder("draft")
    write_now(format, snapshot, store, "draft" if format.is_folder else "draft/file")
    assert same(snapshot.shared, snapshot_of(0).shared) and same(snapshot.own, snapshot_of(0).own)


def test_what_is_read_is_memory_of_its_own(committed):
    first, second = committed.read(), committed.read()
    first.shared["model"]["layer.weight"].zero_()
    assert same(second.shared, shared_state())


def test_what_is_opened_is_filled_wherever_it_is_wanted(committed):
    opened = committed.format.open(committed.store, committed.record.name, committed.manifest, 0, None)
    model, expected = opened.snapshot.shared["model"], shared_state()["model"]
    into = {"layer.weight": torch.zeros(32, 64).t(), "layer.bias": torch.zeros(65)[1::2], "norm.steps": torch.tensor(0)}
    pairs = [(model[key], target) for key, target in into.items()]
    twice = torch.zeros(64, 32)
    opened.fill([*pairs, (model["layer.weight"], twice)])
    assert all(torch.equal(target, expected[key]) for key, target in into.items())
    assert torch.equal(twice, expected["layer.weight"])


def test_what_is_to_be_read_stands_there_with_its_type_and_shape(committed):
    opened = committed.format.open(committed.store, committed.record.name, committed.manifest, 0, None)
    model = opened.snapshot.shared["model"]
    told = {key: (one.dtype, one.shape) for key, one in model.items()}
    assert told == {key: (one.dtype, one.shape) for key, one in shared_state()["model"].items()}


def test_what_is_asked_for_comes_in_pieces_each_element_once(committed):
    opened = committed.format.open(committed.store, committed.record.name, committed.manifest, 0, None)
    state, expected = opened.snapshot.shared, shared_state()
    told = [(state["model"][key], expected["model"][key]) for key in expected["model"]]
    told += [(state["ema"][key], expected["ema"][key]) for key in expected["ema"]]
    told.append((state["optimizer"]["state"][0]["exp_avg"], expected["optimizer"]["state"][0]["exp_avg"]))
    found = {id(standing): torch.zeros(tensor.numel(), dtype=tensor.dtype) for standing, tensor in told}
    counts = dict.fromkeys(found, 0)
    for piece in opened.pieces([standing for standing, _ in {id(one): (one, two) for one, two in told}.values()]):
        counts[id(piece.chunk.standing)] += len(piece.elements)
        for at, begin, count in runs(piece):
            found[id(piece.chunk.standing)][at : at + count] = piece.elements[begin : begin + count]
    for standing, tensor in told:
        assert counts[id(standing)] == tensor.numel()
        assert torch.equal(found[id(standing)].view(tensor.shape), tensor)


# What is on the disk


def test_every_file_is_in_the_manifest_with_its_size_and_digest_and_none_besides(committed):
    for entry in committed.manifest.files:
        data = committed.files[entry.path].read_bytes()
        if entry.digests:
            assert json.loads(committed.files[entry.digests].read_bytes()) == blocks_of(data)
            data_digest = digest(b"".join(map(bytes.fromhex, blocks_of(data)["xxh3_128"])))
        else:
            data_digest = digest(data)
        assert (len(data), data_digest) == (entry.size_bytes, entry.xxh3_128)
    if committed.format.is_folder:
        there = set(committed.store.list(committed.record.name)) - {MANIFEST, CLAIM}
        assert there == set(committed.files)


def test_every_tensor_in_the_manifest_is_in_a_file_of_it(committed):
    assert {file for one in committed.written for of in one.tensors for file in of.files} <= set(committed.files)


def test_a_rank_only_creates_files_and_no_two_ranks_the_same(committed):
    operations = [store.operations for store in committed.counted]
    assert all(one.startswith("create ") for operation in operations for one in operation)
    created = [one for operation in operations for one in operation]
    assert len(set(created)) == len(created) == len(committed.files)


def test_what_is_there_already_is_not_written_over(committed):
    path = committed.record.name
    with pytest.raises(FileExistsError):
        write_now(committed.format, snapshot_of(0), committed.store, path)
    assert committed.faults() == []


def test_the_line_that_reads_it_without_us_does(committed, monkeypatch):
    place = next(iter(committed.files.values()))
    monkeypatch.chdir(place.parent)
    tensors = {"model.layer.weight": torch.zeros(64, 32)}
    known = {"torch": torch, "safetensors": safetensors, "path": place, "tensors": tensors}
    held = eval(committed.format.read_with, known) or {"layer.weight": tensors["model.layer.weight"]}
    weight = held.get("model", held)["layer.weight"]
    assert torch.equal(weight, shared_state()["model"]["layer.weight"])


def test_a_disk_that_fails_at_any_file_fails_the_write_and_leaves_no_half_file(format, tmp_path):
    count = len(Committed(format, tmp_path / "whole").counted[0].operations)
    for moment in range(count):
        store = LocalStore(tmp_path)
        store.make_folder(f"draft-{moment}")
        path = f"draft-{moment}" if format.is_folder else f"draft-{moment}/file"
        with pytest.raises(OSError, match="No space left"):
            write_now(format, snapshot_of(0), FaultyStore(store, fail_at=moment), path)
        assert len(store.list(f"draft-{moment}")) == moment


# What is damaged


def flip(at: float) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        data = bytearray(place.read_bytes())
        data[int((len(data) - 1) * at)] ^= 1
        place.write_bytes(data)

    return damage


def cut(at: float) -> Callable[[Path], None]:
    return lambda place: os.truncate(place, int((place.stat().st_size - 1) * at))


def grown(place: Path) -> None:
    place.write_bytes(place.read_bytes() + b"\0")


def zeroed(place: Path) -> None:
    place.write_bytes(bytes(place.stat().st_size))


def missing(place: Path) -> None:
    place.unlink()


def pipe(place: Path) -> None:
    place.unlink()
    os.mkfifo(place)


def folder(place: Path) -> None:
    place.unlink()
    place.mkdir()


def link(place: Path) -> None:
    place.rename(place.with_name("elsewhere"))
    place.symlink_to("elsewhere")


DAMAGES = {
    **{f"a bit flipped at {at}": flip(at) for at in (0, 0.02, 0.3, 0.6, 0.9, 1)},
    **{f"cut at {at}": cut(at) for at in (0, 0.001, 0.5, 1)},
}
DAMAGES |= {"grown": grown, "zeroed": zeroed, "missing": missing, "a pipe": pipe, "a folder": folder, "a link": link}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_is_damaged_it_is_named_by_the_ranks_that_read_it(format, tmp_path, damage):
    for name in Committed(format, tmp_path / "whole").files:
        committed = Committed(format, tmp_path / f"damaged-{name}")
        assert committed.faults() == []
        DAMAGES[damage](committed.files[name])
        told = committed.faults()
        assert told and all(name in one for one in told), (name, told)


def test_a_file_that_the_manifest_does_not_name_is_not_looked_at(committed):
    place = next(iter(committed.files.values())).parent
    (place / "model.safetensors.bak").write_bytes(b"")
    (place / "rank-00009.json").write_bytes(b"{")
    assert committed.faults() == [] and committed.read(9).own == {}

"""A part of a file is read: it lands where it belongs, and what was read for it is what was committed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distckpt.engine.stager import Stager
from distckpt.errors import DamagedCheckpoint
from distckpt.formats import hashing
from distckpt.formats.safetensors_layout import lay_out
from distckpt.formats.shard_file import ShardFile, Wanted
from distckpt.manifest import FileEntry
from distckpt.stores.local import LocalStore

FILE = "rank-00000.safetensors"
DIGESTS = "rank-00000.digests.json"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a page, so that small files have many."""
    monkeypatch.setattr(hashing, "_LEAST_BLOCK_BYTES", 4096)


def write(folder: Path, tensors: dict[str, Tensor]) -> list[FileEntry]:
    folder.mkdir(exist_ok=True, parents=True)
    stager = Stager()
    staged = stager.take([replace(lay_out(FILE, tensors, {}), digests=DIGESTS)])
    staged.stage()
    try:
        return list(staged.write(LocalStore(folder.parent), folder.name).files)
    finally:
        staged.release()
        stager.close()


def opened(folder: Path, entries: list[FileEntry]) -> ShardFile:
    told = json.loads((folder / DIGESTS).read_bytes())
    return ShardFile(LocalStore(folder.parent), f"{folder.name}/{FILE}", entries[0], told)


def some_tensors() -> dict[str, Tensor]:
    return {name: torch.arange(size, dtype=torch.float32) + size for name, size in (("a", 5000), ("b", 3), ("c", 9000))}


def test_each_block_has_a_digest_and_the_file_has_that_of_these(tmp_path):
    file, digests = write(tmp_path / "one", some_tensors())
    told = json.loads((tmp_path / "one" / DIGESTS).read_bytes())
    assert len(told["xxh3_128"]) == -(-file.size_bytes // 4096) > 10
    assert file.digests == digests.path == DIGESTS and file.xxh3_128 == hashing.digest_of_blocks(told["xxh3_128"])


boxes = st.integers(1, 12).flatmap(
    lambda extent: st.integers(0, extent - 1).flatmap(
        lambda low: st.tuples(st.just(extent), st.just(low), st.integers(1, extent - low))
    )
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_boxes_of_any_tensors_are_read_into_memory_of_any_order(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run") / "one"
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
    shapes = data.draw(st.lists(st.lists(boxes, min_size=0, max_size=3), min_size=1, max_size=5))
    tensors = {
        f"t{nth}": torch.randint(0, 2 if dtype is torch.bool else 100, [one[0] for one in shape]).to(dtype)
        for nth, shape in enumerate(shapes)
    } | {"large": torch.arange(90_000).to(dtype)}
    file = opened(folder, write(folder, tensors))
    wanted: dict[str, list[Wanted]] = {}
    expected: list[tuple[Tensor, Tensor]] = []
    for nth, shape in enumerate(shapes):
        for is_turned in data.draw(st.lists(st.booleans(), max_size=2)):
            low, sizes = tuple(one[1] for one in shape), tuple(one[2] for one in shape)
            target = torch.zeros(sizes[::-1] if is_turned else sizes, dtype=dtype)
            target = target.permute(tuple(range(len(sizes)))[::-1]) if is_turned else target
            whole = tensors[f"t{nth}"]
            wanted.setdefault(f"t{nth}", []).append(Wanted(tuple(whole.shape), low, target))
            expected.append((target, whole[tuple(slice(at, at + size) for at, size in zip(low, sizes, strict=True))]))
    at = data.draw(st.integers(0, 80_000))
    target = torch.zeros(10_000, dtype=dtype)
    wanted["large"] = [Wanted((90_000,), (at,), target)]
    file.fill(wanted, by_all=False)
    expected.append((target, tensors["large"][at : at + 10_000]))
    for found, source in expected:
        assert torch.equal(found, source)


class Counting(LocalStore):
    """Knows which bytes of files were read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read_bytes = 0

    def open(self, path: str):
        return Watched(super().open(path), self)


class Watched:
    def __init__(self, context, store: Counting) -> None:
        self._context, self._store = context, store

    def __enter__(self):
        self._source = self._context.__enter__()
        self.size_bytes = self._source.size_bytes
        return self

    def __exit__(self, *error):
        return self._context.__exit__(*error)

    def read_into(self, target) -> None:
        self._store.read_bytes += len(target)
        self._source.read_into(target)

    def skip(self, count: int) -> None:
        self._source.skip(count)

    def expect(self, ranges, *, by_all=False) -> None:
        self._source.expect(ranges, by_all=by_all)


def test_no_block_is_read_that_is_not_needed(tmp_path):
    folder = tmp_path / "one"
    entries = write(folder, {"a": torch.arange(1_000_000, dtype=torch.float32), "b": torch.ones(5)})
    store = Counting(tmp_path)
    file = ShardFile(store, f"one/{FILE}", entries[0], json.loads((folder / DIGESTS).read_bytes()))
    store.read_bytes = 0
    target = torch.zeros(1000)
    file.fill({"a": [Wanted((1_000_000,), (500_000,), target)]}, by_all=False)
    assert torch.equal(target, torch.arange(500_000, 501_000, dtype=torch.float32))
    assert store.read_bytes <= 4096 + 3 * 4096  # the header, and the blocks that 4000 bytes lie in


def test_a_flipped_bit_is_found_by_who_reads_its_block_and_by_nobody_else(tmp_path):
    folder = tmp_path / "one"
    entries = write(folder, {"a": torch.arange(10_000, dtype=torch.float32)})
    place = folder / FILE
    data = bytearray(place.read_bytes())
    data[4096 + 4 * 9000] ^= 1
    place.write_bytes(data)
    file = opened(folder, entries)
    target = torch.zeros(100)
    file.fill({"a": [Wanted((10_000,), (50,), target)]}, by_all=False)
    assert torch.equal(target, torch.arange(50, 150, dtype=torch.float32))
    with pytest.raises(DamagedCheckpoint, match=r"rank-00000.safetensors.*changed after the commit"):
        file.fill({"a": [Wanted((10_000,), (8990,), target)]}, by_all=False)


@pytest.mark.parametrize("at", [8, 20, 2000])
def test_a_header_that_was_changed_is_found_whatever_is_read(tmp_path, at):
    folder = tmp_path / "one"
    entries = write(folder, {"a": torch.arange(10_000, dtype=torch.float32)})
    place = folder / FILE
    data = bytearray(place.read_bytes())
    data[at] = ord(" ") if data[at] != ord(" ") else ord("\t")
    place.write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match="rank-00000.safetensors"):
        opened(folder, entries).fill({"a": [Wanted((10_000,), (9_990,), torch.zeros(5))]}, by_all=False)


@pytest.mark.parametrize(
    "damage",
    [
        lambda told: told["xxh3_128"].pop(),
        lambda told: told["xxh3_128"].append("0" * 32),
        lambda told: told["xxh3_128"].__setitem__(1, "0" * 32),
        lambda told: told["xxh3_128"].__setitem__(1, 7),
        lambda told: told["xxh3_128"].__setitem__(1, "no digest"),
        lambda told: told.update(block_bytes=8192),
        lambda told: told.update(block_bytes=0),
        lambda told: told.update(block_bytes=5000),
        lambda told: told.update(block_bytes=True),
        lambda told: told.update(xxh3_128="0" * 32),
        lambda told: told.clear(),
    ],
)
def test_digests_that_are_not_those_of_the_file_are_refused(tmp_path, damage):
    folder = tmp_path / "one"
    entries = write(folder, some_tensors())
    told = json.loads((folder / DIGESTS).read_bytes())
    damage(told)
    with pytest.raises(DamagedCheckpoint, match=DIGESTS):
        ShardFile(LocalStore(tmp_path), f"one/{FILE}", entries[0], told)


@pytest.mark.parametrize(
    "wanted, told",
    [
        ({"z": [Wanted((3,), (0,), torch.zeros(1))]}, "does not hold 'z'"),
        ({"b": [Wanted((4,), (0,), torch.zeros(1))]}, "'b' is not what the manifest says"),
        ({"b": [Wanted((3,), (0,), torch.zeros(1, dtype=torch.int32))]}, "'b' is not what the manifest says"),
        ({"b": [Wanted(None, (), torch.zeros(4))]}, "'b' is not what the manifest says"),
    ],
)
def test_a_file_that_does_not_hold_what_the_manifest_says_is_refused(tmp_path, wanted, told):
    folder = tmp_path / "one"
    with pytest.raises(DamagedCheckpoint, match=told):
        opened(folder, write(folder, some_tensors())).fill(wanted, by_all=False)


def test_a_file_that_became_shorter_is_refused(tmp_path):
    folder = tmp_path / "one"
    file = opened(folder, write(folder, some_tensors()))
    with (folder / FILE).open("r+b") as stream:
        stream.truncate(9000)
    with pytest.raises(DamagedCheckpoint, match="has 9000 bytes"):
        file.fill({"c": [Wanted((9000,), (0,), torch.zeros(9000))]}, by_all=False)

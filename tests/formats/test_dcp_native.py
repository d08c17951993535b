"""Tensors of a folder of ``torch.distributed.checkpoint``, read without it."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from every_dtype import of_every_dtype
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import metadata as stock
from torch.distributed.checkpoint.filesystem import _StorageInfo

from distckpt.errors import DamagedCheckpoint
from distckpt.formats.dcp_native import NativeFolder
from distckpt.formats.dcp_reading import OpenedFolder
from distckpt.stores.local import LocalStore

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def save(path: Path, state: Mapping[str, Any], threads: int = 1) -> None:
    dcp.save(dict(state), storage_writer=FileSystemWriter(path, thread_count=threads), no_dist=True)


def read(path: Path, *names: str) -> dict[str, Any]:
    """What is called so there, or all."""
    folder = NativeFolder(LocalStore(path))
    keys = names or (*folder.tensors, *folder.values)
    opened = OpenedFolder(folder, {"part": {key: key for key in keys}})
    state = opened.snapshot.shared["part"]
    targets = {
        key: torch.empty(one.shape, dtype=one.dtype)
        for key, one in state.items()
        if isinstance(one, Tensor) and one.is_meta
    }
    opened.fill([(state[key], target) for key, target in targets.items()])
    return {**state, **targets}


def bits(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return str(value.dtype), tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("threads", [1, 3])
def test_what_torch_saved_is_read_to_the_bit(tmp_path, threads):
    large = {f"large.{nth}": torch.randn(100_000 + nth) for nth in range(5)}
    state = of_every_dtype() | large | {"step": 3, "lr": 0.5, "betas": (0.9, None), "text": "ä"}
    save(tmp_path, state, threads)
    assert len(list(tmp_path.glob("*.distcp"))) == threads
    assert {key: bits(one) for key, one in read(tmp_path).items()} == {key: bits(one) for key, one in state.items()}


def test_parts_are_read_as_they_are_asked_for(tmp_path):
    save(tmp_path, {"a": torch.arange(6).view(2, 3), "b": torch.ones(2)}, threads=2)
    opened = OpenedFolder(NativeFolder(LocalStore(tmp_path)), {"one": {"x": "a", "y": "a"}, "two": {"z": "b"}})
    one = opened.snapshot.shared["one"]
    assert one["x"] is one["y"] and [*opened.snapshot.shared["two"]] == ["z"]
    first, second = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64).t()
    opened.fill([(one["x"], first), (one["y"], second)])
    assert torch.equal(first, torch.arange(6).view(2, 3)) and torch.equal(second, first)
    with pytest.raises(ValueError, match="is no place"):
        opened.fill([(one["x"], torch.zeros(2, 3))])


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch made",)


def test_a_value_that_only_unpickling_could_read_is_left_out_and_told(tmp_path):
    save(tmp_path, {"safe": 1, "code": Runs(), "kind": {"a": [torch.nn.Linear]}})
    folder = NativeFolder(LocalStore(tmp_path))
    opened = OpenedFolder(folder, {"part": {key: key for key in folder.values}})
    assert opened.snapshot.shared == {"part": {"safe": 1}}
    assert set(opened.unread) == {"code", "kind.a"}
    assert "weights_only=True" in opened.unread["code"]
    assert not Path("made").exists()


def test_a_value_that_is_no_file_of_torch_is_left_out_and_told(tmp_path):
    save(tmp_path, {"step": 3})
    file = tmp_path / "__0_0.distcp"
    file.write_bytes(b"?" * file.stat().st_size)
    opened = OpenedFolder(NativeFolder(LocalStore(tmp_path)), {"part": {"step": "step"}})
    assert not opened.snapshot.shared["part"] and "weights_only=True" in opened.unread["step"]


# Folders that are not what they should be


def change(path: Path, work: Callable[[stock.Metadata], None]) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    work(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def chunked(path: Path, *rows: tuple[int, int]) -> None:
    """A folder of a tensor ``w`` of six rows of two numbers, which are the number of their row, in these parts."""
    save(
        path,
        {
            f"part{nth}": (torch.arange(begin, end)[:, None] + torch.zeros(2)).float()
            for nth, (begin, end) in enumerate(rows)
        },
    )

    def join(metadata: stock.Metadata) -> None:
        chunks = [
            stock.ChunkStorageMetadata(torch.Size((begin, 0)), torch.Size((end - begin, 2))) for begin, end in rows
        ]
        places = {index.fqn: info for index, info in metadata.storage_data.items()}
        metadata.storage_data = {
            stock.MetadataIndex("w", one.offsets, nth): places[f"part{nth}"] for nth, one in enumerate(chunks)
        }
        tensor = stock.TensorStorageMetadata(stock.TensorProperties(torch.float32), torch.Size((6, 2)), chunks)
        metadata.state_dict_metadata = {"w": tensor}
        metadata.planner_data = None

    change(path, join)


def test_a_tensor_in_parts_is_read(tmp_path):
    chunked(tmp_path, (4, 6), (0, 1), (1, 4))
    assert read(tmp_path)["w"][:, 1].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "rows, told",
    [
        ([(0, 2), (4, 6)], "4 of its 12 elements are missing"),
        ([(0, 4), (2, 6)], "overlap"),
        ([(0, 2), (1, 3), (4, 6)], "overlap"),
        ([(0, 6), (0, 5)], "overlap"),
        ([(0, 4), (4, 7)], "outside"),
        ([], "12 of its 12 elements are missing"),
    ],
)
def test_parts_that_are_not_all_of_it_once_are_refused(tmp_path, rows, told):
    chunked(tmp_path, *rows)
    with pytest.raises(DamagedCheckpoint, match=rf"/\.metadata: 'w': it is not whole: .*{told}"):
        read(tmp_path)


def test_empty_parts_are_passed_over(tmp_path):
    chunked(tmp_path, (0, 3), (3, 6))

    def add(metadata: stock.Metadata) -> None:
        nowhere = torch.Size((6, 0))
        metadata.state_dict_metadata["w"].chunks.append(stock.ChunkStorageMetadata(nowhere, torch.Size((0, 2))))  # type: ignore[union-attr]
        metadata.storage_data[stock.MetadataIndex("w", nowhere)] = _StorageInfo("__9_0.distcp", 0, 1)

    change(tmp_path, add)
    assert read(tmp_path)["w"][:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def sized(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Callable[[stock.Metadata], None]:
    def work(metadata: stock.Metadata) -> None:
        chunk = stock.ChunkStorageMetadata(torch.Size((0,) * len(size)), torch.Size(size))
        metadata.state_dict_metadata["w"] = stock.TensorStorageMetadata(
            stock.TensorProperties(dtype), torch.Size(size), [chunk]
        )
        (info,) = metadata.storage_data.values()
        metadata.storage_data = {stock.MetadataIndex("w", chunk.offsets): info}

    return work


def moved(**words: Any) -> Callable[[stock.Metadata], None]:
    def work(metadata: stock.Metadata) -> None:
        for info in metadata.storage_data.values():
            vars(info).update(words)

    return work


@pytest.mark.parametrize(
    "work, told",
    [
        (sized((1 << 40, 1 << 10)), r"\.metadata: a part of 'w' needs \d+ bytes, and has \d+"),
        (sized((1 << 58, 2)), "as no tensor has"),
        (sized((2,) * 20), "needs 4194304 bytes"),
        (sized((2, 3), torch.float64), r"__0_0\.distcp, at byte 0: it holds torch.float32"),
        (sized((3, 2)), r"__0_0\.distcp, at byte 0: it holds torch.float32 of \(2, 3\)"),
        (sized((2, 3), torch.qint8), "is of qint8, which cannot be read here"),
        (moved(offset=1 << 62), r"__0_0\.distcp has \d+ bytes: what is in it of 'w' should end at byte"),
        (moved(length=1 << 62), r"__0_0\.distcp has \d+ bytes: what is in it of 'w' should end at byte"),
        (moved(offset=1), r"__0_0\.distcp has \d+ bytes"),
        (moved(length=100), r"__0_0\.distcp, at byte 0: "),
        (moved(length=8), "a part of 'w' needs 24 bytes, and has 8"),
        (moved(relative_path="__1_0.distcp"), r"__1_0\.distcp is missing, in which 'w' lies"),
        (moved(relative_path="../x"), r"\.metadata: 'w' lies in '../x', which is no file of this folder"),
        (moved(relative_path=".metadata"), r"\.metadata has|\.metadata, at byte 0: "),
        (moved(transform_descriptors=["zstd"]), r"\.metadata: 'w' was transformed by zstd"),
    ],
)
def test_what_cannot_be_there_is_refused_before_memory_is_taken(tmp_path, work, told):
    save(tmp_path, {"w": torch.randn(2, 3)})
    change(tmp_path, work)
    with pytest.raises(DamagedCheckpoint, match=told):
        read(tmp_path)


def test_items_in_one_another_are_refused(tmp_path):
    save(tmp_path, {"a": torch.randn(2, 3), "b": torch.randn(2, 3)})

    def nest(metadata: stock.Metadata) -> None:
        one, other = metadata.storage_data.values()
        one.offset, other.offset = 0, 100

    change(tmp_path, nest)
    with pytest.raises(DamagedCheckpoint, match=r"__0_0\.distcp, at byte 100: what lies there is in what lies before"):
        read(tmp_path)


def test_a_file_that_is_a_pipe_does_not_hang(tmp_path):
    save(tmp_path, {"a": torch.randn(2, 3)})
    (tmp_path / "__0_0.distcp").unlink()
    os.mkfifo(tmp_path / "__0_0.distcp")
    with pytest.raises(OSError, match="__0_0"):
        read(tmp_path)


def test_a_truncated_file_is_refused_by_its_name(tmp_path):
    save(tmp_path, {"a": torch.randn(2, 3), "b": torch.randn(50_000)})
    file = tmp_path / "__0_0.distcp"
    data = file.read_bytes()
    for count in (0, 1, 1000, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:count])
        with pytest.raises(DamagedCheckpoint, match=r"__0_0\.distcp"):
            read(tmp_path)


def test_truncated_metadata_are_refused_by_their_name(tmp_path):
    save(tmp_path, {"a": torch.randn(2, 3)})
    data = (tmp_path / ".metadata").read_bytes()
    for count in range(0, len(data), 11):
        (tmp_path / ".metadata").write_bytes(data[:count])
        with pytest.raises(DamagedCheckpoint, match=r"/\.metadata: "):
            NativeFolder(LocalStore(tmp_path))


def test_no_bit_of_the_metadata_that_flipped_changes_what_a_tensor_is(tmp_path):
    """It is found; or the tensor is not there by its name; or it is what it was."""
    state = {"weight": torch.randn(3, 4), "bias": torch.arange(5), "step": torch.tensor(7)}
    save(tmp_path, state, threads=2)
    data = bytearray((tmp_path / ".metadata").read_bytes())
    found = 0
    for at in range(len(data)):
        bit = 1 << random.Random(at).randrange(8)
        data[at] ^= bit
        (tmp_path / ".metadata").write_bytes(data)
        data[at] ^= bit
        try:
            folder = NativeFolder(LocalStore(tmp_path))
            read_back = read(tmp_path, *folder.tensors)
        except DamagedCheckpoint:
            found += 1
            continue
        for name, tensor in state.items():
            assert name not in read_back or bits(read_back[name]) == bits(tensor), f"{name}, byte {at}"
    assert found > len(data) // 2

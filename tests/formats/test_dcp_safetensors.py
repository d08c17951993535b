"""Tensors of a folder of safetensors files, whole or in parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from every_dtype import of_every_dtype
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from distckpt.errors import DamagedCheckpoint
from distckpt.formats.dcp_reading import OpenedFolder
from distckpt.formats.dcp_safetensors import SafetensorsFolder
from distckpt.formats.shard_file import Wanted
from distckpt.stores.local import LocalStore

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def part(path: Path, name: str, offsets: Mapping[str, tuple[int, ...]] | None, tensors: Mapping[str, Tensor]) -> None:
    """A file of parts of tensors, as torch writes it."""
    told = {key: {"saved_offsets": at} for key, at in (offsets or {}).items()}
    metadata = {"format": "pt"} if offsets is None else {"format": "pt", "DCP_SHARDING_INFO": json.dumps(told)}
    safetensors.torch.save_file({key: one.contiguous() for key, one in tensors.items()}, path / name, metadata)


def opened(
    path: Path, files: Mapping[str, frozenset[str] | None] | None = None
) -> tuple[SafetensorsFolder, OpenedFolder]:
    names = files or dict.fromkeys(sorted(one.name for one in path.glob("*.safetensors")))
    folder = SafetensorsFolder(LocalStore(path), names)
    return folder, OpenedFolder(folder, {"part": {key: key for key in folder.tensors}})


def read(path: Path, files: Mapping[str, frozenset[str] | None] | None = None) -> dict[str, Tensor]:
    _, one = opened(path, files)
    state = one.snapshot.shared["part"]
    targets = {key: torch.empty(stand.shape, dtype=stand.dtype) for key, stand in state.items()}
    one.fill([(state[key], target) for key, target in targets.items()])
    return targets


def bits(tensor: Tensor) -> Any:
    return str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_what_safetensors_wrote_is_read_to_the_bit(tmp_path):
    tensors = of_every_dtype() | {"large": torch.randn(300, 400)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert {key: bits(one) for key, one in read(tmp_path).items()} == {key: bits(one) for key, one in tensors.items()}


def test_what_torch_wrote_is_read_to_the_bit(tmp_path):
    tensors = {f"layer.{nth}": torch.randn(40 + nth, 3) for nth in range(4)} | {"count": torch.tensor(5)}
    files = {"layer.0": 1, "layer.1": 2, "layer.2": 1, "layer.3": 3, "count": 3}
    writer = HuggingFaceStorageWriter(str(tmp_path), files, save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) == 3
    folder, _ = opened(tmp_path)
    assert folder.is_sharded
    assert {key: bits(one) for key, one in read(tmp_path).items()} == {key: bits(one) for key, one in tensors.items()}


def rows(path: Path, *parts: tuple[int, int]) -> Tensor:
    """Files with these rows each of a tensor ``w``, and the tensor."""
    whole = torch.randn(8, 5)
    for nth, (begin, end) in enumerate(parts):
        part(path, f"shard-{nth}.safetensors", {"w": (begin, 0)}, {"w": whole[begin:end]})
    return whole


def test_a_tensor_in_parts_is_read(tmp_path):
    whole = rows(tmp_path, (5, 8), (0, 1), (1, 5))
    assert torch.equal(read(tmp_path)["w"], whole)


def test_boxes_that_make_no_grid_are_read(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    boxes = [(0, 0, 1, 4), (0, 4, 2, 2), (1, 0, 3, 1), (1, 1, 3, 3), (2, 4, 2, 2)]
    for nth, (row, column, height, width) in enumerate(boxes):
        box = whole[row : row + height, column : column + width]
        part(tmp_path, f"{nth}.safetensors", {"w": (row, column)}, {"w": box})
    assert torch.equal(read(tmp_path)["w"], whole)


def test_of_a_file_only_the_rows_are_read_that_are_wanted(tmp_path):
    whole = rows(tmp_path, (0, 8))
    folder, _ = opened(tmp_path)
    file = tmp_path / "shard-0.safetensors"
    data = bytearray(file.read_bytes())
    data[-5 * 4 * 2 :] = b"?" * 40  # the last two rows
    file.write_bytes(data)
    (piece,) = folder.tensor("w").pieces_in((1, 1), (4, 2))
    assert (piece.low, piece.begins, piece.shared) == ((1, 1), (0, 0), (4, 2))
    target = torch.empty(4, 2)
    folder.fill(piece.place.file, {piece.place: [Wanted(piece.sizes, piece.low, target)]})
    assert torch.equal(target, whole[1:5, 1:3])


@pytest.mark.parametrize(
    "parts, told",
    [
        ([(0, 3), (5, 8)], "10 of its 40 elements are missing"),
        ([(2, 8)], "10 of its 40 elements are missing"),
        ([(0, 4), (3, 8)], "overlap"),
        ([(0, 8), (0, 8)], "overlap"),
    ],
)
def test_parts_that_are_not_all_of_it_once_are_refused(tmp_path, parts, told):
    rows(tmp_path, *parts)
    with pytest.raises(DamagedCheckpoint, match=rf"{tmp_path}: 'w': it is not whole: .*{told}"):
        read(tmp_path)


def test_one_key_of_two_files_that_say_no_offsets_is_refused(tmp_path):
    for name in ("a", "b"):
        part(tmp_path, f"{name}.safetensors", None, {"w": torch.ones(2)})
    with pytest.raises(DamagedCheckpoint, match="parts of it overlap"):
        read(tmp_path)


@pytest.mark.parametrize(
    "offsets",
    ["text", "[]", "{}", '{"w": 3}', '{"w": {"saved_offsets": [0]}}', '{"w": {"saved_offsets": [-1, 0]}}',
     '{"w": {"saved_offsets": [0, 1e3]}}', '{"w": {"saved_offsets": [true, 0]}}', '{"w": {"saved_offsets": [0, 2e99]}}',
     '{"w": {"saved_offsets": [1152921504606846976, 0]}}', '{"w": {"saved_offsets": null}}'],
)  # fmt: skip
def test_offsets_that_cannot_be_are_refused_by_the_file(tmp_path, offsets):
    safetensors.torch.save_file({"w": torch.ones(2, 3)}, tmp_path / "a.safetensors", {"DCP_SHARDING_INFO": offsets})
    with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors: what its DCP_SHARDING_INFO says"):
        opened(tmp_path)


def test_offsets_far_out_are_missing_elements_and_no_memory(tmp_path):
    part(tmp_path, "a.safetensors", {"w": (1 << 50, 0)}, {"w": torch.ones(2, 3)})
    with pytest.raises(DamagedCheckpoint, match="elements are missing"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "other, told",
    [(torch.ones(2, 3).double(), "another dtype in b.safetensors"), (torch.ones(2), "numbers of dimensions")],
)
def test_parts_of_another_kind_are_refused(tmp_path, other, told):
    part(tmp_path, "a.safetensors", {"w": (0, 0)}, {"w": torch.ones(2, 3)})
    part(tmp_path, "b.safetensors", {"w": (2,) + (0,) * (other.ndim - 1)}, {"w": other})
    with pytest.raises(DamagedCheckpoint, match=told):
        opened(tmp_path)


def test_only_what_an_index_names_is_there(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(2), "x": torch.ones(3)}, tmp_path / "a.safetensors")
    assert [*read(tmp_path, {"a.safetensors": frozenset({"w"})})] == ["w"]
    with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors does not hold 'y', and its index says so"):
        opened(tmp_path, {"a.safetensors": frozenset({"w", "y"})})
    with pytest.raises(DamagedCheckpoint, match=r"b\.safetensors is missing"):
        opened(tmp_path, {"a.safetensors": frozenset({"w"}), "b.safetensors": frozenset({"z"})})


@pytest.mark.parametrize("count", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused_by_its_name(tmp_path, count):
    safetensors.torch.save_file({"w": torch.ones(200)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:count])
    with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors is no whole safetensors file"):
        opened(tmp_path)


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(200)}, tmp_path / "a.safetensors")
    _, one = opened(tmp_path)
    safetensors.torch.save_file({"v": torch.ones(200)}, tmp_path / "a.safetensors")
    with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors changed while it was read"):
        one.fill([(one.snapshot.shared["part"]["w"], torch.empty(200))])

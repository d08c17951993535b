"""Where in a folder lies what another library saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from distckpt.errors import DamagedCheckpoint, NoCheckpoint
from distckpt.foreign import find
from distckpt.formats.dcp_native import NativeFolder
from distckpt.formats.dcp_safetensors import SafetensorsFolder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

INDEX = "model.safetensors.index.json"


def native(path: Path, *names: str) -> None:
    dcp.save({name: torch.ones(2) for name in names or ("w",)}, storage_writer=FileSystemWriter(path), no_dist=True)


def weights(path: Path, *names: str, info: dict[str, Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = None if info is None else {"DCP_SHARDING_INFO": json.dumps(info)}
    safetensors.torch.save_file({name: torch.ones(2) for name in names or ("w",)}, path, notes)


def index(path: Path, **lies_in: Any) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": lies_in}))


@pytest.mark.parametrize(
    "inside",
    [
        "",
        "checkpoint/step-20",
        "step-20",
        "checkpoint-20/pytorch_model_fsdp_0",
        "pytorch_model_fsdp_0",
        "checkpoint_20/pytorch_model_fsdp_3",
        "checkpoint",
        "global_step20",
    ],
)
def test_a_folder_of_torch_is_found_wherever_libraries_put_it(tmp_path, inside):
    native(tmp_path / inside)
    found = find(tmp_path)
    assert isinstance(found, NativeFolder) and Path(found.url) == tmp_path / inside


def test_of_several_steps_the_newest_by_number_is_taken_that_is_whole(tmp_path):
    for step in (9, 100, 20):
        native(tmp_path / f"checkpoint/step-{step}")
    native(tmp_path / "checkpoint/step-1000")
    (tmp_path / "checkpoint/step-1000/.metadata").unlink()
    (tmp_path / "checkpoint/step-5000").mkdir()
    (tmp_path / "checkpoint/step-5000-tmp").mkdir()
    (tmp_path / "checkpoint/step-99999").write_text("a file")
    assert Path(find(tmp_path).url).name == "step-100"
    assert Path(find(tmp_path / "checkpoint" / "step-9").url).name == "step-9"


def test_an_optimizer_beside_a_model_of_accelerate_is_not_taken_for_it(tmp_path):
    native(tmp_path / "optimizer_0")
    with pytest.raises(NoCheckpoint):
        find(tmp_path)
    native(tmp_path / "pytorch_model_fsdp_0")
    assert Path(find(tmp_path).url).name == "pytorch_model_fsdp_0"


def test_several_models_of_accelerate_are_refused_by_their_names(tmp_path):
    for nth in (0, 1):
        native(tmp_path / f"pytorch_model_fsdp_{nth}")
    with pytest.raises(NoCheckpoint, match="which is meant: pytorch_model_fsdp_0, pytorch_model_fsdp_1"):
        find(tmp_path)


def test_a_folder_in_itself_does_not_hang(tmp_path):
    (tmp_path / "checkpoint").symlink_to(".")
    with pytest.raises(NoCheckpoint):
        find(tmp_path)


def test_metadata_of_single_ranks_are_refused_with_the_reason(tmp_path):
    native(tmp_path)
    (tmp_path / ".metadata").rename(tmp_path / "__0.metadata")
    with pytest.raises(NoCheckpoint, match="use_collectives=False"):
        find(tmp_path)


def test_one_safetensors_file_is_the_model_whatever_it_is_called(tmp_path):
    weights(tmp_path / "adapter_model.safetensors")
    found = find(tmp_path)
    assert isinstance(found, SafetensorsFolder) and [*found.tensors] == ["w"]


def test_the_file_that_is_called_model_is_taken_among_others(tmp_path):
    weights(tmp_path / "model.safetensors", "w")
    weights(tmp_path / "consolidated.safetensors", "other")
    assert [*find(tmp_path).tensors] == ["w"]


def test_an_index_says_which_files_and_what_of_them(tmp_path):
    weights(tmp_path / "model-00001-of-00002.safetensors", "a", "b")
    weights(tmp_path / "model-00002-of-00002.safetensors", "c")
    weights(tmp_path / "consolidated.safetensors", "a")
    index(tmp_path, a="model-00001-of-00002.safetensors", c="model-00002-of-00002.safetensors")
    assert sorted(find(tmp_path).tensors) == ["a", "c"]


def test_files_without_an_index_are_the_model_if_all_are_there(tmp_path):
    for nth in (1, 2, 3):
        weights(tmp_path / f"model-0000{nth}-of-00003.safetensors", f"w{nth}")
    assert sorted(find(tmp_path).tensors) == ["w1", "w2", "w3"]
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"model-00002-of-00003\.safetensors is missing"):
        find(tmp_path)


def test_a_count_of_files_that_cannot_be_takes_no_time(tmp_path):
    weights(tmp_path / "model-00001-of-99999.safetensors")
    with pytest.raises(DamagedCheckpoint, match=r"model-00002-of-99999\.safetensors is missing"):
        find(tmp_path)


def test_shards_of_torch_are_the_model_whatever_they_are_called(tmp_path):
    for nth in (0, 1):
        weights(tmp_path / f"part{nth}.safetensors", info={"w": {"saved_offsets": [2 * nth]}})
    assert find(tmp_path).tensor("w").shape == (4,)


def test_shards_beside_nothing_else_are_found_in_their_folder(tmp_path):
    for nth in (1, 2):
        weights(
            tmp_path / f"sharded/shard-0000{nth}-model-00001-of-00001.safetensors",
            info={"w": {"saved_offsets": [2 * nth - 2]}},
        )
    assert find(tmp_path).tensor("w").shape == (4,)


def test_files_that_may_be_several_models_are_refused_by_their_names(tmp_path):
    for name in ("a", "b"):
        weights(tmp_path / f"{name}.safetensors", name)
    with pytest.raises(NoCheckpoint, match=r"say which file is meant: a\.safetensors, b\.safetensors"):
        find(tmp_path)


@pytest.mark.parametrize(
    "file", ["../a.safetensors", "/a.safetensors", "sub/a.safetensors", "a.bin", "", 3, None, "a\0.safetensors"]
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path, file):
    weights(tmp_path / "a.safetensors")
    index(tmp_path, w=file)
    with pytest.raises(DamagedCheckpoint, match=r"index\.json: .* is no safetensors file of this folder"):
        find(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": NaN}}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    weights(tmp_path / "a.safetensors")
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors\.index\.json"):
        find(tmp_path)


def test_links_are_followed_as_the_cache_of_hugging_face_needs(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    weights(blobs / "123")
    index(blobs, w="model-00001-of-00001.safetensors")
    (blobs / INDEX).rename(blobs / "456")
    (snapshot / "model-00001-of-00001.safetensors").symlink_to("../../blobs/123")
    (snapshot / INDEX).symlink_to("../../blobs/456")
    assert [*find(snapshot).tensors] == ["w"]


def nothing(path: Path) -> None:
    path.mkdir()


def other_files(path: Path) -> None:
    path.mkdir()
    (path / "pytorch_model.bin").write_bytes(b"")
    (path / "step-").mkdir()


def uncommitted(path: Path) -> None:
    """A save of ours that was killed: whole files of tensors, and no record."""
    weights(path / "step-00000010" / "model.safetensors")
    (path / "step-00000010" / "claim.json").write_text("{}")


def uncommitted_shards(path: Path) -> None:
    weights(path / "rank-00000.safetensors", info={"w": {"saved_offsets": [0]}})


@pytest.mark.parametrize("make", [nothing, other_files, uncommitted, uncommitted_shards])
def test_where_there_is_none_is_an_error_that_says_what_was_looked_for(tmp_path, make: Callable[[Path], None]):
    make(tmp_path / "there")
    with pytest.raises(NoCheckpoint, match=r"there holds no committed checkpoint, and none of another library"):
        find(tmp_path / "there")


def test_a_link_that_leads_nowhere_is_an_error_with_its_name(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors is missing"):
        find(tmp_path)

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
from distckpt.formats.pth_folder import PthFolder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def native(path: Path, *names: str) -> None:
    dcp.save({name: torch.ones(2) for name in names or ("w",)}, storage_writer=FileSystemWriter(path), no_dist=True)


def weights(path: Path, *names: str, info: dict[str, Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = None if info is None else {"DCP_SHARDING_INFO": json.dumps(info)}
    safetensors.torch.save_file({name: torch.ones(2) for name in names or ("w",)}, path, notes)


def pickled(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: torch.ones(2) for name in names or ("w",)}, path)


def index(path: Path, whole: str = "model.safetensors", **lies_in: Any) -> None:
    told = {"metadata": {"total_size": 8}, "weight_map": lies_in}
    (path / f"{whole}.index.json").write_text(json.dumps(told))


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


@pytest.mark.parametrize("whole", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("file", ["../a{}", "/a{}", "sub/a{}", "{}/", "a.pth", "", "..", 3, None, "a\0{}"])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path, file, whole):
    suffix = Path(whole).suffix
    (tmp_path / "there").mkdir()
    for place in (tmp_path / f"a{suffix}", tmp_path / "there" / f"a{suffix}", tmp_path / f"there/sub/a{suffix}"):
        (pickled if suffix == ".bin" else weights)(place)
    index(tmp_path / "there", whole, w=file.format(suffix) if isinstance(file, str) else file)
    with pytest.raises(DamagedCheckpoint, match=rf"{whole}\.index\.json: .* is no {suffix} file of this folder"):
        find(tmp_path / "there")


@pytest.mark.parametrize("whole", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": NaN}}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(tmp_path, text, whole):
    (tmp_path / f"{whole}.index.json").write_text(text)
    (tmp_path / f"other{Path(whole).suffix}").touch()
    with pytest.raises(DamagedCheckpoint, match=rf"{whole}\.index\.json"):
        find(tmp_path)


# Of before there was safetensors


def test_a_pickled_model_is_found_beside_pickles_of_all_else_wherever_the_trainer_put_it(tmp_path):
    for number in (20, 100):
        pickled(tmp_path / f"checkpoint-{number}/pytorch_model.bin", f"of {number}")
        pickled(tmp_path / f"checkpoint-{number}/optimizer.bin", "state")
    pickled(tmp_path / "checkpoint-1000/training_args.bin", "other")
    found = find(tmp_path)
    assert isinstance(found, PthFolder) and found.tensors == ["of 100"] and found.values == []
    assert Path(found.url).name == "checkpoint-100"


def test_an_index_says_which_pickles_and_what_of_them(tmp_path):
    pickled(tmp_path / "pytorch_model-00001-of-00002.bin", "a", "b")
    pickled(tmp_path / "pytorch_model-00002-of-00002.bin", "c")
    pickled(tmp_path / "pytorch_model.bin", "other")
    names = {"a": "pytorch_model-00001-of-00002.bin", "c": "pytorch_model-00002-of-00002.bin"}
    index(tmp_path, "pytorch_model.bin", **names)
    assert find(tmp_path).tensors == ["a", "c"]
    index(tmp_path, "pytorch_model.bin", **{**names, "d": names["c"]})
    with pytest.raises(DamagedCheckpoint, match=r"-00002-of-00002\.bin does not hold 'd', and its index says so"):
        find(tmp_path)
    index(tmp_path, "pytorch_model.bin", **{**names, "d": "pytorch_model-3.bin"})
    with pytest.raises(DamagedCheckpoint, match=r"pytorch_model-3\.bin is missing"):
        find(tmp_path)


def test_pickles_without_an_index_are_the_model_if_all_are_there_and_none_holds_what_another_does(tmp_path):
    for nth in (1, 2):
        pickled(tmp_path / f"pytorch_model-0000{nth}-of-00002.bin", f"w{nth}")
    pickled(tmp_path / "optimizer-00001-of-00009.bin", "state")
    assert find(tmp_path).tensors == ["w1", "w2"]
    pickled(tmp_path / "pytorch_model-00002-of-00002.bin", "w1")
    with pytest.raises(DamagedCheckpoint, match=r"-00002-of-00002\.bin holds 'w1', and so does another file"):
        find(tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"pytorch_model-00002-of-00002\.bin is missing"):
        find(tmp_path)


def test_where_there_are_both_no_pickle_is_read(tmp_path):
    pickled(tmp_path / "pytorch_model.bin")
    weights(tmp_path / "model.safetensors")
    assert isinstance(find(tmp_path), SafetensorsFolder)


def test_a_pickle_may_be_a_link_as_in_the_cache_of_hugging_face(tmp_path):
    pickled(tmp_path / "blobs/123")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/pytorch_model.bin").symlink_to("../blobs/123")
    assert find(tmp_path / "snapshot").tensors == ["w"]


def test_links_are_followed_as_the_cache_of_hugging_face_needs(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    weights(blobs / "123")
    index(blobs, w="model-00001-of-00001.safetensors")
    (blobs / "model.safetensors.index.json").rename(blobs / "456")
    (snapshot / "model-00001-of-00001.safetensors").symlink_to("../../blobs/123")
    (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/456")
    assert [*find(snapshot).tensors] == ["w"]


def nothing(path: Path) -> None:
    path.mkdir()


def other_files(path: Path) -> None:
    path.mkdir()
    (path / "training_args.bin").write_bytes(b"")
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

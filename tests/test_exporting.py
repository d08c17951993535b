"""A checkpoint becomes files that others read: exact, whole or not there, in little memory."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from every_dtype import of_every_dtype
from flows import write_now
from sharded_programs import Holder
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import distckpt
from distckpt import attempt
from distckpt.catalog import Catalog
from distckpt.exporting import export
from distckpt.formats import Snapshot
from distckpt.formats.pth import Pth
from distckpt.formats.streaming import PIECE_BYTES
from distckpt.manifest import Manifest
from distckpt.progress import Progress
from distckpt.stores.local import LocalStore

FORMATS = ("full", "sharded")


def save(run: Path, format: str, steps: int = 1, **state: Any) -> Path:
    with distckpt.Checkpointer(run, state, format=format, save_last=False) as ckpt:
        for _ in range(steps):
            ckpt.step()
            ckpt.save(wait=True)
    return run


def weights() -> dict[str, Tensor]:
    """All kinds of numbers, one of which is longer than a piece, and two names of one tensor."""
    torch.manual_seed(0)
    large = torch.randn(3, PIECE_BYTES // 8 + 5)
    return {
        "large": large,
        **of_every_dtype(),
        "scalar": torch.tensor(7),
        "tied": large,
        "turned": torch.randn(3, 5).t(),
    }


def optimizer_state() -> dict[str, Any]:
    return {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 5)}, 1: {}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "foreach": None, "params": [0, 1]}],
    }


@pytest.fixture(params=FORMATS)
def run(request, tmp_path) -> Path:
    """A run of one checkpoint, in either format."""
    return save(tmp_path / "run", request.param, model=Holder(weights()), optimizer=Holder(optimizer_state()))


def same(one: Tensor, other: Tensor) -> bool:
    """Equal to the last bit, NaN or not."""
    is_alike = one.dtype == other.dtype and one.shape == other.shape
    return is_alike and torch.equal(*(each.contiguous().view(-1).view(torch.uint8) for each in (one, other)))


def all_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(same(found[key], one) for key, one in expected.items())


def load_dcp(target: Path, state: dict[str, Any]) -> None:
    dcp.load(state, storage_reader=dcp.FileSystemReader(target), no_dist=True)


# What is written is read by others


@pytest.mark.parametrize("mmap", [False, True])
def test_a_pth_is_what_the_part_was_for_plain_torch(run, tmp_path, mmap):
    target = tmp_path / "model.pth"
    export(run, target, to="pth")
    held = torch.load(target, weights_only=True, mmap=mmap)
    assert list(held) == list(weights()) and all_same(held, weights())
    assert held["tied"].data_ptr() == held["large"].data_ptr()
    assert zipfile.ZipFile(target).testzip() is None


def test_a_pth_holds_what_is_no_tensor_too(run, tmp_path):
    export(run, tmp_path / "optimizer.pth", part="optimizer")
    held, expected = torch.load(tmp_path / "optimizer.pth", weights_only=True), optimizer_state()
    assert held["param_groups"] == expected["param_groups"] and held["state"][1] == {}
    assert held["state"][0]["step"] == 3.0


def test_a_pth_of_all_parts_has_each_under_its_name(run, tmp_path):
    export(run, tmp_path / "all.pth", to="pth", part=None)
    held = torch.load(tmp_path / "all.pth", weights_only=True)
    assert list(held) == ["model", "optimizer"] and all_same(held["model"], weights())


def test_a_safetensors_file_has_the_tensors_by_their_names_and_tied_ones_once(run, tmp_path):
    told = export(run, tmp_path / "model.safetensors")
    expected = weights()
    del expected["tied"]
    assert all_same(safetensors.torch.load_file(tmp_path / "model.safetensors"), expected)
    assert told.tensors == len(expected) + 1 and told.left_out == () and told.step == 1
    assert told.total_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_load_model_of_safetensors_ties_what_was_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight

    trained, other = Tied(), Tied()
    export(save(tmp_path / "run", "full", model=trained), tmp_path / "model.safetensors")
    safetensors.torch.load_model(other, tmp_path / "model.safetensors")
    assert all_same(dict(other.state_dict()), dict(trained.state_dict()))


def test_a_part_that_is_nested_has_keys_with_dots_and_what_is_no_tensor_is_told(run, tmp_path, caplog):
    caplog.set_level(logging.INFO, "distckpt")
    told = export(run, tmp_path / "optimizer.safetensors", part="optimizer")
    assert sorted(safetensors.torch.load_file(tmp_path / "optimizer.safetensors")) == [
        "state.0.exp_avg",
        "state.0.step",
    ]
    assert told.left_out == ("param_groups",) and "not exported: param_groups" in caplog.text


@pytest.mark.parametrize("part", ["model", None])
def test_plain_dcp_loads_each_part_under_its_name(run, tmp_path, part):
    export(run, tmp_path / "dcp", to="dcp", part=part)
    expected = weights()
    state = {"model": {key: torch.empty_like(one) for key, one in expected.items()}}
    load_dcp(tmp_path / "dcp", state)
    assert all_same(state["model"], expected)


def test_plain_dcp_loads_what_is_no_tensor_too(run, tmp_path):
    export(run, tmp_path / "dcp", to="dcp", part="optimizer")
    state = optimizer_state()
    state["param_groups"][0] = {"lr": 0.0, "betas": None, "foreach": True, "params": []}
    load_dcp(tmp_path / "dcp", {"optimizer": state})
    assert state["param_groups"] == optimizer_state()["param_groups"]


def test_plain_dcp_makes_one_file_of_torch_save_of_it(run, tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    export(run, tmp_path / "dcp", to="dcp", part=None)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "all.pth")
    held = torch.load(tmp_path / "all.pth", weights_only=True)
    assert all_same(held["model"], weights()) and held["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("format", FORMATS)
def test_values_of_rare_types_become_what_plain_torch_reads(tmp_path, format):
    kinds = {
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "ordered": OrderedDict(b=torch.tensor(1), a=torch.tensor([2.0])),
        "pair": (torch.tensor([1, 2]), "word"),
        "queue": deque([1, 2], 5),
        "names": frozenset({"a"}),
        "size": torch.Size([1, 2]),
        "wide": torch.tensor([1 + 2j], dtype=torch.complex128),
        "nothing": None,
        "bytes": b"\0\1",
        "dtype": torch.bfloat16,
        (1, 2): {"deep": [[torch.tensor(True)]]},
    }
    run = save(tmp_path / "run", format, model=Holder(kinds))
    export(run, tmp_path / "model.pth", to="pth")
    held = torch.load(tmp_path / "model.pth", weights_only=True)
    assert same(held["array"], torch.from_numpy(kinds["array"])) and list(held["ordered"]) == ["b", "a"]
    assert same(held["pair"][0], torch.tensor([1, 2])) and held["pair"][1] == "word"
    assert (held["queue"], held["names"], held["size"]) == ([1, 2], {"a"}, torch.Size([1, 2]))
    assert same(held["wide"], kinds["wide"]) and held[1, 2]["deep"][0][0] and held["dtype"] is torch.bfloat16
    export(run, tmp_path / "dcp", to="dcp")
    state: dict[str, Any] = {
        "model": {
            **{
                key: torch.zeros(kinds[key].shape, dtype=torch.from_numpy(np.array(kinds[key])).dtype)
                for key in ["array"]
            },
            "pair": [torch.zeros(2, dtype=torch.int64), ""],
            "wide": torch.zeros(1, dtype=torch.complex128),
        }
    }
    load_dcp(tmp_path / "dcp", state)
    assert same(state["model"]["array"], torch.from_numpy(kinds["array"])) and same(
        state["model"]["wide"], kinds["wide"]
    )
    assert same(state["model"]["pair"][0], kinds["pair"][0]) and state["model"]["pair"][1] == "word"


def test_what_safetensors_has_no_word_for_is_named(tmp_path):
    run = save(tmp_path / "run", "full", model=Holder({"wide": torch.ones(2, dtype=torch.complex128)}))
    with pytest.raises(ValueError, match=r'wide is of torch.complex128, .* export it to "pth" or "dcp"'):
        export(run, tmp_path / "model.safetensors")


@pytest.mark.parametrize("to", ["pth", "safetensors", "hf", "dcp"])
def test_a_part_without_tensors_and_one_without_anything_can_be_exported(tmp_path, to):
    run = save(tmp_path / "run", "sharded", model=Holder({}), scheduler=Holder({"last_epoch": 3}))
    for part in ("model", "scheduler"):
        told = export(run, tmp_path / f"{part}-{to}", to=to, part=part)
        assert told.tensors == 0 and (tmp_path / f"{part}-{to}").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_float8_scales_that_a_checkpoint_holds_as_bytes_are_such_again(tmp_path, format):
    scales = torch.arange(6, dtype=torch.uint8).view(torch.float8_e8m0fnu).view(2, 3)
    run = save(tmp_path / "run", format, model=Holder({"scales": scales}))
    export(run, tmp_path / "out.safetensors")
    assert all_same(safetensors.torch.load_file(tmp_path / "out.safetensors"), {"scales": scales})


# dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
@pytest.mark.parametrize("to", ["pth", "safetensors", "dcp"])
def test_floating_tensors_are_cast_and_others_are_not(run, tmp_path, to, dtype):
    target = tmp_path / "cast"
    export(run, target, to=to, dtype=dtype)
    expected = {key: one.to(torch.bfloat16) if one.is_floating_point() else one for key, one in weights().items()}
    if to == "dcp":
        found = {"model": {key: torch.empty_like(one) for key, one in expected.items()}}
        load_dcp(target, found)
        assert all_same(found["model"], expected)
    elif to == "pth":
        assert all_same(torch.load(target, weights_only=True), expected)
    else:
        del expected["tied"]
        assert all_same(safetensors.torch.load_file(target), expected)


@pytest.mark.parametrize("dtype", ["int8", "torch", "no such", "float4_e2m1fn_x2", 16, float, torch.int32, ""])
def test_a_dtype_that_is_none_is_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match="dtype should be a floating one such as 'bfloat16'"):
        export(tmp_path, tmp_path / "out", dtype=dtype)


# Hugging Face


@pytest.fixture(scope="module")
def transformers():
    import transformers

    return transformers


def tiny(transformers, kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=100, n_positions=16)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
        )
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("max_shard_bytes", [None, 20_000])
def test_transformers_loads_what_was_exported(transformers, tmp_path, kind, format, max_shard_bytes):
    model = tiny(transformers, kind)
    model.config.save_pretrained(tmp_path / "config")
    run = save(tmp_path / "run", format, model=model)
    target = tmp_path / "hf"
    export(run, target, to="hf", max_shard_bytes=max_shard_bytes, config_from=tmp_path / "config")
    assert (target / "model.safetensors").exists() is (max_shard_bytes is None)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(report.values()) and all_same(dict(loaded.state_dict()), dict(model.state_dict()))
    words = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded.eval()(words).logits, model.eval()(words).logits)
    is_tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert is_tied is (kind == "gpt2")
    base = transformers.AutoModel.from_pretrained(target)
    assert torch.equal(base.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_shards_are_no_larger_than_was_said_and_the_index_names_each_tensor(transformers, tmp_path):
    model = tiny(transformers, "gpt2")
    run = save(tmp_path / "run", "full", model=model)
    export(run, tmp_path / "hf", to="hf", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert files == [f"model-{nth:05d}-of-{len(files):05d}.safetensors" for nth in range(1, len(files) + 1)]
    held = {name: safetensors.torch.load_file(tmp_path / "hf" / name) for name in files}
    assert index["weight_map"] == {key: name for name in files for key in held[name]}
    assert all(sum(one.nbytes for one in shard.values()) <= 20_000 or len(shard) == 1 for shard in held.values())
    assert index["metadata"]["total_size"] == sum(one.nbytes for shard in held.values() for one in shard.values())
    expected = dict(model.state_dict())
    del expected["lm_head.weight"]
    assert all_same({key: one for shard in held.values() for key, one in shard.items()}, expected)


def test_a_cast_is_noted_in_the_config_so_that_it_is_loaded_so(transformers, tmp_path):
    model = tiny(transformers, "llama")
    model.config.save_pretrained(tmp_path / "config")
    run = save(tmp_path / "run", "full", model=model)
    export(run, tmp_path / "hf", to="hf", dtype="bfloat16", config_from=tmp_path / "config")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.dtype is torch.bfloat16
    expected = {key: one.bfloat16() for key, one in model.state_dict().items()}
    assert all_same(dict(loaded.state_dict()), expected)


def test_config_and_tokenizer_are_copied_and_weights_of_others_are_not(tmp_path):
    origin = tmp_path / "origin"
    (origin / "folder.json").mkdir(parents=True)
    copied = {
        "config.json": "{}",
        "tokenizer.json": "{}",
        "merges.txt": "a b",
        "spiece.model": "x",
        "modeling_x.py": "y",
    }
    left = [
        "model.safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "trainer_state.json",
        ".hidden.json",
    ]
    for name, text in [*copied.items(), *((name, "no") for name in left)]:
        (origin / name).write_text(text)
    (origin / "linked.json").symlink_to("config.json")  # as in the cache of the hub
    run = save(tmp_path / "run", "full", model=Holder(weights()))
    export(run, tmp_path / "hf", to="hf", config_from=origin)
    there = {path.name: path for path in (tmp_path / "hf").iterdir()}
    assert set(there) == {*copied, "linked.json", "model.safetensors"}
    assert all(there[name].read_text() == text for name, text in copied.items())
    assert not there["linked.json"].is_symlink() and there["linked.json"].read_text() == "{}"


def test_a_config_that_is_in_the_directory_of_the_run_is_copied_if_none_is_named(tmp_path):
    for folder, text in (("run/pretrained", "{}"), ("other", '{"is": "other"}')):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(text)
    save(tmp_path / "run", "full", model=Holder(weights()))
    for nth, checkpoint in enumerate(("run", "run/latest", "run/step-00000001")):
        export(tmp_path / checkpoint, tmp_path / f"hf{nth}", to="hf")
        assert (tmp_path / f"hf{nth}" / "config.json").read_text() == "{}"
    export(tmp_path / "run", tmp_path / "named", to="hf", config_from=tmp_path / "other")
    assert json.loads((tmp_path / "named" / "config.json").read_text()) == {"is": "other"}


@pytest.mark.parametrize("make", [lambda place: None, lambda place: place.mkdir(), lambda place: place.touch()])
def test_a_config_that_is_not_there_is_named(tmp_path, make):
    make(tmp_path / "origin")
    with pytest.raises(FileNotFoundError, match=r"a folder with a config.json: '.*origin'"):
        export(tmp_path, tmp_path / "hf", to="hf", config_from=tmp_path / "origin")


def test_a_config_that_is_no_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        export(tmp_path, tmp_path / "hf", to="hf", config_from=tmp_path)


# Of many ranks


def save_spread(rank: int, out: str) -> None:
    world = dist.get_world_size()
    torch.manual_seed(0)
    whole = {
        "rows": torch.randn(7, 5),
        "columns": torch.randn(3, 5, 6),
        "few": torch.arange(1),
        "mask": torch.ones(9) > 0,
    }
    mesh = init_device_mesh("cpu", (world,))
    state = {
        "rows": distribute_tensor(whole["rows"], mesh, [Shard(0)]),
        "columns": distribute_tensor(whole["columns"], mesh, [Shard(1)]),
        "few": distribute_tensor(whole["few"], mesh, [Shard(0)]),
        "mask": distribute_tensor(whole["mask"], mesh, [Replicate()]),
        "plain": torch.arange(40_000),
    }
    assert all(isinstance(state[key], DTensor) for key in whole)
    with distckpt.Checkpointer(out, {"model": Holder(state)}, format="sharded", save_last=False) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("to", ["pth", "safetensors", "dcp"])
def test_what_many_ranks_wrote_becomes_whole_in_one_process(run_ranks, tmp_path, ranks, to):
    run_ranks(ranks, save_spread, str(tmp_path / "run"))
    export(tmp_path / "run", tmp_path / "out", to=to)
    torch.manual_seed(0)
    expected = {"rows": torch.randn(7, 5), "columns": torch.randn(3, 5, 6), "few": torch.arange(1)}
    expected |= {"mask": torch.ones(9) > 0, "plain": torch.arange(40_000)}
    if to == "pth":
        assert all_same(torch.load(tmp_path / "out", weights_only=True, mmap=True), expected)
        assert zipfile.ZipFile(tmp_path / "out").testzip() is None
    elif to == "safetensors":
        assert all_same(safetensors.torch.load_file(tmp_path / "out"), expected)
    else:
        found = {"model": {key: torch.zeros_like(one) for key, one in expected.items()}}
        load_dcp(tmp_path / "out", found)
        assert all_same(found["model"], expected)


# Which checkpoint


@pytest.fixture
def steps(tmp_path) -> Path:
    """A run of two steps, at each of which the weight is the step."""
    model = nn.Linear(1, 1)
    with distckpt.Checkpointer(tmp_path / "run", {"model": model, "ema": model}, format="full", interval=1) as ckpt:
        for step in (1, 2):
            nn.init.constant_(model.weight, float(step))
            ckpt.step()
    return tmp_path / "run"


def exported(source: Path) -> float:
    target = source.parent / "out.safetensors"
    export(source, target, overwrite=True)
    return safetensors.torch.load_file(target)["weight"].item()


@pytest.mark.parametrize("name, weight", [("", 2), ("latest", 2), ("step-00000001", 1), ("step-00000002", 2)])
def test_a_run_gives_its_newest_and_a_checkpoint_or_label_that_one(steps, tmp_path, name, weight):
    place = tmp_path / "out.safetensors"
    told = export(steps / name, place)
    assert safetensors.torch.load_file(place)["weight"].item() == weight
    assert told.step == weight and told.checkpoint == str(steps.resolve() / f"step-0000000{weight}")


def test_a_damaged_newest_is_passed_over_in_a_run(steps, caplog):
    place = steps / "step-00000002" / "model.safetensors"
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    assert exported(steps) == 1
    assert "step-00000002 is damaged and passed over" in caplog.text


def test_a_checkpoint_of_which_another_part_is_damaged_is_exported(steps):
    (steps / "step-00000002" / "ema.safetensors").unlink()
    assert exported(steps) == 2


def test_where_all_are_damaged_is_no_checkpoint(steps, tmp_path):
    for step in (1, 2):
        (steps / f"step-0000000{step}" / "model.safetensors").write_bytes(b"")
    with pytest.raises(distckpt.NoCheckpoint, match=r"none .* can be read \(step-00000002, step-00000001\)"):
        export(steps, tmp_path / "out.safetensors")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("at", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("to", ["pth", "hf"])
def test_a_bit_that_flipped_is_found_and_named_and_nothing_is_left(tmp_path, format, at, to):
    # The sharded format holds what is tied twice, and nobody reads the second one.
    run = save(tmp_path / "run", format, model=Holder({key: one for key, one in weights().items() if key != "tied"}))
    name = "rank-00000" if format == "sharded" else "model"
    place = run / "step-00000001" / f"{name}.safetensors"
    data = bytearray(place.read_bytes())
    data[int((len(data) - 1) * at)] ^= 1
    place.write_bytes(data)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(distckpt.DamagedCheckpoint, match=place.name):
        export(run / "step-00000001", tmp_path / "out", to=to)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_file_that_is_missing_is_damage_and_named(steps, tmp_path, name):
    (steps / "step-00000002" / name).unlink()
    with pytest.raises(distckpt.DamagedCheckpoint, match=f"step-00000002/{name}"):
        export(steps / "step-00000002", tmp_path / "out.safetensors")


def test_a_folder_in_the_place_of_another_is_found_by_the_record(steps, tmp_path):
    shutil.rmtree(steps / "step-00000002")
    shutil.copytree(steps / "step-00000001", steps / "step-00000002")
    with pytest.raises(distckpt.DamagedCheckpoint, match="is not the one that was committed"):
        export(steps / "step-00000002", tmp_path / "out.safetensors")


def test_a_checkpoint_that_was_copied_away_proves_itself(steps, tmp_path):
    shutil.copytree(steps / "step-00000001", tmp_path / "elsewhere" / "my weights")
    assert exported(tmp_path / "elsewhere" / "my weights") == 1


@pytest.fixture
def hooked(tmp_path) -> SimpleNamespace:
    """A training of two epochs with the hook, each of which is saved as ``epoch_N.pth`` in ``work``."""
    model = nn.Linear(2, 1)
    loop = SimpleNamespace(work_dir=str(tmp_path / "work"), model=model, logger=logging.getLogger("loop"))
    loop.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop.param_schedulers, loop.epoch, loop.iter, loop.max_epochs, loop.max_iters = [], 0, 0, 2, 2
    hook = distckpt.CheckpointHook(interval=1)
    hook.before_train(loop)
    for epoch in (1, 2):
        nn.init.constant_(model.weight, float(epoch))
        hook.after_train_iter(loop, 0)
        loop.iter = epoch
        hook.after_train_epoch(loop)
        loop.epoch = epoch
    hook.after_train(loop)
    return loop


@pytest.mark.parametrize("name, weight", [("", 2), ("epoch_1.pth", 1), ("epoch_2.pth", 2)])
def test_a_pth_of_the_hook_is_exported_by_its_record(hooked, tmp_path, name, weight):
    export(Path(hooked.work_dir) / name, tmp_path / "out.safetensors", dtype="float16")
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert found["weight"].tolist() == [[weight, weight]] and found["weight"].dtype is torch.float16
    export(Path(hooked.work_dir) / name, tmp_path / "all.pth", to="pth", part=None)
    assert torch.load(tmp_path / "all.pth", weights_only=True)["meta"]["epoch"] == weight


def test_a_pth_of_the_hook_is_never_replaced(hooked, tmp_path):
    place = Path(hooked.work_dir) / "epoch_1.pth"
    for target in (place, place.with_name("epoch_2.pth")):
        with pytest.raises(ValueError, match="is a checkpoint, where nothing else belongs"):
            export(place, target, to="pth", overwrite=True)


def test_a_pth_without_a_part_is_refused_with_its_parts(hooked, tmp_path):
    with pytest.raises(ValueError, match="has no part 'ema'; its parts are meta, state_dict, optimizer"):
        export(hooked.work_dir, tmp_path / "out", part="ema")


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda place: None, "is neither a checkpoint nor a run's directory"),
        (lambda place: place.mkdir(), "holds no committed checkpoint"),
        (lambda place: place.write_bytes(b"weights"), "is not committed: there is no there.committed beside it"),
    ],
)
def test_what_is_no_checkpoint_is_told(tmp_path, make, told):
    make(tmp_path / "there")
    with pytest.raises(distckpt.NoCheckpoint, match=f"there {told}"):
        export(tmp_path / "there", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_a_newer_version_is_refused_by_name(steps, tmp_path):
    shutil.copytree(steps / "step-00000001", tmp_path / "copy")
    manifest = tmp_path / "copy" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version":1', '"version":2'))
    with pytest.raises(distckpt.NewerVersion, match=r"copy/manifest\.json has version 2"):
        export(tmp_path / "copy", tmp_path / "out")


# Words that make no sense


def test_a_part_that_is_not_there_is_refused_with_those_that_are(run, tmp_path):
    with pytest.raises(ValueError, match=r"step-00000001 has no part 'ema'; its parts are model, optimizer"):
        export(run, tmp_path / "out", part="ema")
    assert not (tmp_path / "out").exists()


def test_a_kind_that_nobody_knows_is_refused_with_those_that_are(tmp_path):
    with pytest.raises(ValueError, match="to should be one of pth, safetensors, hf, dcp, is 'onnx'"):
        export(tmp_path, tmp_path / "out", to="onnx")


@pytest.mark.parametrize(
    "words, told",
    [
        ({"to": "pth", "max_shard_bytes": 5}, "max_shard_bytes is for to='hf', not for to='pth'"),
        ({"config_from": "x"}, "config_from is for to='hf', not for to='safetensors'"),
        ({"to": "hf", "max_shard_bytes": "much"}, "max_shard_bytes: 'much' is no size"),
        ({"to": "hf", "part": None}, "part=None, which is all parts, is for to='pth' and to='dcp'"),
    ],
)
def test_words_that_do_not_go_together_are_refused(tmp_path, words, told):
    with pytest.raises(ValueError, match=told):
        export(tmp_path, tmp_path / "out", **words)


def test_overwrite_is_a_flag(tmp_path):
    with pytest.raises(TypeError, match="overwrite should be True or False"):
        export(tmp_path, tmp_path / "out", overwrite="yes")


# Whole or not there


@pytest.mark.parametrize("to", ["pth", "safetensors", "hf", "dcp"])
def test_what_is_there_is_replaced_only_where_that_was_said(steps, tmp_path, to):
    target = tmp_path / "out"
    export(steps / "step-00000001", target, to=to)
    before = {path: path.read_bytes() for path in ([target] if target.is_file() else target.iterdir())}
    with pytest.raises(FileExistsError, match=r"overwrite=True replaces it: '.*out'"):
        export(steps, target, to=to)
    assert {path: path.read_bytes() for path in before} == before
    export(steps, target, to=to, overwrite=True)
    assert {path: path.read_bytes() for path in before} != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("to", ["pth", "safetensors", "hf", "dcp"])
@pytest.mark.parametrize("inside", ["notes/x.txt", "notes.txt", "model.safetensors/x"])
def test_a_folder_that_is_no_such_export_is_never_replaced(steps, tmp_path, to, inside):
    mine = tmp_path / "mine" / inside
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(FileExistsError, match="a folder that is no export of this kind, so it is not replaced"):
        export(steps, tmp_path / "mine", to=to, overwrite=True)
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_a_file_is_never_replaced_by_a_folder(steps, tmp_path, to):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="a file that is no export of this kind"):
        export(steps, tmp_path / "mine", to=to, overwrite=True)


@pytest.mark.parametrize("name", ["step-00000001", "step-00000001/model.safetensors", "step-00000001/more.pth"])
@pytest.mark.parametrize("to", ["hf", "pth"])
def test_nothing_is_put_into_a_checkpoint_or_in_its_place(steps, name, to):
    with pytest.raises(ValueError, match="step-00000001 is a checkpoint, where nothing else belongs"):
        export(steps, steps / name, to=to, overwrite=True)


def test_folders_on_the_way_are_made(steps, tmp_path):
    export(steps, tmp_path / "a" / "b" / "out.safetensors")
    assert (tmp_path / "a" / "b" / "out.safetensors").exists()


def test_a_disk_that_has_no_room_is_told_before_anything_is_written(steps, tmp_path, monkeypatch):
    from distckpt.stores.local import LocalStore

    monkeypatch.setattr(LocalStore, "free_bytes", lambda self: 100)
    with pytest.raises(OSError, match=r"No space left on device: it takes \d+ bytes, 100 are free: '.*out'"):
        export(steps, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


# Memory


MEASURE = """
import sys
from pathlib import Path
from distckpt.exporting import export

def memory(of):
    return int(Path("/proc/self/status").read_text().split(f"{of}:")[1].split()[0]) * 1024

small, large, target, to, dtype = sys.argv[1:]
export(small, target + ".first", to=to)  # what is imported is there by now
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = memory("VmRSS")
export(large, target, to=to, dtype=dtype or None)
print(memory("VmHWM") - before)
"""

TENSORS, TENSOR_BYTES = 20, 20_000_000
MOST_BYTES = 3 * TENSOR_BYTES  # three blocks of 8 MiB that are read ahead, a piece, and that once more where it is cast


def commit_pth(root: Path, state: dict[str, Any]) -> None:
    """A run with one checkpoint as the hook writes it."""
    root.mkdir()
    store = LocalStore(root)
    catalog = Catalog(store, attempt.Attempt.start(store, attempt.Holder("host", 1, "now")))
    draft = catalog.begin(Progress(3, 1), "epoch_1.pth")
    (file,) = write_now(Pth(), Snapshot(shared=state), store, draft.path).files
    catalog.commit(draft, Manifest(Progress(3, 1), "pth", 1, ("interval",), "", "", 0, 0, files=(file,)))


@pytest.fixture(scope="module")
def large_run(request, tmp_path_factory) -> Iterator[Path]:
    """A run with 400 MB of weights, and beside it one with few."""
    folder = tmp_path_factory.mktemp(request.param)
    large = {f"layers.{nth}": torch.full((5000, 1000), float(nth)) for nth in range(TENSORS)}
    for name, weights in (("large", large), ("small", {"layers.0": torch.ones(3)})):
        if request.param == "pth":
            commit_pth(folder / name, {"state_dict": weights})
        else:
            save(folder / name, request.param, model=Holder(weights))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "large_run, to, dtype",
    [
        *(("full", to, "") for to in ("safetensors", "pth", "dcp")),
        ("sharded", "hf", "bfloat16"),
        ("pth", "hf", ""),
    ],
    indirect=["large_run"],
)
def test_the_memory_that_it_takes_does_not_grow_with_the_tensors(large_run, tmp_path, to, dtype):
    places = [str(place) for place in (large_run / "small", large_run / "large", tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *places, to, dtype], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < MOST_BYTES
    shutil.rmtree(tmp_path)

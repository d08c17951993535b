"""Modules on any number of ranks that start from what others saved on any number: real folders, to the bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import distckpt
from distckpt import DamagedCheckpoint, StateMismatch
from distckpt.formats.dcp_metadata import Metadata
from distckpt.ranks import Solo
from distckpt.resuming import start_from
from distckpt.selection import Selection
from distckpt.state import Parts

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Net(nn.Module):
    """Rows that no number of ranks divides, fewer rows than ranks, a buffer of integers, two dtypes, a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 17)
        self.norm = nn.BatchNorm1d(17)
        self.second = nn.Linear(17, 5)
        self.low = nn.Linear(5, 5, bias=False, dtype=torch.bfloat16)
        self.few = nn.Parameter(torch.randn(1, 3))
        self.large = nn.Parameter(torch.randn(301, 400))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x)).relu())
        return self.low(x.bfloat16()).float() * self.few.sum() * self.large.mean()


def net(kind: str, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    model = Net()
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (model.first, model.second, model.low):
            fully_shard(part, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if kind == "fsdp1":
        words: Any = {"device_id": torch.device("cpu"), "use_orig_params": True}
        model.low = FullyShardedDataParallel(model.low, **words)  # which has to be of one dtype
        return FullyShardedDataParallel(model, **words)
    return model


def trained(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        torch.manual_seed(5)
        model(torch.randn(8, 10)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def told(state: dict[str, Any]) -> dict[str, np.ndarray]:
    """The bytes of all tensors, whole, in a form that a pipe takes."""
    whole = {key: one.full_tensor() if isinstance(one, DTensor) else one for key, one in state.items()}
    return {key: one.detach().contiguous().reshape(-1).view(torch.uint8).numpy().copy() for key, one in whole.items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert np.array_equal(tensor, other[key]), key


# How others save


def by_torch(out: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer), "epoch": 3}
    dcp.save(state, storage_writer=FileSystemWriter(out, thread_count=2))


def by_torchtitan(out: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As torchtitan lays it out since July 2025; made by hand, with the writer that it uses."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = {
        **get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        "lr_scheduler": {"last_epoch": 2},
        "train_state": {"step": torch.tensor(2, dtype=torch.int32), "ntokens_seen": torch.tensor(99)},
        "dataloader": {"version": 1, "dp_world_size": 2, "dp_rank_0": b"\x80\x04N."},
    }
    dcp.save(state, storage_writer=FileSystemWriter(f"{out}/checkpoint/step-2"))


def by_older_torchtitan(out: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = {"model": get_model_state_dict(model), "train_state": {"step": torch.tensor(1)}}
    dcp.save(state, storage_writer=FileSystemWriter(f"{out}/step-1"))


def by_stateful(out: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As the tutorial of torch.distributed.checkpoint has it."""
    state = {"app": {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}}
    dcp.save(state, storage_writer=FileSystemWriter(out))


def by_hugging_face_writer(out: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    dcp.save(get_model_state_dict(model), storage_writer=HuggingFaceStorageWriter(out, save_distributed=True))


def by_accelerate(out: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # asked for, and never used: the group is there
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import save_fsdp_model, save_fsdp_optimizer

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1 if isinstance(model, FullyShardedDataParallel) else 2,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True)
    place = f"{out}/checkpoint-2"  # as the Trainer of transformers calls what is around it
    save_fsdp_model(plugin, accelerator, model, place)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, place)


def save(rank: int, out: str, kind: str, how: Callable[..., None]) -> dict[str, np.ndarray]:
    model, optimizer = trained(kind)
    how(out, model, optimizer)
    return told(get_model_state_dict(model, options=StateDictOptions(full_state_dict=kind == "fsdp1")))


def start(rank: int, run: str, source: str, kind: str) -> dict[str, np.ndarray]:
    model = net(kind, seed=4)
    with distckpt.Checkpointer(run, {"net": model}, init_from=source, save_last=False) as ckpt:
        assert ckpt.resume() == 0
    return told(get_model_state_dict(model))


@pytest.mark.parametrize(
    "how, kind, ranks",
    [
        (by_torch, "plain", 1),
        (by_torch, "ddp", 2),
        (by_torch, "fsdp", 2),
        (by_torch, "fsdp", 3),
        (by_torchtitan, "fsdp", 2),
        (by_older_torchtitan, "fsdp", 2),
        (by_stateful, "fsdp", 2),
        (by_hugging_face_writer, "plain", 1),
        (by_hugging_face_writer, "fsdp", 3),
        (by_accelerate, "fsdp1", 2),
        (by_accelerate, "fsdp", 2),
    ],
)
def test_what_others_saved_on_some_ranks_starts_modules_on_others(run_ranks, tmp_path, how, kind, ranks):
    source = str(tmp_path / "source")
    saved = run_ranks(ranks, save, source, kind, how)
    also = [("ddp", 2), ("fsdp", 2)] if how is by_torch else []
    for nth, (other, readers) in enumerate((("plain", 1), ("fsdp", 4), *also)):
        for started in run_ranks(readers, start, str(tmp_path / f"run{nth}"), source, other):
            same(saved[0], started)


@pytest.mark.parametrize("name", ["weights.pth", "old.pth", "weights.safetensors", "folder", "pickled folder"])
def test_whole_weights_start_modules_that_are_spread_over_ranks(run_ranks, tmp_path, name):
    model = net("plain")
    if name.endswith("folder"):
        hugging_face(tmp_path / name, model, is_pickled=name != "folder")
    elif name.endswith(".pth"):
        torch.save(model.state_dict(), tmp_path / name, _use_new_zipfile_serialization=name != "old.pth")
    else:
        safetensors.torch.save_file(model.state_dict(), tmp_path / name)
    for started in run_ranks(2, start, str(tmp_path / "run"), str(tmp_path / name), "fsdp"):
        same(told(model.state_dict()), started)


def hugging_face(path: Path, model: nn.Module, *, is_pickled: bool) -> None:
    """As ``save_pretrained`` of transformers cuts a model into files, or did until 2023."""
    path.mkdir()
    state = model.state_dict()
    stem, suffix = ("pytorch_model", ".bin") if is_pickled else ("model", ".safetensors")
    names = [f"{stem}-0000{nth}-of-00003{suffix}" for nth in (1, 2, 3)]
    lies_in = {key: names[nth % 3] for nth, key in enumerate(state)}
    for name in names:
        held = {key: one.contiguous() for key, one in state.items() if lies_in[key] == name}
        if is_pickled:
            torch.save(held, path / name)
        else:
            safetensors.torch.save_file(held, path / name, {"format": "pt"})
    (path / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": lies_in}))
    (path / "config.json").write_text("{}")


def save_ours(rank: int, out: str, kind: str, form: Any) -> dict[str, np.ndarray]:
    model, optimizer = trained(kind)
    state = {"net": model, "optimizer": optimizer}
    with distckpt.Checkpointer(out, state, format=form, sync_buffers=False, save_last=False) as ckpt:
        ckpt.save(wait=True)
    return told(get_model_state_dict(model))


@pytest.mark.parametrize("form, kind, ranks", [("full", "ddp", 2), ("sharded", "fsdp", 2)])
def test_a_run_of_ours_starts_modules_on_other_ranks(run_ranks, tmp_path, form, kind, ranks):
    source = tmp_path / "source"
    saved = run_ranks(ranks, save_ours, str(source), kind, form)
    (place,) = source.glob("step-*[0-9]")
    shutil.copytree(place, tmp_path / "copied")
    for nth, where in enumerate((source, place, tmp_path / "copied")):
        for started in run_ranks(3, start, str(tmp_path / f"run{nth}"), str(where), "fsdp"):
            same(saved[0], started)


def start_stage(rank: int, run: str, source: str) -> dict[str, np.ndarray]:
    """What one of two pipeline stages has of the model."""
    whole = net("plain", seed=4)
    stage = nn.ModuleDict(
        {"first": whole.first, "norm": whole.norm} if rank else {"second": whole.second, "low": whole.low}
    )
    for name in ("few", "large") if rank else ():
        stage.register_parameter(name, getattr(whole, name))
    with distckpt.Checkpointer(run, {"net": stage}, init_from=source, save_last=False) as ckpt:
        ckpt.resume()
    return told(stage.state_dict())


@pytest.mark.parametrize("how", [by_torchtitan, by_hugging_face_writer])
def test_pipeline_stages_start_from_what_is_theirs(run_ranks, tmp_path, how):
    source = str(tmp_path / "source")
    saved = run_ranks(2, save, source, "fsdp", how)
    first, second = run_ranks(2, start_stage, str(tmp_path / "run"), source)
    same(saved[0], first | second)


def damaged_start(rank: int, run: str, source: str) -> str:
    try:
        start(rank, run, source, "fsdp")
    except DamagedCheckpoint as error:
        return str(error)
    return "nothing was raised"


def test_damage_that_one_rank_finds_is_raised_on_all(run_ranks, tmp_path):
    source = tmp_path / "source"
    run_ranks(2, save, str(source), "fsdp", by_torchtitan)
    folder = source / "checkpoint" / "step-2"
    *_, (_, _, place) = Metadata((folder / ".metadata").read_bytes()).tensor("large").chunks
    data = bytearray((folder / place.file).read_bytes())
    data[place.offset + place.size_bytes // 2] ^= 1
    (folder / place.file).write_bytes(data)
    for told_here in run_ranks(2, damaged_start, str(tmp_path / "run"), str(source)):
        assert "rank 1: " in told_here and "rank 0: " not in told_here
        assert "__1_0.distcp, at byte" in told_here and "The state is not what it was" in told_here


def test_a_lost_shard_in_the_middle_is_refused(run_ranks, tmp_path):
    source = tmp_path / "source"
    run_ranks(3, save, str(source), "fsdp", by_hugging_face_writer)
    (source / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match="it is not whole: .* elements are missing"):
        start_from(str(source), Solo(), Parts({"net": net("plain")}), Selection(), strict=True)


def test_a_lost_last_shard_does_not_fit(run_ranks, tmp_path):
    source = tmp_path / "source"
    run_ranks(2, save, str(source), "fsdp", by_hugging_face_writer)
    (source / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(StateMismatch, match=r"of another shape: net\."):
        start_from(str(source), Solo(), Parts({"net": net("plain")}), Selection(), strict=True)

"""Sharded checkpoints as PyTorch itself reads them, without distckpt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rank_processes import RankProcesses
from safetensors import safe_open
from sharded_programs import (
    adamw,
    ddp,
    differing,
    fsdp,
    fsdp_and_tensor_parallel,
    fused,
    hsdp,
    plain,
    running,
    saved,
    strided,
    train,
    whole,
    wide,
    wide_fsdp,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

WRITTEN: dict[str, dict[int, tuple[Callable[[], nn.Module], ...]]] = {
    "net": {1: (plain,), 2: (ddp, fsdp), 3: (fsdp,), 4: (hsdp,)},
    "wide": {4: (fsdp_and_tensor_parallel,)},
    "fused": {2: (strided,)},
}
READ: dict[str, dict[int, tuple[Callable[[], nn.Module], ...]]] = {
    "net": {1: (plain,), 2: (fsdp,), 3: (ddp,)},
    "wide": {1: (wide,), 2: (wide_fsdp,), 3: (wide_fsdp,)},
    "fused": {1: (fused,), 2: (fused,), 3: (fused,)},
}
SENTINEL = 7


def folder(root: str, model: str, make: Callable[[], nn.Module], world_size: int) -> str:
    return f"{root}/{model}-{make.__name__}-{world_size}"


def write(rank: int, root: str, world_size: int) -> dict[str, Any]:
    return {
        (place := folder(root, model, make, world_size)): saved(place, make)
        for model, makes in WRITTEN.items()
        for make in makes.get(world_size, ())
    }


def filled(tensor: Tensor) -> Tensor:
    """A target that shows what was not read."""
    return torch.full_like(tensor.detach(), SENTINEL)


def targets(model: nn.Module) -> dict[str, Tensor]:
    """What torch's own functions call the tensors of a model and its AdamW, and what is read into."""
    optimizer = adamw(model)
    train(model, optimizer, steps=1)
    found = {f"model.{key.removeprefix('module.')}": filled(one) for key, one in model.state_dict().items()}
    names = {key.removeprefix("module."): one for key, one in model.named_parameters()}
    for key, one in names.items():
        found |= {f"optim.state.{key}.{name}": filled(value) for name, value in optimizer.state[one].items()}
    return found


def read(rank: int, root: str, world_size: int, expected: dict[str, Any]) -> dict[str, list[str]]:
    """Of each folder, what torch did not read as it was."""
    wrong = {}
    for model, makes in READ.items():
        for place, tensors in expected.items():
            if Path(place).name.startswith(model):
                (make,) = makes[world_size]
                found = targets(make())
                dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(f"{place}/step-00000001"))
                if keys := differing(tensors, {key: whole(one) for key, one in found.items()}):
                    wrong[Path(place).name] = keys
    return wrong


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was saved, by the folder that it was saved in."""
    root = str(tmp_path_factory.mktemp("runs"))
    expected: dict[str, Any] = {}
    for count in (1, 2, 3, 4):
        expected |= RankProcesses()(count, write, root, count)[0]
    return expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_torch_reads_every_folder_on_any_number_of_ranks(run_ranks, written, world_size):
    assert len(written) == 7
    assert run_ranks(world_size, read, "", world_size, written) == [{}] * world_size


def files(written: dict[str, Any]) -> list[Path]:
    return [path for place in written for path in Path(place).glob("step-*/*.safetensors")]


def test_every_file_is_one_that_torch_can_read(written):
    found = files(written)
    assert len(found) >= 1 + 2 + 2 + 3 + 4 + 4 + 2
    for path in found:
        check(path)
    # What a rank has of a _StridedShard is two boxes, and a file holds one.
    assert {path.name for path in found} > {"rank-00000.1.safetensors", "rank-00001.1.safetensors"}


def check(path: Path) -> None:
    """Keys are unique, no box is empty, the header ends on a page, and the tensors lie without holes behind it."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert (8 + size) % 4096 == 0, path
    header = json.loads(data[8 : 8 + size], object_pairs_hook=unique)
    told = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"], object_pairs_hook=unique)
    assert told.keys() == header.keys(), path
    at = 0
    for key, one in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        begin, end = one["data_offsets"]
        assert begin == at and end > begin and 0 not in one["shape"], (path, key)
        assert len(told[key]["saved_offsets"]) == len(one["shape"])
        at = end
    assert 8 + size + at == len(data), path
    with safe_open(path, "pt") as opened:
        assert set(opened.keys()) == header.keys()


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_no_tensor_is_written_twice(written):
    for place in written:
        seen: dict[tuple[str, tuple[int, ...]], str] = {}
        for path in Path(place).glob("step-*/*.safetensors"):
            with safe_open(path, "pt") as opened:
                told = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            for key, one in told.items():
                assert seen.setdefault((key, tuple(one["saved_offsets"])), path.name) == path.name, (key, path)


# Against torch's own names


def by_torchs_functions(rank: int, out: str) -> list[str]:
    """The keys that torch's functions ask for, and that are not there, or not what they are."""
    model = fsdp()
    optimizer = adamw(model)
    train(model, optimizer)
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)
    state = get_optimizer_state_dict(model, optimizer)["state"]
    flat = {f"optim.state.{name}.{key}": one for name, of in state.items() for key, one in of.items()}
    flat |= {f"model.{key}": one for key, one in model.state_dict().items()}
    found = {key: filled(one) for key, one in flat.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(f"{out}/step-00000001"))
    return differing({key: whole(one) for key, one in flat.items()}, {key: whole(one) for key, one in found.items()})


def test_tensors_are_called_as_torchs_own_functions_call_them(run_ranks, tmp_path):
    assert run_ranks(2, by_torchs_functions, str(tmp_path / "run")) == [[], []]

"""Tensors of every dtype in sharded checkpoints, whole and spread over ranks, for us and for PyTorch itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from sharded_programs import Holder, mesh_of, running
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard

from distckpt import RankFailure

EVERY_BIT = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]
IN_BYTES = [torch.complex128, torch.complex32, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2]


def bits(dtype: torch.dtype, *shape: int) -> Tensor:
    """Any bits at all."""
    size = torch.Size(shape).numel() * dtype.itemsize
    some = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), generator=torch.Generator().manual_seed(1))
    return some.to(torch.uint8).view(dtype).reshape(shape)


def spread(tensor: Tensor) -> DTensor:
    """Its rows, on all ranks; gloo itself could not send all dtypes."""
    mesh = mesh_of(dist.get_world_size())
    size = max(-(-len(tensor) // mesh.size()), 1)
    mine = tensor[mesh.get_local_rank() * size :][:size].clone()
    return DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def some_of_each(*, is_spread: bool) -> dict[str, Tensor]:
    """Rows that two ranks cannot share alike, fewer of them than ranks, none, and numbers."""
    held: dict[str, Tensor] = {}
    for dtype in (*EVERY_BIT, *IN_BYTES):
        of = {"rows": bits(dtype, 5, 3), "few": bits(dtype, 1, 2), "none": bits(dtype, 0, 3)}
        held |= {f"{named(dtype)}.{key}": spread(one) if is_spread else one for key, one in of.items()}
        held[f"{named(dtype)}.number"] = bits(dtype)
    return held


def large(*, is_spread: bool) -> dict[str, Tensor]:
    """One tensor that ranks cut among them, of bytes."""
    whole = bits(torch.complex128, 3, 90_000)
    return {"large": spread(whole) if is_spread else whole}


HELD = {"some of each": some_of_each, "large": large}


def spelled(tensor: Tensor) -> tuple[str, list[int], bytes]:
    """What this rank has of it."""
    here = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().contiguous()
    return str(here.dtype), list(here.shape), here.reshape(-1).view(torch.uint8).numpy().tobytes()


def save(rank: int, out: str, what: str, is_spread: bool) -> None:
    with running(out, {"part": Holder(HELD[what](is_spread=is_spread))}) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)


def restore(rank: int, out: str, what: str, is_spread: bool) -> list[str]:
    """What did not come back as it was."""
    expected = HELD[what](is_spread=is_spread)
    part = Holder({key: torch.empty_like(one) for key, one in expected.items()})
    with running(out, {"part": part}) as ckpt:
        ckpt.resume()
    assert part.tensors.keys() == expected.keys()
    return [key for key, one in part.tensors.items() if spelled(one) != spelled(expected[key])]


@pytest.mark.parametrize("what", HELD)
@pytest.mark.parametrize("is_spread", [False, True], ids=["whole", "spread"])
def test_every_dtype_comes_back_bit_for_bit_whole_or_spread(run_ranks, tmp_path, what, is_spread):
    out = str(tmp_path / "run")
    run_ranks(2, save, out, what, is_spread)
    assert run_ranks(1, restore, out, what, False) == [[]]
    assert run_ranks(3, restore, out, what, True) == [[]] * 3


def test_a_tensor_of_bytes_is_cut_among_ranks_between_its_elements(run_ranks, tmp_path):
    run_ranks(2, save, str(tmp_path / "run"), "large", False)
    shapes = []
    for path in sorted((tmp_path / "run").glob("step-*/*.safetensors")):
        with safe_open(path, "pt") as opened:
            shapes += [opened.get_slice(key).get_shape() for key in opened.keys() if key == "part.large"]  # noqa: SIM118
    assert len(shapes) == 2 and all(len(shape) == 3 and shape[2] == 16 for shape in shapes)


def torch_reads(rank: int, out: str, is_spread: bool) -> list[str]:
    expected = {
        f"part.{key}": one
        for key, one in some_of_each(is_spread=is_spread).items()
        if key.split(".")[0] in map(named, EVERY_BIT)
    }
    found = {key: torch.zeros_like(one) for key, one in expected.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(f"{out}/step-00000001"))
    return [key for key, one in found.items() if spelled(one) != spelled(expected[key])]


@pytest.mark.parametrize("is_spread", [False, True], ids=["whole", "spread"])
def test_torch_reads_all_that_it_has_a_word_for_beside_what_it_has_none_for(run_ranks, tmp_path, is_spread):
    out = str(tmp_path / "run")
    run_ranks(2, save, out, "some of each", is_spread)
    assert run_ranks(3, torch_reads, out, False) == [[]] * 3
    for path in Path(out).glob("step-*/*.safetensors"):
        with safe_open(path, "pt") as opened:
            kinds = {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
            assert "F8_E8M0" not in kinds


def refused(rank: int, out: str) -> str:
    mesh = mesh_of(dist.get_world_size())
    part = Holder({"inner": {"sum": DTensor.from_local(torch.ones(2), mesh, [Partial()])}})
    with running(out, {"part": part}) as ckpt:
        ckpt.step()
        with pytest.raises(RankFailure) as raised:
            ckpt.save(wait=True)
    return str(raised.value)


def test_a_sum_that_is_not_worked_out_is_refused_by_name(run_ranks, tmp_path):
    told = run_ranks(2, refused, str(tmp_path / "run"))
    assert all("part.inner.sum" in one and "redistribute it" in one for one in told)

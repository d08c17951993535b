"""FSDP1, which cuts parameters where they lie end to end: what ranks have of them goes to any others, and back."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_processes import RankProcesses
from safetensors.torch import save_file
from sharded_programs import Net, Wide, adamw, ddp, differing, fsdp, mesh_of, plain, running, told, train
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
    StateDictType,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from distckpt import RankFailure, StateMismatch

Make = Callable[[], nn.Module]


def wrapped(module: nn.Module, **words: Any) -> nn.Module:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **words)


def fsdp1(make: type[nn.Module] = Net, *, has_names: bool, strategy: str = "FULL_SHARD", **words: Any) -> nn.Module:
    """Two flat parameters. Of the first, no rank has all."""
    model: Any = plain(make)
    words |= {"use_orig_params": has_names, "sharding_strategy": ShardingStrategy[strategy]}
    if "HYBRID" in strategy:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        across = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        words["process_group"] = (pairs[dist.get_rank() // 2], across[dist.get_rank() % 2])
    model.first = wrapped(model.first, **words)
    return wrapped(model, **words)


named = partial(fsdp1, has_names=True)
flat = partial(fsdp1, has_names=False)
half_named = partial(fsdp1, has_names=True, strategy="SHARD_GRAD_OP")
uncut = partial(fsdp1, has_names=False, strategy="NO_SHARD")
uncut_named = partial(fsdp1, has_names=True, strategy="NO_SHARD")
hybrid = partial(fsdp1, has_names=True, strategy="HYBRID_SHARD")
hybrid_flat = partial(fsdp1, has_names=False, strategy="HYBRID_SHARD")

PROGRAMS: dict[int, dict[str, Make]] = {
    1: {"plain": plain, "named": named, "flat": flat},
    2: {"ddp": ddp, "fsdp": fsdp, "named": named, "flat": flat, "half_named": half_named, "uncut": uncut}
    | {"uncut_named": uncut_named},
    3: {"fsdp": fsdp, "named": named, "flat": flat},
    4: {"hybrid": hybrid, "hybrid_flat": hybrid_flat},
}


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """All tensors, whole: the weights as FSDP1 itself puts them together, which of moments makes several one on the
    CPU. Collective."""
    if not isinstance(model, FullyShardedDataParallel):
        return told(model, optimizer)
    with FullyShardedDataParallel.state_dict_type(
        model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=False)
    ):
        weights = {key: one.clone() for key, one in model.state_dict().items()}
    names = {one: key.replace("_fsdp_wrapped_module.", "") for key, one in model.named_parameters()}
    mine = {(names[one], name): value for one, of in optimizer.state.items() for name, value in of.items()}
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    found = {f"model.{key}": one for key, one in weights.items()}
    for key, name in dict.fromkeys(key for of in of_all for key in of):
        parts = [of[key, name] for of in of_all if (key, name) in of]
        for original, one in put_together(model, key, parts, weights).items():
            found[f"optim.state.{original}.{name}"] = one
    return {key: one.detach().contiguous().numpy() for key, one in found.items()}


def put_together(model: nn.Module, key: str, parts: list[Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The moments of a parameter of which each rank has the elements that come behind those of the rank before, or of
    all that lie in a flat one; in the order in memory that these have."""
    prefix, _, last = key.rpartition("_flat_param")
    if last or not (prefix or key == "_flat_param"):
        like, (first, *_) = weights[key], parts
        if first.ndim == 0 or first.shape == like.shape:
            return {key: first}
        return {key: torch.cat(parts)[: like.numel()].as_strided(like.shape, like.stride())}
    wrapper: Any = model
    for word in filter(None, prefix.split(".")):
        wrapper = getattr(wrapper, word)
    names = [prefix + one for one in wrapper._handle.flat_param._fqns]
    if parts[0].ndim == 0:
        return dict.fromkeys(names, parts[0])
    whole = torch.cat(parts)[: wrapper._handle.flat_param._unpadded_unsharded_size.numel()]
    return dict(zip(names, wrapper._handle._get_unflat_views(whole), strict=True))


def save(out: str, make: Make) -> dict[str, np.ndarray]:
    model = make()
    optimizer = adamw(model)
    train(model, optimizer)
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)
    return whole_state(model, optimizer)


def spoilt(make: Make) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make()
    with torch.no_grad():
        for one in (*model.parameters(), *model.buffers()):
            one.fill_(7)
    return model, adamw(model, lr=0.5)


def restore(out: str, make: Make) -> dict[str, np.ndarray]:
    model, optimizer = spoilt(make)
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        assert ckpt.resume() == 1
    assert optimizer.param_groups[0]["lr"] == 0.01
    return whole_state(model, optimizer)


def runs() -> Iterator[tuple[int, str, Make]]:
    for ranks, programs in PROGRAMS.items():
        for name, make in programs.items():
            yield ranks, f"{name}-{ranks}", make


def save_all(rank: int, root: str, world_size: int) -> dict[str, dict[str, np.ndarray]]:
    return {name: save(f"{root}/{name}", make) for ranks, name, make in runs() if ranks == world_size}


def restore_all(rank: int, root: str, world_size: int, expected: Any) -> dict[str, list[str]]:
    """What did not come back, of each checkpoint in each program."""
    wrong = {}
    for name in expected:
        for kind, make in PROGRAMS[world_size].items():
            if {kind, name.partition("-")[0]} <= {"plain", "ddp", "fsdp"}:
                continue  # which others test
            if keys := differing(expected[name], restore(f"{root}/{name}", make)):
                wrong[f"{name} in {kind}"] = keys
    return wrong


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("runs")
    expected: dict[str, Any] = {}
    for count in PROGRAMS:
        expected |= RankProcesses()(count, save_all, str(root), count)[0]
    return root, expected


@pytest.mark.parametrize("world_size", PROGRAMS)
def test_what_any_ranks_have_under_any_wrapper_is_restored_on_others(run_ranks, checkpoints, world_size):
    root, expected = checkpoints
    assert run_ranks(world_size, restore_all, str(root), world_size, expected, seconds=200) == [{}] * world_size


# What training sees of it


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        model(torch.randn(8, 10)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def train_on(rank: int, out: str, make: Make) -> list[str]:
    """What is another after a resume than without one."""
    model = make()
    optimizer = adamw(model)
    steps(model, optimizer, 0, 2)
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)
    steps(model, optimizer, 2, 4)
    other, another = spoilt(make)
    steps(other, another, 7, 8)  # what there was before is no matter
    with running(out, {"model": other, "optim": another}) as ckpt:
        ckpt.resume()
    steps(other, another, 2, 4)
    return differing(whole_state(model, optimizer), whole_state(other, another))


@pytest.mark.parametrize("make", [named, flat, half_named], ids=["named", "flat", "half_named"])
def test_training_goes_on_bit_for_bit(run_ranks, tmp_path, make):
    assert run_ranks(2, train_on, str(tmp_path / "run"), make) == [[]] * 2


def look_again(rank: int, out: str) -> tuple[list[float], ...]:
    """What a model says of some input: the one that is saved, and one that had put its weights together before it was
    given those."""
    model, other = half_named(), half_named()
    with torch.no_grad():
        for one in other.parameters():
            one.fill_(7)
    said = []
    with running(out, {"model": model}) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)
    for one in (model, other):
        one.eval()
        with torch.no_grad():
            said.append(one(torch.ones(1, 10)).flatten().tolist())
    with running(out, {"model": other}) as ckpt:
        ckpt.resume()
    with torch.no_grad():
        said.append(other(torch.ones(1, 10)).flatten().tolist())
    return tuple(said)


def test_weights_that_were_put_together_before_a_resume_are_not_used_after_it(run_ranks, tmp_path):
    for expected, before, after in run_ranks(2, look_again, str(tmp_path / "run")):
        assert after == expected != before


def collectives(rank: int, out: str, make: Make) -> list[int]:
    """How many there were until the first save, and after a resume."""
    model = make()
    optimizer = adamw(model)
    steps(model, optimizer, 0, 1)
    group = dist.distributed_c10d._get_default_group()
    counts = [group._get_sequence_number_for_group()]
    with running(out, {"model": model, "optim": optimizer}, format="auto") as ckpt:
        for _ in range(2):
            ckpt.step()
            ckpt.save(wait=True)
        counts.append(group._get_sequence_number_for_group())
    dist.barrier()
    with running(out, {"model": model, "optim": optimizer}, format="auto") as ckpt:
        counts.append(group._get_sequence_number_for_group())
        ckpt.resume()
        counts.append(group._get_sequence_number_for_group())
        assert ckpt.latest.format == "sharded"
    return counts


@pytest.mark.parametrize("make", [named, flat], ids=["named", "flat"])
def test_neither_a_save_nor_a_resume_is_a_collective(run_ranks, tmp_path, make):
    for before, saved, then, resumed in run_ranks(2, collectives, str(tmp_path / "run"), make):
        assert 0 < before == saved < then == resumed


# Tensors of more dimensions, in another order in memory, in low precision, tied, frozen


class Images(nn.Module):
    """Of the kernel, the channels are next to one another in memory; a rank has up to seven boxes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 7, (3, 5)).to(memory_format=torch.channels_last)
        self.second = nn.Conv3d(1, 5, 3)
        self.embedding = nn.Embedding(4, 6)
        self.head = nn.Linear(6, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(3, 5), requires_grad=False)
        self.low = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.reshape(8, 3, 6, 6)).mean(dim=(1, 2, 3))
        x = x + self.second(torch.ones(8, 1, 3, 3, 3, dtype=x.dtype)).mean(dim=(1, 2, 3, 4))
        return x * self.head(self.embedding(torch.arange(8) % 4)).sum(dim=1) * self.low.sum() * self.frozen.sum()


def images(*, has_names: bool) -> nn.Module:
    model: Any = plain(Images)
    words: dict[str, Any] = {"use_orig_params": has_names}
    if not has_names:
        words["ignored_states"] = [model.frozen]
    words["mixed_precision"] = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    model.first = wrapped(model.first, **words)
    return wrapped(model, **words)


images_named, images_flat = partial(images, has_names=True), partial(images, has_names=False)


def plain_images() -> nn.Module:
    return plain(Images)


IMAGES: dict[str, Make] = {"named": images_named, "flat": images_flat, "plain": plain_images}


def groups(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Where parameters have names, those that are no matrices have a group of their own."""
    names = {key.replace("_fsdp_wrapped_module.", ""): one for key, one in model.named_parameters()}
    if any(key.endswith("_flat_param") for key in names):
        return torch.optim.AdamW(names.values(), lr=lr)
    few = [one for key, one in names.items() if "bias" in key]
    rest = [one for key, one in names.items() if "bias" not in key]
    return torch.optim.AdamW([{"params": rest}, {"params": few}], lr=lr)


def save_images(rank: int, out: str, kind: str) -> dict[str, np.ndarray]:
    """Before there is any state of the optimizer, and after each of two steps."""
    model = IMAGES[kind]()
    optimizer = groups(model, 0.01)
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)
        for step in range(2):
            torch.manual_seed(step)
            model(torch.randn(8, 108)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ckpt.step()
            ckpt.save(wait=True)
    return whole_state(model, optimizer)


def restore_images(rank: int, out: str, kind: str, expected: dict[str, np.ndarray]) -> list[str]:
    model = IMAGES[kind]()
    with torch.no_grad():
        for one in model.parameters():
            one.fill_(7)
    optimizer = groups(model, 0.5)
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        assert ckpt.resume() == 3
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    return differing(expected, whole_state(model, optimizer))


@pytest.fixture(scope="module")
def saved_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("runs")
    ranks = {"named": 3, "flat": 2, "plain": 1}
    return root, {kind: RankProcesses()(ranks[kind], save_images, str(root / kind), kind)[0] for kind in IMAGES}


@pytest.mark.parametrize("there", IMAGES)
@pytest.mark.parametrize("here, ranks", [("named", 2), ("named", 3), ("flat", 2), ("flat", 3), ("plain", 1)])
def test_any_shapes_and_orders_in_memory_come_back_element_by_element(run_ranks, saved_images, there, here, ranks):
    root, expected = saved_images
    assert run_ranks(ranks, restore_images, str(root / there), here, expected[there]) == [[]] * ranks


# What is in the way


def in_full(rank: int, out: str) -> list[str]:
    """What the full format says. It takes weights alone, which FSDP1 puts together, and moments that it did not cut."""
    refused = []
    for make in (named, flat, hybrid if dist.get_world_size() == 4 else half_named):
        model = make()
        with (
            pytest.raises(RankFailure) as raised,
            running(out, {"model": model, "o": adamw(model)}, format="full"),
        ):
            pass
        refused.append(str(raised.value))
    model = uncut_named()
    for folder, state in (("weights", {"model": named()}), ("uncut", {"model": model, "o": adamw(model)})):
        with running(f"{out}.{folder}", state, format="full") as ckpt:
            ckpt.step()
            ckpt.save(wait=True)
    return refused


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_full_format_refuses_moments_that_are_cut_before_training(run_ranks, tmp_path, ranks):
    for told_by in run_ranks(ranks, in_full, str(tmp_path / "run")):
        assert len(told_by) == 3
        assert all("state['o'] has parameters" in one and 'use format="sharded"' in one for one in told_by)


def save_as(rank: int, out: str, make: Make, format: str) -> dict[str, np.ndarray]:
    model = make()
    optimizer = adamw(model)
    train(model, optimizer)
    with running(out, {"model": model, "optim": optimizer}, format=format) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)
    return whole_state(model, optimizer)


def restore_full(rank: int, out: str) -> tuple[dict[str, np.ndarray], str]:
    found = restore(out, named)
    model, optimizer = spoilt(flat)
    with running(out, {"model": model, "optim": optimizer}) as ckpt, pytest.raises(StateMismatch) as raised:
        ckpt.resume()
    assert all((one == 7).all() for key, one in whole_state(model, optimizer).items() if "norm" not in key)
    return found, str(raised.value)


def test_a_full_checkpoint_goes_where_parameters_have_their_order(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    expected, *_ = run_ranks(1, save_as, out, plain, "full")
    for found, refused in run_ranks(2, restore_full, out):
        assert differing(found, expected) == []
        assert 'optim (it was not saved with format="sharded", so it knows parameters by number' in refused


class Odd(torch.optim.SGD):
    """An optimizer whose state is neither a number nor of the shape of its parameter."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for one in group["params"]:
                self.state[one]["blocks"] = torch.ones(-(-one.numel() // 4), 2)


def odd(rank: int, out: str, make: Make) -> str:
    model = make()
    optimizer = Odd(model.parameters(), lr=0.1)
    optimizer.step()
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        ckpt.step()
        with pytest.raises(RankFailure) as raised:
            ckpt.save(wait=True)
    return str(raised.value)


@pytest.mark.parametrize("make", [named, flat], ids=["named", "flat"])
def test_state_that_nobody_could_cut_otherwise_is_refused_by_name(run_ranks, tmp_path, make):
    for told_by in run_ranks(2, odd, str(tmp_path / "run"), make):
        assert re.search(r"TypeError: blocks of few has the shape \((1|16), 2\), and the part of the param", told_by)
        assert "fully_shard" in told_by


def factored(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(model.parameters())


def save_factored(rank: int, out: str, make: Make) -> None:
    """As torch has it; of a model that FSDP2 has cut, it cannot take a step on the CPU, so that is done by hand."""
    model = make()
    optimizer = factored(model)
    if make is plain:
        train(model, optimizer)
    else:
        for one in model.parameters():
            rows = torch.ones(len(one), 1) if one.ndim == 2 else torch.ones_like(one)
            optimizer.state[one] = {"step": torch.tensor(1.0), "row_var": rows}
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)


def restore_factored(rank: int, out: str) -> str:
    model = named()
    with running(out, {"model": model, "optim": factored(model)}) as ckpt, pytest.raises(StateMismatch) as raised:
        ckpt.resume()
    return str(raised.value)


@pytest.mark.parametrize("make", [plain, fsdp], ids=["plain", "fsdp"])
def test_state_by_rows_and_columns_has_no_place_in_a_range(run_ranks, tmp_path, make):
    run_ranks(2, save_factored, str(tmp_path / "run"), make)
    for told_by in run_ranks(2, restore_factored, str(tmp_path / "run")):
        assert "optim: there is state of the shape (" in told_by and "FSDP1" in told_by


def save_uneven(rank: int, out: str) -> None:
    """A weight joined after the first step, and another never does."""
    model = plain()
    model.few.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    optimizer = adamw(model)
    train(model, optimizer, steps=1)
    model.few.requires_grad_(True)
    train(model, optimizer, steps=2)
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)


def restore_uneven(rank: int, out: str, make: Make) -> tuple[str, list[float]]:
    model, optimizer = spoilt(make)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distckpt").addHandler(handler)
    logging.getLogger("distckpt").setLevel(logging.INFO)
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        ckpt.resume()
    told_by = next((one for one in lines if "resumed" in one), "")
    return told_by, sorted({float(state["step"]) for state in optimizer.state.values()})


def test_one_flat_parameter_has_one_count_of_steps_and_what_that_changes_is_told(run_ranks, tmp_path):
    run_ranks(1, save_uneven, str(tmp_path / "run"))
    (told_by, counts), (_, counts_there) = run_ranks(2, restore_uneven, str(tmp_path / "run"), flat)
    assert counts == counts_there == [3.0] and "exact: model, rng" not in told_by and "not exact: optim" in told_by
    assert "optim.few (its step was 2.0, and is 3.0 as that of norm.bias, with which it is one flat par" in told_by
    assert "optim.norm.weight (there is nothing of it, so it has zeros, as few has something, with which" in told_by
    (told_by, counts), _ = run_ranks(2, restore_uneven, str(tmp_path / "run"), named)
    assert counts == [2.0, 3.0] and "exact: model, optim" in told_by


def cut_before(rank: int, out: str) -> str:
    mesh = mesh_of(2, 2, names=("data", "tensor"))
    model = plain(Wide)
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    model = wrapped(model, device_mesh=mesh["data"], use_orig_params=True)
    with pytest.raises(TypeError) as raised, running(out, {"model": model}):
        pass
    dist.barrier()
    return str(raised.value)


def test_what_tensor_parallelism_cut_before_is_refused_by_name(run_ranks, tmp_path):
    for told_by in run_ranks(4, cut_before, str(tmp_path / "run")):
        assert "up.weight is cut by FullyShardedDataParallel (FSDP1)" in told_by


# Other ways to weights


def start(rank: int, out: str, source: str, dtype: torch.dtype) -> dict[str, np.ndarray]:
    model = named() if dtype is torch.float32 else wrapped(plain().to(dtype), use_orig_params=True)
    with torch.no_grad():
        for one in model.parameters():
            one.fill_(7)
    with running(out, {"model": model}, init_from=source) as ckpt:
        assert ckpt.resume() == 0
    configs = StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=False)
    with FullyShardedDataParallel.state_dict_type(model, *configs):
        return {f"model.{key}": one.clone().float().numpy() for key, one in model.state_dict().items()}


@pytest.mark.parametrize("what", ["run", "pth", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_weights_of_any_source_and_dtype_go_into_flat_parameters(run_ranks, tmp_path, what, dtype):
    source, out = tmp_path / "source", str(tmp_path / "run")
    weights = plain().state_dict()
    if what == "run":
        run_ranks(2, save_as, str(source), fsdp, "sharded")
        expected = run_ranks(1, restore_plain, str(source))[0]
    else:
        source = source.with_suffix(f".{what}")
        torch.save(weights, source) if what == "pth" else save_file(weights, source)
        expected = {f"model.{key}": one.numpy() for key, one in weights.items()}
    wanted = {key: torch.from_numpy(one).to(dtype).float().numpy() for key, one in expected.items()}
    for found in run_ranks(3, start, out, str(source), dtype):
        assert differing(found, wanted) == []


def restore_plain(rank: int, out: str) -> dict[str, np.ndarray]:
    return {key: one for key, one in restore(out, plain).items() if key.startswith("model.")}


def torch_reads(rank: int, folder: str, expected: dict[str, np.ndarray]) -> list[str]:
    """What torch itself does not read as it was, whole."""
    found = {key: torch.full_like(torch.from_numpy(one), 7) for key, one in expected.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(folder))
    return differing({key: one.numpy() for key, one in found.items()}, expected)


def test_torch_itself_reads_what_fsdp1_had(run_ranks, checkpoints, saved_images):
    for root, expected in (checkpoints, saved_images):
        for name in [name for name in expected if name.partition("-")[0] in ("named", "flat", "hybrid")]:
            (folder, *_) = sorted((root / name).glob("step-*/"), reverse=True)
            assert run_ranks(2, torch_reads, str(folder), expected[name]) == [[], []]

"""State by parameter name on real ranks: what belongs to spread parameters, and what each rank has of its own."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sharded_programs import (
    Holder,
    Net,
    adamw,
    ddp,
    differing,
    fsdp,
    fsdp_and_tensor_parallel,
    fused,
    mesh_of,
    plain,
    restored,
    running,
    saved,
    strided,
    told,
    train,
    whole,
    wide,
    wide_fsdp,
)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

from distckpt import StateMismatch

Make = Callable[[], nn.Module]


def save(out: str, **state: Any) -> None:
    with running(out, state) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)


def resume(out: str, **state: Any) -> None:
    with running(out, state) as ckpt:
        assert ckpt.resume() == 1


def save_run(rank: int, out: str, make: Make, format: str = "sharded") -> dict[str, np.ndarray]:
    return saved(out, make, format=format)


def restore_run(rank: int, out: str, make: Make) -> dict[str, np.ndarray]:
    return restored(out, make)


def fill(model: nn.Module) -> nn.Module:
    """Nothing of what it was is left."""
    with torch.no_grad():
        for one in (*model.parameters(), *model.buffers()):
            one.fill_(7)
    return model


# State of another shape than the parameter that it belongs to


def worked_out(mean: Tensor) -> Tensor:
    """Over a dimension that is spread it is a sum of which each rank has a part."""
    if isinstance(mean, DTensor):
        return mean.redistribute(placements=[Replicate() if one.is_partial() else one for one in mean.placements])
    return mean


def on_all_ranks(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
    return tensor.clone()


class Factored(torch.optim.Optimizer):
    """Keeps means over rows and over columns, as Adafactor does, spread as they come out of its parameters; a copy of
    the first that is on all ranks; and numbers that are not spread."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for one in group["params"]:
                state, square = self.state[one], one.grad.square() + 1e-3
                state["step"] = state.get("step", torch.tensor(0.0)) + 1
                for name, dim in (("rows", -1), ("columns", 0)):
                    mean = worked_out(square.mean(dim=dim, keepdim=True))
                    state[name] = mean if name not in state else state[name].add_(mean)
                state["copy"] = on_all_ranks(state["rows"])
                state["pair"] = state.get("pair", torch.zeros(2)) + 1
                one -= group["lr"] * one.grad / (state["rows"] * state["columns"]).sqrt()


def factored(make: Make) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make()
    return model, Factored(model.parameters())


def spelled(optimizer: torch.optim.Optimizer) -> list[Any]:
    """How the state is spread."""
    states = [optimizer.state[one] for group in optimizer.param_groups for one in group["params"]]
    return [[name, str(getattr(one, "placements", ""))] for state in states for name, one in state.items()]


def save_factored(rank: int, out: str, make: Make) -> Any:
    """What was saved, how it was spread, and what it came to two steps later."""
    model, optimizer = factored(make)
    train(model, optimizer)
    save(out, model=model, optim=optimizer)
    held, spread = told(model, optimizer), spelled(optimizer)
    train(model, optimizer)
    return held, spread, told(model, optimizer)


def restore_factored(rank: int, outs: Mapping[str, Any], make: Make) -> Any:
    """Of each run: what was restored, how it is spread, and what it came to two steps later."""
    found = {}
    for out in outs:
        model, optimizer = factored(make)
        resume(out, model=fill(model), optim=optimizer)
        held, spread = told(model, optimizer), spelled(optimizer)
        train(model, optimizer)
        found[out] = held, spread, told(model, optimizer)
    return found


def test_means_over_rows_and_columns_come_back_spread_as_their_parameters_are(run_ranks, tmp_path):
    programs = {"plain": (wide, 1), "fsdp": (wide_fsdp, 2), "tp": (fsdp_and_tensor_parallel, 4)}
    runs = {}
    for name, (make, ranks) in programs.items():
        runs[str(tmp_path / name)] = run_ranks(ranks, save_factored, str(tmp_path / name), make)[0]
    for name, (make, ranks) in programs.items():
        for out, (held, spread, later) in run_ranks(ranks, restore_factored, runs, make)[0].items():
            assert differing(held, runs[out][0]) == [], f"{out} in {name}"
            if out == str(tmp_path / name):
                assert spread == runs[out][1] and differing(later, runs[out][2]) == []


# Parts that hold spread tensors of their own


def average(make: Make, number: float) -> Holder:
    model = make()
    return Holder({"average": {key: one.detach() * 0 + number for key, one in model.named_parameters()}, "count": 3})


def save_average(rank: int, out: str) -> None:
    save(out, average=average(fsdp, 0.5))


def restore_average(rank: int, out: str, make: Make) -> list[Any]:
    live = average(make, 2.0)
    kinds = {key: type(one) for key, one in live.tensors["average"].items()}
    resume(out, average=live)
    assert {key: type(one) for key, one in live.tensors["average"].items()} == kinds and live.tensors["count"] == 3
    return sorted({number for one in live.tensors["average"].values() for number in whole(one).flatten().tolist()})


@pytest.mark.parametrize("make, ranks", [(plain, 1), (fsdp, 3)], ids=["plain", "fsdp"])
def test_a_part_that_keeps_averages_of_spread_weights_gets_them_spread_as_its_own(run_ranks, tmp_path, make, ranks):
    run_ranks(2, save_average, str(tmp_path / "run"))
    assert run_ranks(ranks, restore_average, str(tmp_path / "run"), make) == [[0.5]] * ranks


# Saving changes nothing, and creates nothing


def saves_before_the_first_step(rank: int, out: str) -> tuple[list[str], bool]:
    model, optimizer = (first := fsdp()), adamw(first)
    save(out, model=model, optim=optimizer)
    is_without = not optimizer.state
    train(model, optimizer)
    other, reference = (second := fsdp()), adamw(second)
    train(other, reference)
    return differing(told(model, optimizer), told(other, reference)), is_without


def test_a_save_before_the_first_step_creates_no_state_and_training_goes_on_as_without(run_ranks, tmp_path):
    assert run_ranks(2, saves_before_the_first_step, str(tmp_path / "run")) == [([], True)] * 2
    text = (tmp_path / "run" / "step-00000001" / "state.json").read_text()
    assert '"state":{}' in text and "exp_avg" not in text


# Frozen, later frozen, and not yet used


def save_frozen(rank: int, out: str) -> dict[str, np.ndarray]:
    model = fsdp()
    model.second.requires_grad_(False)  # from the start
    optimizer = adamw(model)
    train(model, optimizer)
    model.first.requires_grad_(False)  # later
    save(out, model=model, optim=optimizer)
    return told(model, optimizer)


def restore_frozen(rank: int, out: str, make: Make) -> tuple[dict[str, np.ndarray], int]:
    model = fill(make())
    for part in (model.first, model.second):
        part.requires_grad_(False)
    optimizer = adamw(model)
    resume(out, model=model, optim=optimizer)
    return told(model, optimizer), len(optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("make, ranks", [(plain, 1), (fsdp, 3)], ids=["plain", "fsdp"])
def test_what_was_frozen_later_keeps_its_moments_and_what_always_was_has_none(run_ranks, tmp_path, make, ranks):
    expected, *_ = run_ranks(2, save_frozen, str(tmp_path / "run"))
    assert "optim.state.first.weight.exp_avg" in expected and "optim.state.second.weight.exp_avg" not in expected
    for found, parameters in run_ranks(ranks, restore_frozen, str(tmp_path / "run"), make):
        assert differing(found, expected) == [] and parameters == 7


# Tied weights, and modules that stand in two places


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.again = self.middle
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.middle(self.embedding(x))))


def tied(make: Make) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make()
    optimizer = adamw(model)
    return model, optimizer


def tied_fsdp() -> nn.Module:
    return fully_shard(plain(Tied), mesh=mesh_of(dist.get_world_size()))


def plain_tied() -> nn.Module:
    return plain(Tied)


def save_tied(rank: int, out: str) -> dict[str, np.ndarray]:
    model, optimizer = tied(tied_fsdp)
    model(torch.arange(7)).sum().backward()
    optimizer.step()
    save(out, model=model, optim=optimizer)
    return told(model, optimizer)


def restore_tied(rank: int, out: str, make: Make) -> dict[str, np.ndarray]:
    model, optimizer = tied(make)
    resume(out, model=fill(model), optim=optimizer)
    assert model.head.weight is model.embedding.weight and model.again is model.middle
    return told(model, optimizer)


@pytest.mark.parametrize("make, ranks", [(plain_tied, 1), (tied_fsdp, 3)], ids=["plain", "fsdp"])
def test_tied_weights_are_stored_under_each_name_and_come_back_tied(run_ranks, tmp_path, make, ranks):
    expected, *_ = run_ranks(2, save_tied, str(tmp_path / "run"))
    names = {key for key in expected if key.startswith("model.")}
    assert {"model.embedding.weight", "model.head.weight", "model.again.weight", "model.middle.weight"} < names
    assert "optim.state.embedding.weight.exp_avg" in expected and "optim.state.head.weight.exp_avg" not in expected
    for found in run_ranks(ranks, restore_tied, str(tmp_path / "run"), make):
        assert differing(found, expected) == []


# Models that are made without memory


def without_memory() -> nn.Module:
    with torch.device("meta"):
        model = Net()
    mesh = mesh_of(dist.get_world_size())
    for part in (model.first, model.second):
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def emptied() -> nn.Module:
    return without_memory().to_empty(device="cpu")


def resume_without_memory(rank: int, out: str) -> str:
    model = without_memory()
    with running(out, {"model": model, "optim": adamw(model)}) as ckpt, pytest.raises(StateMismatch) as raised:
        ckpt.resume()
    return str(raised.value)


def test_a_model_that_was_made_without_memory_is_filled_once_it_has_some(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    expected, *_ = run_ranks(2, save_run, out, fsdp)
    for found in run_ranks(3, restore_run, out, emptied):
        assert differing(found, expected) == []
    for told_by in run_ranks(2, resume_without_memory, out):
        assert "model.few is on the meta device" in told_by and "call to_empty" in told_by


# From one format to the other


def go_on(rank: int, out: str, make: Make, format: str) -> dict[str, np.ndarray]:
    """The run is resumed, and saved once more in that format; what was restored."""
    model = fill(make())
    optimizer = adamw(model, lr=0.5)
    with running(out, {"model": model, "optim": optimizer}, format=format) as ckpt:
        done = ckpt.resume()
        found = told(model, optimizer)
        ckpt.step()
        ckpt.save(wait=True)
        assert done > 0 and ckpt.latest.format == format and ckpt.latest.progress.step == done + 1
    return found


def test_a_run_goes_on_in_either_format_with_any_program(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    expected, *_ = run_ranks(1, save_run, out, plain, "full")
    for make, ranks, format in (
        (fsdp, 2, "sharded"),  # from full
        (ddp, 3, "full"),  # from sharded
        (fsdp, 3, "sharded"),
        (plain, 1, "full"),
        (ddp, 2, "sharded"),
        (ddp, 2, "full"),
    ):
        for found in run_ranks(ranks, go_on, out, make, format):
            assert differing(found, expected) == [], (make.__name__, format)


@pytest.mark.parametrize(
    "make, other, ranks", [(wide, fsdp_and_tensor_parallel, 4), (fused, strided, 2)], ids=["tensor parallel", "strided"]
)
def test_what_was_saved_whole_is_cut_in_every_way(run_ranks, tmp_path, make, other, ranks):
    out = str(tmp_path / "run")
    expected, *_ = run_ranks(1, save_run, out, make, "full")
    for found in run_ranks(ranks, restore_run, out, other):
        assert differing(found, expected) == []


def start(rank: int, out: str, source: str, make: Make) -> dict[str, np.ndarray]:
    model = fill(make())
    with running(out, {"model": model}, init_from=source) as ckpt:
        assert ckpt.resume() == 0
    return told(model, adamw(model))


@pytest.mark.parametrize("format", ["full", "sharded"])
def test_a_spread_model_starts_from_the_weights_of_either_format(run_ranks, tmp_path, format):
    source = str(tmp_path / "source")
    expected, *_ = run_ranks(1, save_run, source, plain, format)
    model = {key: one for key, one in expected.items() if key.startswith("model.")}
    for found in run_ranks(2, start, str(tmp_path / "run"), source, fsdp):
        assert differing(found, model) == []


# What each rank has of its own


class Loader:
    """A data loader: each rank is at another place of its data."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.at))

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "left": torch.arange(self.at)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]
        assert state["left"].tolist() == list(range(self.at))


def save_own(rank: int, out: str) -> list[float]:
    model = fsdp()
    torch.manual_seed(100 + rank)
    random.seed(100 + rank)
    save(out, model=model, optim=adamw(model), loader=Loader(10 + rank))
    return [torch.rand(1).item(), random.random()]


def restore_own(rank: int, out: str) -> tuple[int, list[float], str]:
    model = fsdp()
    loader = Loader(5)
    torch.manual_seed(7)
    random.seed(7)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distckpt").addHandler(handler)
    logging.getLogger("distckpt").setLevel(logging.INFO)
    resume(out, model=model, optim=adamw(model), loader=loader)
    return loader.at, [torch.rand(1).item(), random.random()], next((one for one in lines if "resumed" in one), "")


def test_what_is_a_ranks_own_comes_back_to_that_rank(run_ranks, tmp_path):
    drawn = run_ranks(2, save_own, str(tmp_path / "run"))
    found = run_ranks(2, restore_own, str(tmp_path / "run"))
    assert [one[:2] for one in found] == [(10, drawn[0]), (11, drawn[1])] and drawn[0] != drawn[1]
    assert found[0][2].endswith("exact: model, optim, loader, rng of 2 ranks")


@pytest.mark.parametrize("ranks", [1, 3])
def test_with_another_number_of_ranks_what_is_a_ranks_own_is_left_and_that_is_told(run_ranks, tmp_path, ranks):
    run_ranks(2, save_own, str(tmp_path / "run"))
    found = run_ranks(ranks, restore_own, str(tmp_path / "run"))
    torch.manual_seed(7)
    expected = [torch.rand(1).item(), random.Random(7).random()]
    assert [one[:2] for one in found] == [(5, expected)] * ranks
    assert found[0][2].endswith("exact: model, optim  not exact: loader, rng of 2 ranks")

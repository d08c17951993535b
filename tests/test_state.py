"""The state of a training program is read by name, and reading it changes nothing."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from standing import Standing, put_in
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from distckpt import Checkpointer
from distckpt.formats import Snapshot
from distckpt.matching import match
from distckpt.selection import Selection
from distckpt.state import Parts
from distckpt.wrappers import canonical_keys


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 3)).square().mean().backward()
        optimizer.step()


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return [[key, plain(one)] for key, one in value.items()]
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def all_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Every number that training depends on."""
    return plain([model.state_dict(), optimizer.state_dict(), torch.rand(2)])


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "fused": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_training_goes_on_bit_for_bit_as_without_a_capture(make, at):
    results = []
    for captures in (False, True):
        model = network()
        optimizer = make(model.parameters())
        train(model, optimizer, at)
        if captures:
            parts = Parts({"model": model, "optimizer": optimizer})
            parts.capture_shared(is_leader=True)
            parts.capture_own()
        train(model, optimizer, 3)
        results.append(all_of(model, optimizer))
    assert results[0] == results[1]


def test_an_optimizer_without_state_keeps_none_even_where_gradients_are():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(6, 3)).sum().backward()
    hooked: list[int] = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(1))
    captured = Parts({"optimizer": optimizer}).capture_shared(is_leader=True)["optimizer"]
    assert captured["state"] == {} and not optimizer.state and not hooked
    assert all(one.grad is not None for one in model.parameters())


def test_a_parameter_that_was_not_trained_yet_is_captured_without_state():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    model[3].requires_grad_(False)
    train(model, optimizer, 1)
    captured = Parts({"optimizer": optimizer}).capture_shared(is_leader=True)["optimizer"]
    assert len(captured["state"]) == 4 and len(captured["param_groups"][0]["params"]) == 6


def test_shared_state_is_captured_by_reference():
    model = network()
    captured = Parts({"model": model}).capture_shared(is_leader=True)["model"]
    assert captured["0.weight"].data_ptr() == model[0].weight.data_ptr()


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def with_compiled_layers() -> nn.Module:
    model = network()
    model[0], model[3] = compiled(model[0]), checkpoint_wrapper(model[3])
    return model


WRAPPED = {
    "plain": network,
    "ddp": lambda: DistributedDataParallel(network()),
    "dp": lambda: nn.DataParallel(network()),
    "compiled": lambda: compiled(network()),
    "compiled in place": lambda: (model := network(), model.compile(backend="eager"))[0],
    "ddp of compiled": lambda: DistributedDataParallel(compiled(network())),
    "compiled ddp": lambda: compiled(DistributedDataParallel(network())),
    "compiled layers": with_compiled_layers,
    "ddp of compiled layers": lambda: DistributedDataParallel(with_compiled_layers()),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_prefixes_of_wrappers_are_not_saved(one_rank, wrap):
    captured = Parts({"model": wrap()}).capture_shared(is_leader=True)["model"]
    assert list(captured) == list(network().state_dict())


@pytest.mark.parametrize("name", WRAPPED)
def test_what_was_saved_without_wrappers_is_loaded_into_them_and_back(one_rank, name):
    torch.manual_seed(1)
    trained = network()
    nn.init.normal_(trained[0].weight)
    opened = Standing(Snapshot({"model": Parts({"model": trained}).capture_shared(is_leader=True)["model"]}))
    parts = Parts({"model": WRAPPED[name]()})
    matched = put_in(match(parts, opened.snapshot, Selection(), strict=True, is_same_world=True), opened)
    loaded = parts.capture_shared(is_leader=True)["model"]
    assert all(torch.equal(loaded[key], value) for key, value in trained.state_dict().items())
    # Not BatchNorm, which reads older states its own way, and not what checkpoint_wrapper renames with a hook.
    first, last = ["model.0.weight", "model.0.bias"], ["model.3.weight", "model.3.bias"]
    assert matched.report.in_place == (first if "layers" in name else first + last)


def test_the_prefix_inside_an_averaged_model_is_its_own_but_not_that_of_ddp_in_it(one_rank):
    averaged = torch.optim.swa_utils.AveragedModel(DistributedDataParallel(network()))
    captured = Parts({"ema": averaged}).capture_shared(is_leader=True)["ema"]
    assert list(captured) == ["n_averaged", *(f"module.{key}" for key in network().state_dict())]


class Parent(nn.Module):
    """A module with children whose names are those of wrappers, without being one."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.ModuleDict({"module": nn.Linear(1, 1), "other": nn.Linear(1, 1)})


def test_a_child_that_is_called_like_a_wrapper_keeps_its_name(one_rank):
    keys = list(Parent().state_dict())
    assert list(canonical_keys(Parent(), keys).values()) == keys
    assert list(Parts({"m": DistributedDataParallel(Parent())}).capture_shared(is_leader=True)["m"]) == keys


class Loader:
    """A part that one can iterate over."""

    def __iter__(self) -> Any:
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        return {"at": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {"at": 3}


class IterableModule(nn.ModuleList):
    """Modules that can be iterated over are modules all the same."""


def test_what_can_be_iterated_over_is_each_ranks_own_unless_it_is_a_module():
    model = IterableModule([nn.Linear(1, 1)])
    parts = Parts({"model": model, "loader": Loader(), "optimizer": torch.optim.SGD(model.parameters())})
    assert list(parts.shared) == ["model", "optimizer"] and list(parts.own) == ["loader"]
    assert list(parts.capture_shared(is_leader=True)) == ["model", "optimizer"]
    assert list(parts.capture_own()) == ["loader", "rng"]
    assert parts.modules == {"model": model}


@pytest.mark.parametrize(
    ("per_rank", "own"), [([], []), (["model"], ["model"]), ({"model", "loader"}, ["model", "loader"])]
)
def test_per_rank_says_otherwise(per_rank, own):
    parts = Parts({"model": network(), "loader": Loader()}, per_rank)
    assert list(parts.own) == own
    assert list(parts.shared) == [name for name in ("model", "loader") if name not in own]


def test_a_module_of_each_rank_is_saved_without_prefixes_too():
    captured = Parts({"expert": with_compiled_layers()}, ["expert"]).capture_own()
    assert list(captured["expert"]) == list(network().state_dict())


@pytest.mark.parametrize("state", [None, {}, [], "model", network(), {1, 2}])
def test_a_state_that_is_no_dict_of_parts_is_refused(state):
    with pytest.raises(TypeError, match="state should be a dict of names and objects with state_dict"):
        Parts(state)


@pytest.mark.parametrize(
    "name",
    ["", "a/b", "..", "a.b", "a b", "1a", "_a", "é", "model\n", "rng", "state", "manifest", "claim", 3, None, ("a",)],
)
def test_a_name_that_is_no_name_of_a_file_is_refused(name):
    with pytest.raises(ValueError, match=r"is no name of a part of the state"):
        Parts({name: network()})


class Silent:
    """Nothing can be read of it."""

    def load_state_dict(self, state: Any) -> None: ...


class Deaf:
    """Nothing can be loaded into it."""

    load_state_dict = None

    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("part", "lacks"), [(Silent(), "state_dict"), (Deaf(), "load_state_dict"), (3, "state_dict"), ({}, "state_dict")]
)
def test_a_part_without_the_methods_is_refused_by_its_name(part, lacks):
    with pytest.raises(TypeError, match=rf"state\['extra'\] is a {type(part).__name__}, which has no {lacks}\(\)"):
        Parts({"model": network(), "extra": part})


@pytest.mark.parametrize("per_rank", ["loader", 3, True])
def test_a_per_rank_that_is_no_list_is_refused(per_rank):
    with pytest.raises(TypeError, match="per_rank should be a list of names in state"):
        Parts({"loader": Loader()}, per_rank)


@pytest.mark.parametrize("per_rank", [["model"], ["loader", "rng"]])
def test_a_per_rank_that_names_no_part_is_refused(per_rank):
    with pytest.raises(ValueError, match=r"per_rank names \['(model|rng)'\]; in state there are \['loader'\]"):
        Parts({"loader": Loader()}, per_rank)


def train_sharded(rank: int, out_dir: Path, total: int) -> Any:
    model = DistributedDataParallel(network())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    torch.manual_seed(rank)
    state = {"model": model, "optimizer": optimizer}
    ckpt = Checkpointer(out_dir, state, interval=2, timeout=timedelta(seconds=10))
    for _ in ckpt.steps(total):
        train(model, optimizer, 1)
    optimizer.consolidate_state_dict(0)
    return all_of(model, optimizer) if rank == 0 else None


def test_a_zero_redundancy_optimizer_is_saved_whole_and_goes_on_bit_for_bit(run_ranks, tmp_path):
    (expected, _) = run_ranks(2, train_sharded, tmp_path / "reference", 4, seconds=40)
    run_ranks(2, train_sharded, tmp_path / "stopped", 2, seconds=40)
    (resumed, _) = run_ranks(2, train_sharded, tmp_path / "stopped", 4, seconds=40)
    assert resumed == expected

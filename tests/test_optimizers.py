"""The state of optimizers goes by the names of parameters, however these are grouped, tied, wrapped or frozen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from standing import Standing, put_in
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distckpt import Checkpointer, StateMismatch
from distckpt.formats import Snapshot
from distckpt.matching import Matched, match
from distckpt.optimizers import by_number, is_by_name, members_of
from distckpt.selection import Selection
from distckpt.state import Parts

Optimizers = Callable[[nn.Module], torch.optim.Optimizer]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 2, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for _ in range(steps):

        def closure() -> Tensor:
            for one in optimizers:
                one.zero_grad()
            inputs = (torch.ones(5, 3) + torch.arange(3)).to(next(model.parameters()).dtype)
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        for one in optimizers:
            one.step(closure)


def captured(**parts: Any) -> Snapshot:
    return Snapshot(Parts(parts).capture_shared(is_leader=True, by_name=True))


def laid(saved: Snapshot, *, strict: bool = True, rename: Any = None, **parts: Any) -> Matched:
    opened = Standing(saved)
    selection = Selection.parse(None, None, rename)
    return put_in(match(Parts(parts), opened.snapshot, selection, strict=strict, is_same_world=True), opened)


def spelled(value: Any) -> Any:
    """With dtypes, shapes and bits."""
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), value.detach().contiguous().flatten().view(torch.uint8).tolist()]
    if isinstance(value, dict):
        return {key: spelled(one) for key, one in value.items()}
    return [spelled(one) for one in value] if isinstance(value, (list, tuple)) else value


def names(optimizer: torch.optim.Optimizer, **modules: nn.Module) -> list[str]:
    return [one.name for one in members_of(optimizer, modules)]


# Names


def test_parameters_are_called_as_in_their_module():
    model = net()
    assert names(adamw(model), model=model) == ["body.weight", "body.bias", "head.weight", "head.bias"]


def test_the_part_stands_before_the_name_where_an_optimizer_has_parameters_of_several():
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    both = torch.optim.SGD([*one.parameters(), other.bias], lr=0.1)
    assert names(both, one=one, other=other) == ["one.weight", "one.bias", "other.bias"]
    assert names(torch.optim.SGD([other.bias], lr=0.1), one=one, other=other) == ["bias"]


def test_what_no_module_has_goes_by_its_number():
    model, loose = nn.Linear(1, 1), nn.Parameter(torch.zeros(2))
    assert names(torch.optim.SGD([model.weight, loose], lr=0.1), model=model) == ["weight", "unnamed.1"]


def test_a_tied_parameter_goes_by_its_first_name():
    model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["embedding"].weight
    (member,) = members_of(adamw(model), {"model": model})
    assert member.name == "embedding.weight" and member.places[0] == ("model", "embedding.weight")
    assert "head.weight" in member.others


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [DistributedDataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_leave_no_trace_in_the_state(one_rank, wrap):
    bare = net()
    optimizer = adamw(bare)
    train(bare, optimizer)
    wrapped = wrap(net())
    other = adamw(wrapped)
    train(wrapped, other)
    assert spelled(captured(model=wrapped, optim=other).shared) == spelled(captured(model=bare, optim=optimizer).shared)


def test_a_wrapped_module_that_stands_in_two_places_has_no_prefix_in_either():
    shared = torch.compile(nn.Linear(2, 2), backend="eager")
    model = nn.ModuleDict({"encoder": shared, "decoder": shared})
    saved = captured(model=model, optim=adamw(model)).shared
    assert [*saved["model"]] == ["encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"]
    assert saved["optim"]["param_groups"]["encoder.weight"]["params"] == ["encoder.weight", "encoder.bias"]


def test_names_that_the_optimizer_was_given_are_not_stored_twice():
    model = net()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    (group,) = captured(model=model, optim=optimizer).shared["optim"]["param_groups"].values()
    assert "param_names" not in group and group["params"] == names(optimizer, model=model)
    laid(captured(model=model, optim=torch.optim.SGD(model.parameters(), lr=0.3)), model=model, optim=optimizer)
    assert optimizer.param_groups[0]["param_names"] == names(optimizer, model=model)
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_parameters_that_are_added_or_replaced_later_have_names_too():
    model = net()
    optimizer = torch.optim.SGD(model.body.parameters(), lr=0.1)
    parts = Parts({"model": model, "optim": optimizer})

    def known() -> list[str]:
        return [one.name for one in parts.members_in(optimizer)]

    assert known() == known() == ["body.weight", "body.bias"]
    optimizer.add_param_group({"params": [model.head.bias]})
    assert known() == ["body.weight", "body.bias", "head.bias"]
    model.head = nn.Linear(4, 2, bias=False)
    optimizer.param_groups[1]["params"] = [model.head.weight]
    assert known() == ["body.weight", "body.bias", "head.weight"]


# Whatever the optimizer, training goes on as if it had not been interrupted


class Odd(torch.optim.Optimizer):
    """State of every kind: means over rows and columns, whole numbers, flags, words, lists, a step that is a number."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01, "betas": (0.9, 0.99), "name": None})
        self.state["rounds"] = {"done": 0}  # of no parameter

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.state["rounds"]["done"] += 1
        for group in self.param_groups:
            for one in group["params"]:
                if one.grad is not None:
                    self._step(one, group["lr"])

    def _step(self, one: Tensor, lr: float) -> None:
        state = self.state[one]
        if not state:
            state["step"] = 0
            state["rows"] = torch.zeros(one.shape[:-1], dtype=torch.float64)
            state["seen"] = torch.zeros_like(one, dtype=torch.int64)
            state["mask"] = torch.zeros_like(one, dtype=torch.bool)
            state["mode"] = "warm"
            state["history"] = []
        state["step"] += 1
        state["rows"] += one.grad.square().mean(dim=-1)
        state["seen"] += 2**40 + 1
        state["mask"] = one.grad > 0
        state["history"] = [*state["history"][-1:], one.grad.clone()]
        assert state["mode"] == "warm"
        one -= lr * sum(state["history"]) / (1 + state["rows"].sqrt().unsqueeze(-1)).to(one.dtype) * state["step"]
        one += state["mask"] * (state["seen"] % 7).to(one.dtype) * 1e-3


OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True),
    "adamw": adamw,
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
    "foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True, amsgrad=True),
    "tensor lr": lambda model: torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01)),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters()),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.01),
    "rprop": lambda model: torch.optim.Rprop(model.parameters()),
    "asgd": lambda model: torch.optim.ASGD(model.parameters()),
    "nadam": lambda model: torch.optim.NAdam(model.parameters()),
    "lbfgs": lambda model: torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe"),
    "muon": lambda model: torch.optim.Muon([one for one in model.parameters() if one.ndim == 2]),
    "odd": lambda model: Odd(model.parameters()),
}


def saved_at(out: str, at: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    train(model, optimizer, steps=at)
    with Checkpointer(out, {"model": model, "optim": optimizer}, format="sharded", save_last=False) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("kind, dtype", [
    *((kind, torch.float32) for kind in OPTIMIZERS),
    *((kind, torch.bfloat16) for kind in ("adamw", "adagrad", "odd")),
], ids=str)  # fmt: skip
def test_training_goes_on_bit_for_bit_after_a_save_and_after_a_restore(tmp_path, kind, at, dtype):
    make = OPTIMIZERS[kind]
    reference = net().to(dtype)
    expected = make(reference)
    train(reference, expected, steps=at)
    train(reference, expected, steps=2, seed=2)

    first = net().to(dtype)
    optimizer = make(first)
    saved_at(str(tmp_path), at, first, optimizer)
    train(first, optimizer, steps=2, seed=2)
    assert spelled(first.state_dict()) == spelled(reference.state_dict()), "the save changed something"

    second = Net().to(dtype)
    other = make(second)
    with Checkpointer(tmp_path, {"model": second, "optim": other}, format="sharded", save_last=False) as ckpt:
        ckpt.resume()
    train(second, other, steps=2, seed=2)
    assert spelled(second.state_dict()) == spelled(reference.state_dict())
    assert spelled(other.state_dict()) == spelled(expected.state_dict())


def test_an_optimizer_that_has_not_stepped_is_saved_without_state_even_where_gradients_are():
    model = net()
    optimizer = adamw(model)
    model(torch.ones(1, 3)).sum().backward()
    assert captured(model=model, optim=optimizer).shared["optim"]["state"] == {} and not optimizer.state


# State in another precision than the parameters


class Precise(torch.optim.Optimizer):
    """Moments of 32 bits beside parameters of 16."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for one in group["params"]:
                state = self.state[one]
                state.setdefault("sum", torch.full_like(one, 1 / 3, dtype=torch.float32)).add_(one.float())


@pytest.mark.parametrize("by_name", [True, False])
def test_moments_of_32_bits_beside_parameters_of_16_keep_them(by_name):
    model = net().bfloat16()
    optimizer = Precise(model.parameters())
    optimizer.step()
    saved = Snapshot(Parts({"model": model, "optim": optimizer}).capture_shared(is_leader=True, by_name=by_name))
    other = net().bfloat16()
    live = Precise(other.parameters())
    told = laid(saved, model=other, optim=live)
    assert spelled(live.state_dict()) == spelled(optimizer.state_dict())
    assert not told.report.converted


def test_moments_follow_parameters_that_have_another_dtype_now_and_that_is_told():
    model = net()
    optimizer = adamw(model)
    train(model, optimizer)
    other = net().bfloat16()
    live = adamw(other)
    told = laid(captured(model=model, optim=optimizer), model=other, optim=live)
    assert {one["exp_avg"].dtype for one in live.state.values()} == {torch.bfloat16}
    assert {one["step"].dtype for one in live.state.values()} == {torch.float32}
    assert "optim.body.weight" in str(told.report) and told.report.inexact == {"model", "optim"}


class Rule(Precise):
    """Loads in a way of its own."""

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.state = {one: {"sum": of["sum"].bfloat16()} for one, of in self.state.items()}


def test_an_optimizer_that_loads_in_a_way_of_its_own_is_left_to_it():
    model = net().bfloat16()
    optimizer = Precise(model.parameters())
    optimizer.step()
    live = Rule(model.parameters())
    laid(captured(model=model, optim=optimizer), model=model, optim=live)
    assert {one["sum"].dtype for one in live.state.values()} == {torch.bfloat16}


# Frozen, unused, and new parameters


def test_a_parameter_that_had_no_gradient_yet_has_no_state_afterwards_either():
    model = net()
    optimizer = adamw(model)
    model.head(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    other = net()
    live = adamw(other)
    laid(captured(model=model, optim=optimizer), model=other, optim=live)
    assert {*live.state} == {other.head.weight, other.head.bias}
    train(model, optimizer)
    train(other, live)
    assert spelled(live.state_dict()) == spelled(optimizer.state_dict())


def test_what_was_frozen_from_the_start_stays_in_its_group():
    model = net()
    model.body.requires_grad_(False)
    optimizer = adamw(model)
    train(model, optimizer)
    saved = captured(model=model, optim=optimizer)
    assert [*saved.shared["optim"]["state"]] == ["head.weight", "head.bias"]
    assert len(saved.shared["optim"]["param_groups"]["body.weight"]["params"]) == 4
    live = adamw(model)
    laid(saved, model=model, optim=live)
    assert {*live.state} == {model.head.weight, model.head.bias}


def test_what_was_trained_and_is_frozen_now_gets_its_state_back():
    model = net()
    optimizer = adamw(model)
    train(model, optimizer)
    other = net()
    other.body.requires_grad_(False)
    live = adamw(other)
    laid(captured(model=model, optim=optimizer), model=other, optim=live)
    assert spelled(live.state_dict()) == spelled(optimizer.state_dict())


def test_a_new_parameter_is_missing_and_named():
    model = net()
    saved = captured(model=model, optim=adamw(model))
    model.extra = nn.Linear(1, 1)
    with pytest.raises(StateMismatch, match=r"missing in the checkpoint: .*optim\.extra\.weight.*optim\.extra\.bias"):
        laid(saved, model=model, optim=adamw(model))


def test_without_strict_a_new_parameter_starts_from_nothing_in_a_group_with_the_old_values():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    train(model, optimizer)
    saved = captured(model=model, optim=optimizer)
    model.extra = nn.Linear(1, 1)
    live = adamw(model)
    told = laid(saved, strict=False, model=model, optim=live)
    assert told.report.missing == ["model.extra.weight", "model.extra.bias", "optim.extra.weight", "optim.extra.bias"]
    assert len(live.state) == 4 and live.param_groups[0]["lr"] == 0.25 and "optim" in told.report.inexact


def test_a_parameter_that_is_gone_is_named():
    model = net()
    saved = captured(model=model, optim=adamw(model))
    del model.head.bias
    model.head.register_parameter("bias", None)
    with pytest.raises(StateMismatch, match=r"2 in the checkpoint alone: model\.head\.bias.*, optim\.head\.bias"):
        laid(saved, model=model, optim=adamw(model))


# Groups


def grouped(model: Net, body: float | Tensor, head: float | Tensor, **words: Any) -> torch.optim.Optimizer:
    groups = [{"params": [*model.body.parameters()], "lr": body}, {"params": [*model.head.parameters()], "lr": head}]
    return torch.optim.AdamW(groups, **words)


def trained(make: Callable[[Net], torch.optim.Optimizer]) -> tuple[Net, torch.optim.Optimizer]:
    model = net()
    optimizer = make(model)
    train(model, optimizer)
    return model, optimizer


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return {name: spelled(optimizer.state[one]) for name, one in model.named_parameters()}


def restored(saved: Snapshot, make: Callable[[Net], torch.optim.Optimizer], **words: Any) -> Any:
    """The program, how it was laid, and what its optimizer holds by name."""
    model = Net()
    optimizer = make(model)
    told = laid(saved, model=model, optim=optimizer, **words)
    return optimizer, told, moments(model, optimizer)


def test_groups_may_come_in_another_order():
    model, optimizer = trained(lambda model: grouped(model, 0.1, 0.2))

    def reordered(model: Net) -> torch.optim.Optimizer:
        groups = [{"params": [model.head.bias, model.head.weight]}, {"params": [model.body.bias, model.body.weight]}]
        return torch.optim.AdamW(groups, lr=0.5)

    live, told, held = restored(captured(model=model, optim=optimizer), reordered)
    assert [group["lr"] for group in live.param_groups] == [0.2, 0.1]
    assert held == moments(model, optimizer) and told.report.is_whole


def test_groups_of_equal_values_may_be_one():
    model, optimizer = trained(lambda model: grouped(model, 0.1, 0.1))
    live, told, held = restored(captured(model=model, optim=optimizer), adamw)
    assert [group["lr"] for group in live.param_groups] == [0.1]
    assert held == moments(model, optimizer) and told.report.is_whole


def test_groups_of_other_values_that_are_one_now_are_told_with_what_they_had():
    model, optimizer = trained(lambda model: grouped(model, 0.1, 0.2, weight_decay=0.3))
    saved = captured(model=model, optim=optimizer)
    expected = r"optim\.lr of the group of body\.weight \(0\.1 of body\.weight, 0\.2 of head\.weight\)"
    with pytest.raises(StateMismatch, match=expected):
        restored(saved, adamw)
    live, told, held = restored(saved, adamw, strict=False)
    assert live.param_groups[0]["lr"] == 0.01, "it keeps its own"
    assert live.param_groups[0]["weight_decay"] == 0.3 and held == moments(model, optimizer)
    assert told.report.inexact == {"optim"}


def test_learning_rates_that_are_tensors_cannot_be_one():
    model, optimizer = trained(lambda model: grouped(model, torch.tensor(0.1), torch.tensor(0.2)))
    saved = captured(model=model, optim=optimizer)
    with pytest.raises(StateMismatch, match=r"optim\.lr of the group of body\.weight \(a tensor of body"):
        restored(saved, adamw)
    live, _, _ = restored(saved, lambda model: grouped(model, torch.tensor(0.5), torch.tensor(0.5)))
    assert [group["lr"].item() for group in live.param_groups] == [torch.tensor(one).item() for one in (0.1, 0.2)]


def test_one_group_may_be_several():
    model, optimizer = trained(adamw)
    live, told, held = restored(captured(model=model, optim=optimizer), lambda model: grouped(model, 0.5, 0.6))
    assert [group["lr"] for group in live.param_groups] == [0.01, 0.01]
    assert held == moments(model, optimizer) and told.report.is_whole


def test_a_group_without_parameters_has_its_values_back():
    model = net()

    def make(lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [*model.parameters()]}, {"params": [], "lr": lr}], lr=0.1)

    live = make(0.5)
    laid(captured(model=model, optim=make(0.2)), model=model, optim=live)
    assert [group["lr"] for group in live.param_groups] == [0.1, 0.2]


def test_what_the_checkpoint_does_not_know_of_a_group_stays_and_is_told():
    model, optimizer = trained(adamw)
    saved = captured(model=model, optim=optimizer)
    for group in saved.shared["optim"]["param_groups"].values():
        del group["decoupled_weight_decay"]
    live, told, held = restored(saved, adamw)
    assert live.param_groups[0]["decoupled_weight_decay"] is True and held == moments(model, optimizer)
    assert told.report.kept == ["optim.decoupled_weight_decay of the group of body.weight"]
    assert told.report.is_whole and told.report.inexact == {"optim"}


def test_what_the_program_does_not_know_of_a_group_is_taken():
    model, optimizer = trained(adamw)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    live, _, _ = restored(captured(model=model, optim=optimizer), adamw)
    assert live.param_groups[0]["initial_lr"] == 0.01 and live.param_groups[0]["lr"] == 0.005


# Several optimizers, several modules


def test_several_optimizers_of_one_model_each_have_their_part():
    model = net()
    first, second = torch.optim.AdamW(model.body.parameters()), torch.optim.SGD(model.head.parameters(), momentum=0.9)
    train(model, first, second)
    saved = captured(model=model, first=first, second=second)
    assert [*saved.shared["first"]["state"]] == ["body.weight", "body.bias"]
    assert [*saved.shared["second"]["state"]] == ["head.weight", "head.bias"]
    other = net()
    live = torch.optim.AdamW(other.body.parameters()), torch.optim.SGD(other.head.parameters(), momentum=0.9)
    laid(saved, model=other, first=live[0], second=live[1])
    assert [spelled(one.state_dict()) for one in live] == [spelled(one.state_dict()) for one in (first, second)]


def test_one_optimizer_may_get_a_further_module_or_lose_one():
    model, alone = trained(adamw)
    further = nn.Linear(2, 1)
    both = torch.optim.AdamW([*model.parameters(), *further.parameters()], lr=0.5)
    told = laid(captured(model=model, optim=alone), strict=False, model=model, further=further, optim=both)
    assert told.report.missing == ["further (the whole part)", "optim.further.weight", "optim.further.bias"]
    assert moments(model, both) == moments(model, alone)

    back = adamw(model)
    told = laid(captured(model=model, further=further, optim=both), strict=False, model=model, optim=back)
    assert [*told.report.unplaced] == ["optim.further.weight", "optim.further.bias", "further (the whole part)"]
    assert moments(model, back) == moments(model, both)


def test_a_name_that_two_modules_have_is_not_taken_for_the_other():
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    alone = torch.optim.AdamW(one.parameters())
    one(torch.ones(1, 1)).sum().backward()
    alone.step()
    saved = captured(one=one, optim=alone)
    both = torch.optim.AdamW([*one.parameters(), *other.parameters()])
    told = laid(saved, strict=False, one=one, other=other, optim=both)
    assert "optim.one.weight" in told.report.missing and "optim.other.weight" in told.report.missing
    assert not both.state, "which of the two it was, nobody knows"


def test_a_tie_that_was_made_the_other_way_round_is_found():
    def tied(*order: str) -> nn.ModuleDict:
        layers = {"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)}
        layers["head"].weight = layers["embedding"].weight
        return nn.ModuleDict({name: layers[name] for name in order})

    model = tied("embedding", "head")
    optimizer = adamw(model)
    model["embedding"].weight.grad = torch.ones(3, 2)
    optimizer.step()
    saved = captured(model=model, optim=optimizer)
    assert [*saved.shared["optim"]["state"]] == ["embedding.weight"]
    assert {"embedding.weight", "head.weight"} == {*saved.shared["model"]}
    other = tied("head", "embedding")
    live = adamw(other)
    laid(saved, model=other, optim=live)
    assert other["head"].weight is other["embedding"].weight and torch.equal(other["head"].weight, model["head"].weight)
    assert spelled(live.state_dict()["state"]) == spelled(optimizer.state_dict()["state"])


def test_parameters_of_no_module_are_restored_by_number():
    loose = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    optimizer = torch.optim.Adam(loose, lr=0.1)
    for one in loose:
        one.grad = torch.ones_like(one)
    optimizer.step()
    live = torch.optim.Adam([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))])
    laid(captured(optim=optimizer), optim=live)
    assert spelled(live.state_dict()) == spelled(optimizer.state_dict())


def test_a_layer_that_is_called_otherwise_now_is_renamed_in_the_optimizer_too():
    model, optimizer = trained(adamw)

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Linear(3, 4)
            self.head = nn.Linear(4, 2)

    other = Other()
    live = adamw(other)
    laid(captured(model=model, optim=optimizer), rename={"^body": "trunk"}, model=other, optim=live)
    assert spelled(live.state_dict()) == spelled(optimizer.state_dict())


def test_a_layer_is_renamed_in_an_optimizer_of_several_modules():
    def program(name: str) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        one, other = nn.ModuleDict({name: nn.Linear(2, 2)}), nn.ModuleDict({name: nn.Linear(2, 3)})
        return one, other, torch.optim.Adam([*one.parameters(), *other.parameters()])

    one, other, optimizer = program("old")
    for parameter in (*one.parameters(), *other.parameters()):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    first, second, live = program("new")
    laid(captured(one=one, other=other, optim=optimizer), rename={"^old": "new"}, one=first, other=second, optim=live)
    assert spelled(live.state_dict()) == spelled(optimizer.state_dict())


# What is no state by name


@pytest.mark.parametrize(
    "state",
    [
        {"state": {}, "param_groups": {"body.weight": {"lr": 0.1}}},
        {"state": {}, "param_groups": {"body.weight": []}},
        {"state": [], "param_groups": {}},
        {"param_groups": {"body.weight": {"params": ["body.weight"]}}},
        {"state": {}, "param_groups": "none"},
        {"state": None, "param_groups": [{"params": [0, 1, 2, 3]}]},
        [],
        None,
    ],
    ids=str,
)
def test_what_is_no_state_of_an_optimizer_is_told(state):
    model = net()
    assert not is_by_name(state)
    with pytest.raises(StateMismatch, match=r"optim \(groups of .* parameters there, of \[4\] here\)"):
        laid(Snapshot({"model": dict(model.state_dict()), "optim": state}), model=model, optim=adamw(model))


def test_an_optimizer_whose_state_has_a_form_of_its_own_is_stored_as_it_is():
    class Own(torch.optim.SGD):
        def state_dict(self) -> Any:
            return {"mine": 3}

    model = net()
    assert captured(model=model, optim=Own(model.parameters(), lr=0.1)).shared["optim"] == {"mine": 3}


def test_nothing_of_what_was_saved_is_changed():
    model, optimizer = trained(adamw)
    saved = captured(model=model, optim=optimizer)
    before = spelled(saved.shared)
    by_number(saved.shared["optim"], adamw(model), members_of(optimizer, {"model": model}))
    laid(saved, model=net(), optim=adamw(model), strict=False)
    assert spelled(saved.shared) == before

"""The guard knows what optimizers change, and asks before they do."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from distckpt.destinations import _loads_as_stock
from distckpt.engine.guard import Guard, Places

pytestmark = pytest.mark.timeout(60)


class Waiting:
    """Counts how often it was asked to wait."""

    def __init__(self) -> None:
        self.times = 0

    def wait(self) -> None:
        self.times += 1


@pytest.fixture
def waiting() -> Waiting:
    return Waiting()


@pytest.fixture
def guard(waiting: Waiting) -> Iterator[Guard]:
    guard = Guard(waiting.wait)
    yield guard
    guard.close()


def stepped(module: nn.Module, **words: object) -> torch.optim.Optimizer:
    """An optimizer that took one step."""
    optimizer = torch.optim.AdamW(module.parameters(), **words)
    step(module, optimizer)
    return optimizer


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for one in module.parameters():
        one.grad = torch.ones_like(one)
    optimizer.step()


def place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.nbytes


def hooks() -> int:
    """How many there are in this process that are called before any optimizer's step."""
    return len(torch_optimizer._global_optimizer_pre_hooks)


# Steps


def test_each_step_of_any_optimizer_asks_once_before_anything_changes():
    class Looking:
        seen: list[bool] = []

        def look(self) -> None:
            self.seen.append(torch.equal(module.weight, before))

    module = nn.Linear(3, 3)
    before, looking = module.weight.clone(), Looking()
    guard = Guard(looking.look)
    optimizer = stepped(module)
    assert looking.seen == [True] and not torch.equal(module.weight, before)
    step(module, optimizer)
    assert looking.seen == [True, False]
    guard.close()


def test_an_optimizer_that_is_older_than_the_guard_asks_too(waiting):
    module = nn.Linear(3, 3)
    optimizer = stepped(module)
    guard = Guard(waiting.wait)
    step(module, optimizer)
    assert waiting.times == 1
    guard.close()


def test_two_guards_are_asked_each(guard, waiting):
    other = Waiting()
    second = Guard(other.wait)
    module = nn.Linear(3, 3)
    optimizer = stepped(module)
    second.close()
    step(module, optimizer)
    assert (waiting.times, other.times) == (2, 1)


@pytest.mark.parametrize("ends", [Guard.close, lambda guard: None])
def test_its_hook_goes_with_it(ends, waiting):
    before = hooks()
    guard = Guard(waiting.wait)
    assert hooks() == before + 1
    ends(guard)
    del guard
    gc.collect()
    assert hooks() == before


def test_it_keeps_nobody_alive_who_is_asked(guard):
    waiting = Waiting()
    known, second = weakref.ref(waiting), Guard(waiting.wait)
    del waiting
    gc.collect()
    assert known() is None
    stepped(nn.Linear(3, 3))
    second.close()


def test_it_keeps_no_optimizer_alive(guard):
    optimizer = stepped(nn.Linear(3, 3))
    known = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert known() is None and guard.guarded().whole == set()


# What is guarded


@pytest.mark.parametrize(
    "begin, count, is_guarded", [(0, 4, True), (3, 5, True), (7, 1, True), (7, 2, False), (-1, 2, False)]
)
def test_a_part_of_what_is_guarded_is_guarded_and_what_reaches_out_of_it_is_not(begin, count, is_guarded):
    places = Places({(1000, 8), (2000, 8), (2008, 8)})
    assert ((2000 + begin, count) in places) is is_guarded
    assert (999, 1) not in places and (3000, 1) not in places
    assert (5, 1) not in Places(set())


def test_parameters_and_moments_of_an_optimizer_that_took_a_step_are_guarded(guard):
    module = nn.Linear(3, 3)
    optimizer = stepped(module, amsgrad=True)
    expected = {place(one) for one in module.parameters()}
    expected |= {place(one) for state in optimizer.state.values() for one in state.values()}
    assert len(expected) == 10 and guard.guarded().whole == expected


def test_an_optimizer_that_took_no_step_guards_nothing(guard):
    torch.optim.AdamW(nn.Linear(3, 3).parameters())
    assert guard.guarded().whole == set()


def test_a_frozen_parameter_is_not_guarded(guard):
    module = nn.Linear(3, 3)
    optimizer = stepped(module)
    module.bias.requires_grad_(False)
    assert place(module.bias) not in guard.guarded() and place(module.weight) in guard.guarded()
    assert optimizer is not None


def test_a_group_that_was_added_later_is_guarded(guard):
    module, more = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = stepped(module)
    optimizer.add_param_group({"params": more.parameters()})
    assert place(more.weight) in guard.guarded()


def test_memory_that_was_given_back_is_not_guarded(guard):
    module = nn.Linear(3, 3)
    optimizer = stepped(module)
    old = module.weight.data
    module.weight.data = torch.ones(3, 3)
    assert place(old) not in guard.guarded() and place(module.weight) in guard.guarded()
    assert optimizer is not None


def test_moments_without_memory_of_their_own_are_no_reason_to_fail(guard):
    module = nn.Linear(3, 3)
    optimizer = stepped(module)
    optimizer.state[module.weight]["rows"] = torch.eye(3).to_sparse()
    optimizer.state[module.bias] = None
    assert place(module.weight) in guard.guarded()


# Modules


def loaded(module: nn.Module) -> None:
    module.load_state_dict(copy.deepcopy(module.state_dict()))


def test_a_module_that_is_held_asks_before_anything_is_loaded(guard, waiting):
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    guard.hold([module])
    loaded(module)
    assert waiting.times == 1
    loaded(module[0])
    assert waiting.times == 2


@pytest.mark.parametrize("ends", [Guard.let_go, Guard.close])
def test_a_module_that_was_let_go_asks_nobody_and_is_as_it_was(ends, guard, waiting):
    module = nn.Sequential(nn.Linear(3, 3))
    guard.hold([module])
    ends(guard)
    loaded(module)
    assert waiting.times == 0
    assert not module._load_state_dict_pre_hooks and not module[0]._load_state_dict_pre_hooks


def test_a_module_that_is_held_again_asks_once(guard, waiting):
    module = nn.Linear(3, 3)
    for _ in range(3):
        guard.hold([module, nn.Sequential(module)])
    loaded(module)
    assert waiting.times == 1
    guard.let_go()
    assert not module._load_state_dict_pre_hooks


def test_a_module_that_is_held_is_still_read_into_where_it_lives(guard):
    module = nn.Linear(3, 3)
    guard.hold([module])
    assert _loads_as_stock(module)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), lambda module: saved_and_loaded(module)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_of_a_module_that_is_held_loads_and_asks_nobody(duplicate, guard, waiting):
    module = nn.Sequential(nn.Linear(3, 3))
    guard.hold([module])
    other = duplicate(module)
    loaded(other)
    assert waiting.times == 0 and torch.equal(other[0].weight, module[0].weight)


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)  # a whole module is a pickle, of ours here
    return loaded

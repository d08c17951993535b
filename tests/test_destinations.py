"""What is read into live tensors themselves, and what goes through load_state_dict: the result is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_programs import Holder
from standing import Standing, put_in
from torch import Tensor, nn

from distckpt.formats import Snapshot
from distckpt.matching import Matched, match
from distckpt.optimizer_destinations import Positions
from distckpt.selection import Selection
from distckpt.state import Parts


def matched(parts: dict[str, Any], saved: dict[str, Any], *, strict: bool = True) -> tuple[Matched, Standing]:
    opened = Standing(Snapshot(saved))
    return match(Parts(parts), opened.snapshot, Selection(), strict=strict, is_same_world=True), opened


def restored(module: nn.Module, saved: dict[str, Any], *, strict: bool = True) -> list[str]:
    """Which keys were read straight into ``module``, which holds ``saved`` now."""
    told = put_in(*matched({"m": module}, {"m": saved}, strict=strict))
    return [key.removeprefix("m.") for key in told.report.in_place]


def filled(module: nn.Module, value: float = 0.5) -> dict[str, Tensor]:
    return {key: torch.full_like(one, value) for key, one in module.state_dict().items()}


# Straight into what is there


def test_parameters_and_buffers_are_read_into_their_own_memory():
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    module.register_buffer("mean", torch.zeros(3))
    found, opened = matched({"m": module}, {"m": filled(module)})
    memory = {tensor.data_ptr() for tensor in module.state_dict().values()}
    assert {target.data_ptr() for _, target in found.targets} == memory and len(found.targets) == 5
    weight = module[0].weight
    put_in(found, opened)
    assert module[0].weight is weight and weight.requires_grad and weight.is_leaf
    assert all(one.unique().tolist() == [0.5] for one in module.state_dict().values())


def test_nothing_of_a_module_of_many_is_loaded_again(monkeypatch):
    module = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("the slow way"))
    restored(module, filled(module))
    assert module[2].bias.item() == 0.5


def test_a_weight_that_is_tied_is_read_once_into_its_one_place():
    def tied() -> nn.Module:
        module = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
        module["head"].weight = module["embedding"].weight
        return module

    trained, module = tied(), tied()
    assert restored(module, dict(trained.state_dict())) == ["embedding.weight", "head.weight"]
    assert torch.equal(module["head"].weight, trained["embedding"].weight)
    assert module["head"].weight is module["embedding"].weight


def test_of_two_tensors_for_a_weight_that_is_tied_here_the_last_counts_as_in_load_state_dict():
    module = nn.ModuleDict({"one": nn.Linear(1, 1, bias=False), "two": nn.Linear(1, 1, bias=False)})
    module["two"].weight = module["one"].weight
    saved = {"one.weight": torch.tensor([[1.0]]), "two.weight": torch.tensor([[2.0]])}
    assert restored(module, saved) == ["one.weight"]
    assert module["one"].weight.item() == 2.0


def test_one_tensor_of_the_checkpoint_fills_what_is_not_tied_here():
    module = nn.ModuleDict({"one": nn.Linear(2, 1, bias=False), "two": nn.Linear(2, 1, bias=False)})
    weight = torch.tensor([[1.0, 2.0]])
    assert restored(module, {"one.weight": weight, "two.weight": weight}) == ["one.weight", "two.weight"]
    module["one"].weight.data.zero_()
    assert module["two"].weight.tolist() == [[1.0, 2.0]]


# Any memory


def laid_out(shape: tuple[int, ...], order: list[int], gap: int, start: int, dtype: torch.dtype) -> Tensor:
    """A tensor whose dimensions lie in that order in memory, with ``gap`` elements between the innermost."""
    order = sorted(range(len(shape)), key=lambda one: (order + [0] * 9)[one])
    strides, step = [0] * len(shape), 1 + gap
    for dimension in order:
        strides[dimension] = step
        step *= max(shape[dimension], 1)
    return torch.zeros(start + step, dtype=dtype).as_strided(shape, strides, start)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
places = st.builds(
    laid_out, shapes, st.permutations(range(4)), st.integers(0, 2), st.integers(0, 3), st.sampled_from(DTYPES)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(places, max_size=5), st.integers(0, 3))
def test_a_tensor_of_any_type_shape_and_strides_holds_what_it_would_hold_after_load_state_dict(tensors, expanded):
    module = nn.Module()
    for nth, tensor in enumerate(tensors):
        module.register_buffer(f"at{nth}", tensor)
    module.register_buffer("expanded", torch.zeros(1).expand(expanded))
    saved = {key: torch.randint(0, 2, one.shape).to(one.dtype) for key, one in module.state_dict().items()}
    saved["expanded"] = torch.zeros(expanded)
    expected = copy.deepcopy(module)
    if expanded < 2:  # torch itself refuses to write into memory that several elements share
        expected.load_state_dict(saved)
        in_place = restored(module, saved)
        assert in_place == list(saved)
        assert all(torch.equal(value, module.state_dict()[key]) for key, value in expected.state_dict().items())
    else:
        found, _ = matched({"m": module}, {"m": saved})
        assert "m.expanded" not in found.report.in_place


@pytest.mark.parametrize(
    "make",
    [lambda: torch.zeros(2, dtype=torch.complex64).conj(),
     lambda: torch.zeros(2, 2).to_sparse(), lambda: torch._neg_view(torch.zeros(2))],
    ids=["conjugate", "sparse", "negative"],
)  # fmt: skip
def test_what_is_no_plain_memory_is_not_read_into(make):
    module = nn.Module()
    module.register_buffer("odd", make())
    saved = {"odd": torch.zeros(module.odd.shape, dtype=module.odd.dtype)}
    assert matched({"m": module}, {"m": saved})[0].report.in_place == []


# What loads in a way of its own


class Doubling(nn.Linear):
    """Loads twice what was saved."""

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        for key in state:
            if key.startswith(prefix):
                state[key] = state[key] * 2
        super()._load_from_state_dict(state, prefix, *args)


class DoublingWhole(nn.Sequential):
    def load_state_dict(self, state: Any, *args: Any, **words: Any) -> Any:
        return super().load_state_dict({key: value * 2 for key, value in state.items()}, *args, **words)


def doubling_by_a_hook(register: str) -> nn.Module:
    def hook(*args: Any) -> None:
        state, prefix = args[-7:-5]
        for key in list(state):
            if key.startswith(prefix):
                state[key] = state[key] * 2

    module = nn.Linear(2, 1)
    getattr(module, register)(hook)
    return module


def doubling_after(module: nn.Module) -> nn.Module:
    def hook(module: Any, told: Any) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(2)

    module.register_load_state_dict_post_hook(hook)
    return module


def around(module: nn.Module) -> nn.Module:
    """A parent that changes what its children are given."""
    parent = nn.Sequential(module)
    parent._load_from_state_dict = lambda state, *_: [state.update({key: one * 2}) for key, one in state.items()]
    return parent


CUSTOM: dict[str, Callable[[], nn.Module]] = {
    "an override": lambda: Doubling(2, 1),
    "an override of the whole": lambda: DoublingWhole(nn.Linear(2, 1)),
    "a pre-hook": lambda: doubling_by_a_hook("register_load_state_dict_pre_hook"),
    "an old pre-hook": lambda: doubling_by_a_hook("_register_load_state_dict_pre_hook"),
    "a post-hook": lambda: doubling_after(nn.Linear(2, 1)),
    "an override of the parent": lambda: around(nn.Linear(2, 1)),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_what_loads_in_a_way_of_its_own_does_and_its_neighbours_are_read_into(name):
    module = nn.ModuleDict({"before": nn.Linear(2, 1), "custom": CUSTOM[name](), "after": nn.Linear(2, 1)})
    in_place = restored(module, filled(module))
    for key, value in module.state_dict().items():
        # Only part of a whole state is given to an override of load_state_dict of a module that is inside of another.
        expected = 1.0 if "custom" in key and name != "an override of the whole" else 0.5
        assert value.unique().tolist() == [expected], key
    neighbours = [f"{one}.{key}" for one in ("before", "after") for key in ("weight", "bias")]
    assert set(neighbours) <= set(in_place)
    if name != "an override of the whole":
        assert set(in_place) == set(neighbours)


def test_the_override_of_a_part_is_called_with_all_of_its_state():
    module = DoublingWhole(nn.Linear(2, 1))
    assert restored(module, filled(module)) == [] and module[0].weight.unique().tolist() == [1.0]


def test_a_hook_after_loading_sees_which_keys_are_missing_and_none_that_was_read_in_place():
    seen: list[Any] = []
    module = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    module[1].register_load_state_dict_post_hook(lambda _, told: seen.append(list(told.missing_keys)))
    assert restored(module, filled(module)) == ["0.weight", "0.bias"]
    assert restored(module, {"0.weight": torch.ones(1, 2)}, strict=False) == ["0.weight"]
    assert seen == [[], ["0.bias", "1.weight", "1.bias"]]


def test_a_hook_of_ours_stands_in_nobodys_way():
    class Ours:
        is_of_distckpt = True

        def __call__(self, *_: Any) -> None:
            pytest.fail("nothing is loaded, so nothing need wait")

    module = nn.Linear(2, 1)
    module.register_load_state_dict_pre_hook(Ours())
    assert restored(module, filled(module)) == ["weight", "bias"]


def test_a_state_that_shows_other_tensors_than_the_modules_own_is_loaded():
    module = nn.Linear(2, 1)
    module._register_state_dict_hook(lambda _, state, prefix, __: state.update(weight=state["weight"].clone()))
    assert restored(module, filled(module)) == ["bias"] and module.weight.unique().tolist() == [0.5]


def test_the_version_rule_of_batch_norm_holds():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    saved = filled(module, 2)
    assert restored(module, saved) == ["0.weight", "0.bias"]
    assert module[1].num_batches_tracked.item() == 2 and module[1].running_var.tolist() == [2.0, 2.0]


def test_a_buffer_that_is_not_saved_is_left():
    module = nn.Linear(2, 1)
    module.register_buffer("cache", torch.zeros(3), persistent=False)
    restored(module, filled(module))
    assert module.cache.tolist() == [0.0] * 3


def test_extra_state_with_tensors_in_it_is_read_and_set():
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"scale": torch.zeros(2)}

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    module = Extra(1, 1)
    saved = dict(module.state_dict()) | {"_extra_state": {"scale": torch.ones(2)}}
    assert restored(module, saved) == ["weight", "bias"] and module.extra["scale"].tolist() == [1.0, 1.0]


# Optimizers and other parts


def trained(make: Callable[..., torch.optim.Optimizer], **words: Any) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = make(module.parameters(), **words)
    module(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("words", [{}, {"fused": True}, {"amsgrad": True}, {"foreach": True}], ids=str)
def test_an_optimizer_takes_what_was_read_for_its_own_without_a_copy(words, has_state):
    saved = trained(torch.optim.AdamW, **words)
    live = trained(torch.optim.AdamW, **words)
    if not has_state:
        live.state.clear()
    found, opened = matched({"o": live}, {"o": saved.state_dict()})
    put_in(found, opened)
    given = {target.data_ptr() for _, target in found.targets}
    assert {one.data_ptr() for state in live.state.values() for one in state.values()} == given
    assert str(live.state_dict()) == str(saved.state_dict())


def test_an_optimizer_is_loaded_without_a_search_for_each_parameter_and_keeps_its_own_list():
    saved, live = trained(torch.optim.AdamW), trained(torch.optim.AdamW)
    found, opened = matched({"o": live}, {"o": saved.state_dict()})
    given = found.ready["o"].args[1].state  # what load_state_dict is given
    numbers = given["param_groups"][0]["params"]
    assert isinstance(numbers, Positions) and list(numbers) == [0, 1] and 1 in numbers and 2 not in numbers
    put_in(found, opened)
    assert type(live.param_groups[0]["params"]) is list


def test_what_is_new_for_an_optimizer_is_where_its_parameters_are():
    saved = trained(torch.optim.AdamW).state_dict()
    live = torch.optim.AdamW([nn.Parameter(torch.empty(2, 3, device="meta")), nn.Parameter(torch.empty(2))])
    found, _ = matched({"o": live}, {"o": saved})
    assert sorted(str(target.device) for _, target in found.targets) == ["cpu"] * 4 + ["meta"] * 2


@pytest.mark.gpu
def test_a_program_on_a_device_is_filled_there():
    saved = nn.Linear(300, 300)
    moments = torch.optim.AdamW(saved.parameters())
    saved(torch.ones(300)).sum().backward()
    moments.step()
    module = nn.Linear(300, 300, device="cuda")
    optimizer = torch.optim.AdamW(module.parameters())
    found, opened = matched({"m": module, "o": optimizer}, {"m": dict(saved.state_dict()), "o": moments.state_dict()})
    put_in(found, opened)
    assert torch.equal(module.weight.cpu(), saved.weight)
    given = {target.data_ptr() for _, target in found.targets}
    assert {one.data_ptr() for state in optimizer.state.values() for one in state.values()} <= given
    assert torch.equal(optimizer.state[module.weight]["exp_avg"].cpu(), moments.state[saved.weight]["exp_avg"])


def test_any_other_part_is_given_new_tensors():
    tensor = torch.arange(3)
    live = Holder(None)
    put_in(*matched({"p": live}, {"p": {"deep": [(tensor, 1), {"er": tensor}], "none": None}}))
    assert str(live.tensors) == str({"deep": [(tensor, 1), {"er": tensor}], "none": None})
    assert live.tensors["deep"][0][0].data_ptr() != tensor.data_ptr()

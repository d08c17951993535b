"""Whose the names in a checkpoint are."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from distckpt.prefixes import BESIDE, assign


class Tied(nn.Module):
    """A model of which two keys are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


LINEAR = {"weight", "bias"}


def names_of(names, part="net", module=None, **words):
    """For each key of the only module, what it is called."""
    return assign(names, {part: module or nn.Linear(2, 1)}, **words).names.get(part)


@pytest.mark.parametrize(
    "prefix", ["", "net.", "model.", "module.", "model.module.", "net.module.", "app.model.", "a.b.c."]
)
def test_the_only_module_has_what_is_under_the_prefix_that_has_its_keys(prefix):
    assert names_of([prefix + key for key in LINEAR]) == {key: prefix + key for key in LINEAR}


def test_the_prefix_with_most_keys_is_taken_and_its_other_names_are_the_modules_too():
    names = ["net.weight", "model.weight", "model.bias", "model.more", "weight"]
    assert names_of(names) == {"weight": "model.weight", "bias": "model.bias", "more": "model.more"}


@pytest.mark.parametrize(
    "prefixes, taken",
    [(["", "model.", "net."], "net."), (["", "model."], "model."), (["x.", ""], ""), (["y.", "net."], "net.")],
)
def test_of_prefixes_that_have_as_many_the_name_of_the_part_is_taken_first(prefixes, taken):
    names = [prefix + key for prefix in prefixes for key in sorted(LINEAR)]
    found = names_of(names)
    assert {key: found[key] for key in LINEAR} == {key: taken + key for key in LINEAR}


def test_without_a_prefix_what_is_usually_beside_a_model_is_left():
    names = ["weight", "bias", "extra", "optimizer.state.weight.step", "train_state.step", "dataloader.version"]
    found = assign(names, {"net": nn.Linear(2, 1)}, beside=BESIDE)
    assert [*found.names["net"]] == ["weight", "bias", "extra"]
    assert found.left == names[3:]
    assert len(names_of(names)) == 6, "where nothing is known to be beside it, it is the module's"


def test_a_module_may_be_called_like_what_is_beside_one():
    module = nn.ModuleDict({"optimizer": nn.Linear(2, 1)})
    names = ["optimizer.weight", "optimizer.bias", "optimizer.state.a.step"]
    assert [*names_of(names, module=module, beside=BESIDE)] == names[:2]


def test_what_is_loose_is_taken_only_by_a_module_that_has_such_a_key():
    names = ["model.weight", "model.bias", "model.epoch", "model._extra_state"]
    assert [*names_of(names, loose=["model.epoch", "model._extra_state"])] == ["weight", "bias"]

    class Extra(nn.Linear):
        def get_extra_state(self):
            return 1

    found = names_of(names, module=Extra(2, 1), loose=["model.epoch", "model._extra_state"])
    assert [*found] == ["weight", "bias", "_extra_state"]


def test_a_long_prefix_is_taken_only_where_it_has_all_keys_and_no_other_has():
    assert names_of(["a.weight"]) == {"a.weight": "a.weight"}
    both = [f"{prefix}.{key}" for prefix in "ab" for key in sorted(LINEAR)]
    assert set(names_of(both)) == set(both)


def test_names_of_wrappers_in_names_are_passed_over():
    names = ["model._orig_mod.0._checkpoint_wrapped_module.weight", "model._orig_mod.0._checkpoint_wrapped_module.bias"]
    found = names_of(names, module=nn.Sequential(nn.Linear(2, 1)))
    assert found == {"0.weight": names[0], "0.bias": names[1]}


def test_wrappers_of_the_module_are_passed_over():
    module = nn.DataParallel(nn.Linear(2, 1))
    assert names_of(["weight", "bias"], module=module) == {"weight": "weight", "bias": "bias"}


@pytest.mark.parametrize("there", ["embed.weight", "head.weight"])
def test_tied_weights_are_of_both_names_where_one_is_there(there):
    assert names_of([there], module=Tied()) == {"embed.weight": there, "head.weight": there}
    assert names_of([f"app.model.{there}"], module=Tied())["head.weight"] == f"app.model.{there}"


def test_tied_weights_that_are_both_there_keep_their_names():
    names = ["embed.weight", "head.weight"]
    assert names_of(names, module=Tied()) == dict(zip(names, names, strict=True))


def test_keys_are_renamed_before_they_are_counted_and_keep_their_names():
    found = names_of(
        ["old.w", "old.b"],
        renamed=lambda key: re.sub(r"^old\.(.).*", lambda m: {"w": "weight", "b": "bias"}[m[1]], key),
    )
    assert found == {"old.w": "old.w", "old.b": "old.b"}


def test_several_modules_have_what_is_under_their_names():
    modules = {"model": nn.Linear(2, 1), "ema": nn.Linear(2, 1), "other": nn.Linear(2, 1)}
    names = ["ema.weight", "ema.bias", "model.weight", "model.odd", "optim.x"]
    found = assign(names, modules)
    assert found.names == {
        "model": {"weight": "model.weight", "odd": "model.odd"},
        "ema": {"weight": "ema.weight", "bias": "ema.bias"},
    }
    assert found.left == ["optim.x"]


def test_a_checkpoint_that_does_not_say_for_which_of_several_it_is_is_refused():
    with pytest.raises(ValueError, match="for which of 2 modules it is: a, b"):
        assign(["weight", "bias"], {"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})


def test_where_nothing_fits_all_names_are_the_modules_so_that_they_can_be_told():
    assert names_of(["x", "y.z"]) == {"x": "x", "y.z": "y.z"}


def test_lazy_modules_have_keys_too():
    assert names_of(["net.weight", "net.bias"], module=nn.LazyLinear(3)) == {key: f"net.{key}" for key in LINEAR}


def test_thousands_of_names_take_no_time():
    module = nn.Sequential(*(nn.BatchNorm1d(1) for _ in range(1000)))
    names = [f"model.{key}" for key in module.state_dict()] + [f"optim.state.{nth}.step" for nth in range(20_000)]
    with torch.no_grad():
        assert len(names_of(names, module=module)) == 5000

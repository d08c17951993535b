"""What is remembered of a state's form gives the same files as taking it apart anew, or is not used."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from distckpt import strict_json
from distckpt.formats import tree
from distckpt.formats.form import Form


def form_of(state: Any) -> Form | None:
    _, tensors, _ = tree.encode(state, "part")
    return Form.of(state, tensors, "part")


def matched(form: Form, state: Any) -> tuple[dict[str, Tensor], str] | None:
    """The tensors by their keys, and the JSON, as the form has them."""
    found = form.match(state)
    return None if found is None else ({key: found[0][nth] for key, nth in form.keys.items()}, found[1])


def taken_apart(state: Any) -> tuple[dict[str, Tensor], str]:
    value, tensors, _ = tree.encode(state, "part")
    return tensors, strict_json.dump(value).decode()


def assert_same(form: Form, state: Any) -> None:
    found, expected = matched(form, state), taken_apart(state)
    assert found is not None
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    assert all(found[0][key] is one for key, one in expected[0].items())


def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_training_that_goes_on_keeps_its_form():
    model, optimizer = training()
    states = [lambda: dict(model.state_dict()), optimizer.state_dict]
    forms = [form_of(state()) for state in states]
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.05
    for form, state in zip(forms, states, strict=True):
        assert form is not None
        assert_same(form, state())


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.sampled_from([torch.float16, torch.device("cpu"), np.float32(1.5), np.int64(3)]),
)
KEYS = st.one_of(st.text(max_size=3), st.integers(-2, 2))
STATES = st.recursive(
    st.one_of(VALUES, st.builds(torch.zeros, st.lists(st.integers(0, 2), max_size=2).map(tuple))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(lambda some: deque(some, maxlen=4)),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=8,
)


@given(STATES)
def test_a_state_matches_its_own_form_and_gives_what_taking_it_apart_gives(state):
    form = form_of(state)
    if form is not None:
        assert_same(form, state)
        assert_same(form, copy.deepcopy(state))


@given(STATES, STATES)
def test_another_state_gives_what_taking_it_apart_gives_or_nothing(state, other):
    form = form_of(state)
    if form is not None and matched(form, other) is not None:
        assert_same(form, other)


@pytest.mark.parametrize(
    ("state", "other"),
    [
        ({"a": 1}, {"b": 1}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": 1}, {"a": [1]}),
        ({"a": [1]}, {"a": [1, 2]}),
        ({"a": [1]}, {"a": (1,)}),
        ({"a": 1}, OrderedDict(a=1)),
        ({1: 2}, {True: 2}),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.float64)}),
        ({"a": torch.zeros(2)}, {"a": nn.Parameter(torch.zeros(2))}),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2).to_sparse()}),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2, device="meta")}),
        ({"a": torch.zeros(2)}, {"a": 1}),
        ({"a": 1}, {"a": torch.zeros(2)}),
        ({"a": 1}, {"a": object()}),
        ({"a": 1}, {"a": np.zeros(2)}),
    ],
)
def test_what_has_another_form_does_not_match(state, other):
    form = form_of(state)
    assert form is not None and form.match(other) is None


def test_weights_that_are_tied_match_only_weights_that_are_tied_the_same_way():
    one, two = torch.zeros(2), torch.zeros(2)
    form = form_of({"a": one, "b": one})
    assert form is not None and form.keys == {"a": 0}
    assert_same(form, {"a": two, "b": two})
    assert form.match({"a": one, "b": two}) is None
    assert form.match({"a": one, "b": one.view(1, 2)[0][:1]}) is None
    untied = form_of({"a": one, "b": two})
    assert untied is not None and untied.match({"a": one, "b": one}) is None


def test_views_that_overlap_are_not_remembered():
    base = torch.zeros(4)
    assert form_of({"a": base, "b": base[:2]}) is None


@pytest.mark.parametrize("value", [np.zeros(2), torch.zeros(2, dtype=torch.complex128)])
def test_what_is_stored_as_another_tensor_is_not_remembered(value):
    assert form_of({"a": value}) is None


@pytest.mark.parametrize("value", ["mark", '"', "\\u0000", math.nan, -math.inf, 1e300, b"", 2**80])
def test_values_of_every_kind_stand_where_they_stood(value):
    form = form_of({"a": 0, "b": [1, {"c": 2}]})
    assert form is not None
    assert_same(form, {"a": value, "b": [value, {"c": value}]})


def spread_in_other_ways(rank: int) -> list[bool]:
    mesh = init_device_mesh("cpu", (2,))
    first = {"weight": distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])}
    _, tensors, _ = tree.encode(first, "part", may_be_spread=True)
    form = Form.of(first, tensors, "part", may_be_spread=True)
    assert form is not None
    others = [distribute_tensor(torch.zeros(4, 4), mesh, [one]) for one in (Shard(0), Shard(1), Replicate())]
    return [form.match({"weight": other}) is not None for other in (*others, torch.zeros(4, 4))]


def test_what_is_spread_over_ranks_in_another_way_does_not_match(run_ranks):
    assert run_ranks(2, spread_in_other_ways) == [[True, False, False, False]] * 2

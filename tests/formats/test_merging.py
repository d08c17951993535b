"""What several ranks knew of one state, put together."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from distckpt.formats.merging import merged


def group(*names, **values):
    return {**values, "params": [*names]}


def optimizer(**groups):
    return {"state": {name: {"step": 1} for one in groups.values() for name in one["params"]}, "param_groups": groups}


def test_one_state_is_itself():
    state = {"model": {"a": 1}, "optim": optimizer(a=group("a", lr=0.1))}
    assert merged([state]) == state


def test_layers_of_several_stages_are_put_together_in_the_order_of_ranks():
    found = merged([{"model": {"0.w": 1, "1.w": 2}}, {"model": {"2.w": 3}}, {"model": {"3.w": 4}, "head": {"w": 5}}])
    assert found == {"model": {"0.w": 1, "1.w": 2, "2.w": 3, "3.w": 4}, "head": {"w": 5}}
    assert list(found["model"]) == ["0.w", "1.w", "2.w", "3.w"]


def test_where_several_have_a_key_the_first_is_right():
    assert merged([{"s": {"epoch": 1}}, {"s": {"epoch": 2, "more": 3}}]) == {"s": {"epoch": 1, "more": 3}}


def test_groups_of_stages_are_groups_of_their_own():
    first, second = optimizer(a=group("a", "b", lr=0.1)), optimizer(c=group("c", lr=0.2), d=group("d", lr=0.3))
    found = merged([{"optim": first}, {"optim": second}])["optim"]
    assert found["param_groups"] == first["param_groups"] | second["param_groups"]
    assert list(found["state"]) == ["a", "b", "c", "d"]


def test_a_parameter_that_several_have_is_in_one_group():
    first, second = optimizer(shared=group("shared", "a", lr=0.1)), optimizer(shared=group("shared", "b", lr=0.2))
    found = merged([{"optim": first}, {"optim": second}])["optim"]["param_groups"]
    assert found == {"shared": group("shared", "a", lr=0.1), "b": group("b", lr=0.2)}


def test_groups_without_parameters_are_kept():
    first = optimizer(a=group("a"), **{"empty.1": group(lr=0.1)})
    second = optimizer(b=group("b"), **{"empty.1": group(lr=0.2), "empty.2": group(lr=0.3)})
    found = merged([{"optim": first}, {"optim": second}])["optim"]["param_groups"]
    assert found == {"a": group("a"), "empty.1": group(lr=0.1), "b": group("b"), "empty.2": group(lr=0.3)}


def test_what_only_looks_like_groups_is_merged_by_key():
    assert merged([{"p": {"param_groups": {"a": 1}}}, {"p": {"param_groups": {"b": 2}}}]) == {
        "p": {"param_groups": {"a": 1, "b": 2}}
    }
    assert merged([{"p": {"param_groups": [1]}}, {"p": {"param_groups": [2, 3]}}]) == {"p": {"param_groups": [1]}}


def test_values_of_other_types_are_the_firsts():
    assert merged([{"p": {"a": [1], "b": {"c": 1}}}, {"p": {"a": {"x": 1}, "b": 2}}]) == {
        "p": {"a": [1], "b": {"c": 1}}
    }


def test_types_of_dicts_are_those_of_the_first():
    found = merged([{"model": OrderedDict(a=1)}, {"model": OrderedDict(b=2)}])["model"]
    assert type(found) is OrderedDict and list(found) == ["a", "b"]


trees = st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abcd"), inner), max_leaves=12)
states = st.dictionaries(st.sampled_from(["model", "optim", "param_groups"]), trees)


@given(st.lists(states, min_size=1, max_size=4))
def test_nothing_that_only_one_has_is_lost_and_nothing_given_is_changed(given_states):
    before = repr(given_states)
    found = merged(given_states)
    assert repr(given_states) == before
    for nth, state in enumerate(given_states):
        for part, value in state.items():
            assert part in found
            if not any(part in other for other in given_states[:nth]) and not isinstance(value, dict):
                assert found[part] == value


@given(states)
def test_what_all_know_alike_is_that(state):
    assert merged([state, state, state]) == state

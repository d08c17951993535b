"""Placeholders are of the shape and dtype of what they are for, and take no memory."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque

import numpy as np
import pytest
import torch

from distckpt.formats.placeholders import Placeholders, flat, without_tensors
from distckpt.formats.stand_ins import stand_in


def test_a_placeholder_has_the_shape_and_dtype_and_no_memory_for_its_elements():
    standing = stand_in((1000, 1000, 1000), torch.float64)
    made = Placeholders().take(standing)
    assert made.shape == standing.shape and made.dtype is torch.float64 and made.nbytes == 8 * 10**9
    assert made.untyped_storage().nbytes() == 8


def test_what_stands_in_two_places_has_one_placeholder():
    one, two = stand_in((2,), torch.float32), stand_in((2,), torch.float32)
    placeholders = Placeholders()
    state = placeholders.replaced({"a": one, "b": [one, two]})
    assert state["a"] is state["b"][0] is not state["b"][1]
    assert placeholders.standing == {id(state["a"]): one, id(state["b"][1]): two}


@pytest.mark.parametrize(
    "dtype, cast", [(torch.float32, torch.bfloat16), (torch.float8_e4m3fn, torch.bfloat16), (torch.int8, torch.int8)]
)
def test_floating_tensors_are_of_the_dtype_that_they_are_to_become(dtype, cast):
    assert Placeholders(torch.bfloat16).take(stand_in((3,), dtype)).dtype is cast


def test_what_is_no_tensor_becomes_what_plain_torch_reads():
    noted = OrderedDict(b=1, a=2)
    noted._metadata = {"version": 1}
    array = np.arange(3)
    placeholders = Placeholders()
    state = placeholders.replaced(
        {
            "o": noted,
            "c": Counter("aab"),
            "d": deque([1], 3),
            "f": frozenset({1}),
            "t": (1, [2]),
            "n": array,
            "m": array,
        }
    )
    assert type(state["o"]) is OrderedDict and list(state["o"]) == ["b", "a"] and state["o"]._metadata == {"version": 1}
    assert (state["c"], state["d"], state["f"], state["t"]) == (Counter("aab"), [1], {1}, (1, [2]))
    assert type(state["c"]) is Counter and state["n"] is state["m"]
    (tensor,) = placeholders.arrays
    assert placeholders.standing[id(state["n"])] is tensor and tensor.tolist() == [0, 1, 2]


def test_tensors_are_known_by_their_places():
    tensor = torch.ones(1)
    state = {"a.b": tensor, "state": {0: {"step": tensor}}, "list": [1, (tensor, 2)]}
    assert [place for place, _ in flat(state)] == ["a.b", "state.0.step", "list.1.0"]
    assert [place for place, _ in flat(tensor)] == ["value"]


def test_what_holds_no_tensor_is_told_as_high_up_as_that_is_so():
    tensor = torch.ones(1)
    state = {"w": tensor, "groups": [{"lr": 1}, {"lr": 2}], "state": {0: {"t": tensor, "n": 1}, 1: {}}, "none": None}
    assert without_tensors(state) == ["groups", "state.0.n", "none"]
    assert without_tensors({"a": {}}) == ["value"] and without_tensors({}) == [] == without_tensors(tensor)

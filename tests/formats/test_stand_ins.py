"""Stand-ins are replaced wherever they stand, each by one tensor, and nothing else is changed."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque

import torch

from distckpt.formats import Snapshot
from distckpt.formats.stand_ins import NewMemory, is_stand_in, read_whole, stand_in


class Ones:
    """A checkpoint whose tensors are full of ones."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def fill(self, targets):
        for standing, target in targets:
            assert is_stand_in(standing) and (standing.dtype, standing.shape) == (target.dtype, target.shape)
            target.fill_(1)


def test_the_whole_state_is_in_new_memory():
    one, other = stand_in((2,), torch.float16), stand_in((), torch.int64)
    there = torch.zeros(3)
    whole = read_whole(Ones(Snapshot({"a": {"x": one, 3: (other, "text", there)}}, {"b": [one]})))
    assert str(whole.shared) == str({"a": {"x": torch.ones(2).half(), 3: (torch.tensor(1), "text", torch.zeros(3))}})
    assert whole.own["b"][0] is whole.shared["a"]["x"] and whole.shared["a"][3][2] is there


def test_it_does_not_matter_in_what_a_stand_in_stands():
    def around(one):
        versioned = OrderedDict(x=one)
        versioned.version = 3
        held = [one, (one,), {one}, frozenset([one]), deque([one], 4), {"k": one}, versioned, {(1, one): 2}]
        return held + [Counter("aab"), torch.Size([2, 3]), "text", None, 1.5, b"bytes", torch.float32]

    memory = NewMemory()
    one = stand_in((2,), torch.float32)
    replaced, expected = memory.replaced(around(one)), around(memory.take(one))
    assert [type(value) for value in replaced] == [type(value) for value in expected]
    assert str(replaced) == str(expected) and replaced[6].version == 3 and replaced[4].maxlen == 4
    assert next(iter(replaced[7]))[1] is memory.take(one)
    assert [id(standing) for standing, _ in memory.targets] == [id(one)]


def test_what_a_stand_in_is_replaced_by_can_be_chosen_before():
    memory = NewMemory()
    one = stand_in((2,), torch.float32)
    chosen = memory.take(one, device="cpu")
    assert memory.replaced({"x": [one, one]})["x"][0] is chosen

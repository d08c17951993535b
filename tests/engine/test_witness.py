"""A witness tells whether a copy is what the tensor was when the copy was asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distckpt.engine.witness import Witnesses

OFFSET = 4096


def witnesses_of(tensor: Tensor, offset: int) -> Witnesses:
    found = Witnesses()
    found.add(tensor, offset)
    found.look()
    return found


class Scene:
    """A tensor, the memory that it is copied to, and a witness of it from before."""

    def __init__(self) -> None:
        self.tensor = torch.rand(256, 256)
        self.memory = torch.zeros(OFFSET + self.tensor.nbytes, dtype=torch.uint8)
        self.witnesses = witnesses_of(self.tensor, OFFSET)

    def copy(self) -> None:
        self.memory[OFFSET:].copy_(self.tensor.flatten().view(torch.uint8))

    def was_changed(self) -> bool:
        return bool(self.witnesses.changed(self.memory.data_ptr()))

    def differs(self) -> bool:
        return bool(self.witnesses.different(self.memory.data_ptr()))


@pytest.fixture
def scene() -> Scene:
    return Scene()


def silently(tensor: Tensor, place: int) -> None:
    """One byte of it changes, and nobody counts it."""
    tensor.detach().flatten().view(torch.uint8).numpy()[place] ^= 1


def test_a_faithful_copy_is_none(scene):
    scene.copy()
    assert not scene.was_changed() and not scene.differs()


@pytest.mark.parametrize("place", [0, 255, -256, -1])
def test_a_change_of_its_first_or_last_bytes_before_the_copy_is_found(place, scene):
    silently(scene.tensor, place)
    scene.copy()
    assert scene.was_changed()


@pytest.mark.parametrize("place", [0, 100_000, -1])
def test_a_change_after_the_copy_is_found_where_every_byte_is_compared(place, scene):
    scene.copy()
    silently(scene.tensor, place)
    assert scene.differs() and not scene.was_changed()


CHANGES: list[Callable[[Tensor], object]] = [
    lambda tensor: tensor[100].add_(1),
    lambda tensor: tensor.detach()[100].zero_(),
    lambda tensor: tensor.set_(torch.rand(256, 256)),
    lambda tensor: tensor.resize_(2, 2),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_counts_as_a_change_is_one_wherever_it_is(change, scene):
    scene.copy()
    change(scene.tensor)
    assert scene.was_changed()


def test_the_alias_that_a_state_dict_has_knows_of_changes_of_the_parameter():
    parameter = torch.nn.Parameter(torch.rand(256, 256))
    alias = parameter.detach()
    witnesses = witnesses_of(alias, 0)
    with torch.no_grad():
        parameter[100] += 1
    assert witnesses.changed(alias.data_ptr())


def test_of_several_those_that_changed_are_told():
    tensors = [torch.rand(256, 256) for _ in range(6)]
    witnesses = Witnesses()
    for nth, tensor in enumerate(tensors):
        witnesses.add(tensor, nth * tensor.nbytes)
    witnesses.look()
    silently(tensors[1], 3)
    silently(tensors[4], -7)
    tensors[4].add_(1)
    tensors[5][100].zero_()
    memory = torch.cat(tensors).view(torch.uint8)
    assert witnesses.changed(memory.data_ptr()) == [1, 4, 5] and witnesses.different(memory.data_ptr()) == []
    silently(tensors[2], 100_000)
    assert witnesses.different(memory.data_ptr()) == [2]


def test_a_tensor_that_has_grown_without_a_word_is_looked_for_where_it_was(scene):
    scene.copy()
    scene.tensor.data = torch.rand(256 * 1024)
    assert not scene.was_changed(), "it is not its version that tells, nor bytes behind its place in the arena"


@pytest.mark.parametrize("left", [0, 100])
def test_a_tensor_whose_memory_was_taken_away_differs(left, scene):
    scene.copy()
    scene.tensor.untyped_storage().resize_(left)
    assert scene.differs()

"""Random number generators go on after a restore as they would have."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from distckpt import rng
from distckpt.formats import tree


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def draw() -> list[Any]:
    return [
        random.random(),
        random.gauss(0, 1),
        random.getrandbits(70),
        np.random.rand(),
        np.random.randn(3).tolist(),
        torch.rand(3).tolist(),
        torch.randn(3, dtype=torch.float64).tolist(),
        torch.randperm(10).tolist(),
    ]


@pytest.mark.parametrize("drawn", range(3))
def test_draws_after_apply_are_those_after_capture(drawn):
    for _ in range(drawn):
        draw()  # an odd number of gauss draws leaves one in reserve
    state = rng.capture()
    expected = [draw() for _ in range(300)]  # beyond the words of one refill
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert rng.apply(state) == []
    assert [draw() for _ in range(300)] == expected


def test_capture_draws_nothing():
    expected = draw()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    rng.capture()
    assert draw() == expected


def test_a_captured_state_does_not_change_with_later_draws():
    state = rng.capture()
    told = str(state)
    draw()
    assert str(state) == told


def test_a_captured_state_can_be_stored_without_tensors():
    state = rng.capture()
    told, tensors, _ = tree.encode(state, "rng")
    assert not tensors
    expected = draw()
    rng.apply(tree.decode(told, {}.__getitem__))
    assert draw() == expected


class Device:
    """An accelerator's generator."""

    def __init__(self) -> None:
        self.state = torch.arange(4, dtype=torch.uint8)

    def get_rng_state(self) -> torch.Tensor:
        return self.state

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.state = state.clone()


def test_the_generator_of_an_accelerator_goes_on_too(monkeypatch):
    device = Device()
    monkeypatch.setattr(rng, "_accelerators", lambda: {"cuda": device})
    state = rng.capture()
    device.state = torch.zeros(4, dtype=torch.uint8)
    assert rng.apply(state) == []
    assert device.state.tolist() == [0, 1, 2, 3]


def test_an_accelerator_that_the_state_does_not_know_is_named(monkeypatch):
    state = rng.capture()
    monkeypatch.setattr(rng, "_accelerators", lambda: {"cuda": Device()})
    assert rng.apply(state) == ["cuda"]


@pytest.mark.gpu
def test_draws_on_the_accelerator_after_apply_are_those_after_capture():
    state = rng.capture()
    expected = torch.rand(3, device="cuda").tolist()
    rng.apply(state)
    assert torch.rand(3, device="cuda").tolist() == expected

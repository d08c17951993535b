"""A transfer copies beside what an accelerator computes, and lets nobody pass it by who is told to stay behind."""

from __future__ import annotations

import threading

import pytest
import torch
from engine.accelerators import Accelerator
from torch import Tensor

from distckpt.engine import transfer
from distckpt.engine.transfer import Transfer

pytestmark = pytest.mark.timeout(60)

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


def pairs(device: str) -> list[tuple[Tensor, Tensor]]:
    sources = [torch.rand(300, 300, device=device), torch.rand(100, 50, device=device).t(), torch.arange(9).to(device)]
    return [(torch.zeros(one.shape, dtype=one.dtype, pin_memory=device == "cuda"), one) for one in sources]


@pytest.mark.parametrize("device", DEVICES)
def test_all_is_copied_as_it_reads(device):
    copied = pairs(device)
    moving = Transfer(copied)
    moving.begin()
    moving.wait()
    assert all(torch.equal(target, source.cpu()) for target, source in copied)


@pytest.mark.parametrize("device", DEVICES)
def test_it_can_begin_again_and_copies_what_there_is_now(device):
    copied = pairs(device)
    moving = Transfer(copied)
    for _ in range(2):
        moving.begin()
        moving.wait()
        for _, source in copied:
            source.add_(1)
    moving.begin()
    moving.hold_back()
    moving.wait()
    assert all(torch.equal(target, source.cpu()) for target, source in copied)


def test_nothing_is_copied_before_it_begins():
    copied = pairs("cpu")
    moving = Transfer(copied)
    moving.hold_back()
    moving.wait()
    assert not any(target.any() for target, _ in copied)


def test_nothing_is_copied_after_its_end():
    copied = pairs("cpu")
    moving = Transfer(copied)
    moving.end()
    moving.begin()
    moving.hold_back()
    moving.wait()
    assert not any(target.any() for target, _ in copied)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    device = Accelerator()
    monkeypatch.setattr(transfer.torch, "get_device_module", lambda _: device)
    return device


def test_the_copy_comes_after_what_was_asked_before_and_on_a_stream_of_its_own(device):
    Transfer(pairs("cpu")).begin()
    assert device.notes == ["side after training", "the copy on side"]


def test_what_is_held_back_comes_after_the_copy(device):
    moving = Transfer(pairs("cpu"))
    moving.begin()
    device.notes.clear()
    moving.hold_back()
    assert device.notes == ["training after the copy"]


def test_whoever_waits_for_it_or_ends_it_waits_for_the_device(device):
    for wait in (Transfer.wait, Transfer.end):
        moving = Transfer(pairs("cpu"))
        moving.begin()
        device.notes.clear()
        wait(moving)
        assert device.notes == ["host after the copy"]


def test_one_that_was_ended_while_it_began_is_waited_for(device, monkeypatch):
    """As when a peer has failed: the writer gives up what the training thread is just asking the device for."""
    moving = Transfer(pairs("cpu"))
    ending = threading.Thread(target=moving.end)
    stream = device.stream
    monkeypatch.setattr(device, "stream", lambda one: (ending.start(), stream(one))[1])
    moving.begin()
    ending.join(20)
    assert device.notes[-2:] == ["the copy on side", "host after the copy"]


@pytest.mark.gpu
def test_training_goes_on_while_the_device_copies_and_then_comes_after_it():
    source = torch.rand(1 << 28, device="cuda")  # 1 GiB, which takes its time
    expected = source.cpu()
    target = torch.empty(source.shape, pin_memory=True)
    moving = Transfer([(target, source)])
    moving.begin()
    assert not moving._events[source.device].query()
    moving.hold_back()
    source.zero_()
    moving.wait()
    assert torch.equal(target, expected)

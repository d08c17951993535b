"""A snapshot: what training waits for, what the writer waits for, and what becomes of it when something goes wrong."""

from __future__ import annotations

import threading

import pytest
import torch
from engine.accelerators import Accelerator

from distckpt.engine import transfer
from distckpt.engine.arena import Arena
from distckpt.engine.plan import Plan
from distckpt.engine.snapshot import Staging
from distckpt.engine.witness import Witness
from distckpt.manifest import TensorEntry

pytestmark = pytest.mark.timeout(60)


# Beside an accelerator


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    device = Accelerator()
    monkeypatch.setattr(transfer.torch, "get_device_module", lambda _: device)
    return device


class OnDevice:
    """A staging of one tensor that the accelerator copies late."""

    def __init__(self, *, is_paranoid: bool = False) -> None:
        self.tensor = torch.rand(200, 200)
        self.arena = Arena(self.tensor.nbytes)
        entry = TensorEntry("model.safetensors", "weight", "F32", (200, 200))
        witness = Witness(entry, 0, self.tensor, self.tensor._version, b"", b"")
        plan = Plan(starts=[0, self.tensor.nbytes], late_odd=[(0, self.tensor)], witnesses=[witness])
        self.staging = Staging([], plan, self.arena, set(), is_paranoid=is_paranoid)

    def judged(self) -> None:
        """Returns once somebody has looked whether it was changed."""
        with self.staging._changed:
            assert self.staging._changed.wait_for(lambda: self.staging._torn is not None, 20)

    def close(self) -> None:
        self.staging.release()
        self.arena.close()


def test_training_stays_behind_the_device_whoever_else_has_waited(device):
    one = OnDevice()
    one.staging.stage()
    one.judged()
    for _ in range(2):
        device.notes.clear()
        one.staging.let_change()
        assert device.notes == ["training after the copy"]
    one.close()


def test_what_the_device_copies_is_not_judged_before_it_is_copied(device):
    may_end = threading.Event()
    device.may_end = lambda: may_end.wait(20)
    one = OnDevice()
    one.staging.stage()
    assert one.staging._torn is None
    one.tensor.add_(1)
    may_end.set()
    one.judged()
    assert one.staging._torn == [one.staging._plan.witnesses[0].entry]
    one.close()


@pytest.mark.parametrize("is_paranoid", [True, False])
def test_where_every_byte_is_compared_those_on_the_device_are(is_paranoid, device):
    may_end = threading.Event()
    device.may_end = lambda: may_end.wait(20)
    one = OnDevice(is_paranoid=is_paranoid)
    one.staging.stage()
    one.tensor.numpy()[100, 100] += 1
    may_end.set()
    one.judged()
    assert bool(one.staging._torn) == is_paranoid
    one.close()


def test_the_device_copies_again_what_is_taken_again(device):
    one = OnDevice()
    may_end = threading.Event()
    device.may_end = lambda: may_end.wait(20)
    one.staging.stage()
    one.tensor.add_(1)
    one.staging.let_change()
    may_end.set()
    assert torch.equal(one.arena.memory[: one.tensor.nbytes].view(torch.float32).view(200, 200), one.tensor)
    assert device.notes.count("the copy on side") == 2
    one.close()

"""A snapshot: what training waits for, what the writer waits for, and what becomes of it when something goes wrong."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.accelerators import Accelerator
from engine.trainings import Background, Save, Training, spelled

from distckpt.engine import copying, plan, transfer
from distckpt.engine.arena import Arena
from distckpt.engine.plan import Name, Plan
from distckpt.engine.snapshot import Staging
from distckpt.engine.stager import Stager
from distckpt.errors import DistckptError
from distckpt.formats import Image, Snapshot
from distckpt.formats.full import FORMAT
from distckpt.stores.local import LocalStore

pytestmark = pytest.mark.timeout(60)


# What goes wrong is raised by the write, and training goes on


class Broken(RuntimeError):
    pass


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """What the threads of that name copy fails from now on."""
    move = copying.move

    def break_for(name: str) -> None:
        def broken_move(target: int, source: int | bytes, count: int) -> None:
            if threading.current_thread().name.startswith(name):
                raise Broken("the memory is gone")
            move(target, source, count)

        for module in (copying, plan):
            monkeypatch.setattr(module, "move", broken_move)

    return break_for


@pytest.fixture
def torn(lazy: Stager, held: Any, tmp_path: Path) -> tuple[Training, Save]:
    """A training that has changed a weight while it was being copied, and is about to take a step."""
    training = Training()
    save = Save(lazy, training.state(), tmp_path)
    training.weight.data.add_(1)
    return training, save


def test_a_copy_that_fails_while_training_waits(broken, eager, tmp_path):
    broken("MainThread")
    training = Training()
    save = Save(eager, training.state(), tmp_path)
    training.step()
    pytest.raises(Broken, save.write)


def test_a_copy_that_fails_beside_training(broken, lazy, tmp_path):
    broken("distckpt-copy")
    training = Training()
    save = Save(lazy, training.state(), tmp_path)
    training.step()
    pytest.raises(Broken, save.write)


def test_a_copy_that_fails_in_the_barrier(broken, lazy, held, tmp_path):
    training = Training()
    save = Save(lazy, training.state(), tmp_path)
    broken("MainThread")
    training.step()
    held.go.set()
    pytest.raises(Broken, save.write)


def test_a_copy_that_fails_when_it_is_taken_again(broken, torn):
    training, save = torn
    save.staged._late.work()
    broken("")
    training.step()
    pytest.raises(Broken, save.write)


def test_no_thread_can_be_started(lazy, tmp_path, monkeypatch):
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    training = Training()
    lazy.reserve(1 << 20)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        save = Save(lazy, training.state(), tmp_path)
    training.step()
    with pytest.raises(RuntimeError, match="can't start"):
        save.write()


def test_who_interrupts_the_copy_is_heard_and_the_save_fails(eager, tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    saves: list[Staging] = []
    take = eager.take
    monkeypatch.setattr(eager, "take", lambda images: saves.append(take(images)) or saves[-1])
    with monkeypatch.context() as patched:
        patched.setattr(plan, "move", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Save(eager, Training().state(), tmp_path)
    with pytest.raises(DistckptError, match="the snapshot was interrupted"):
        saves[0].write(LocalStore(tmp_path), "saved")


def test_one_that_was_never_staged_keeps_no_writer_waiting(eager, tmp_path):
    staged = eager.take(FORMAT.lay_out(Snapshot(Training().state()), 0))
    writing = Background(lambda: staged.write(LocalStore(tmp_path), "saved"))
    assert not writing.ended(0.05)
    staged.settle()
    with pytest.raises(DistckptError, match="interrupted before it was staged"):
        writing.result()


def test_a_save_that_failed_leaves_the_next_one_whole(broken, lazy, tmp_path, monkeypatch):
    training = Training()
    with monkeypatch.context() as patched:
        patched.setattr(copying, "move", lambda *_: 1 / 0)
        pytest.raises(ZeroDivisionError, Save(lazy, training.state(), tmp_path).write)
    save = Save(lazy, training.state(), tmp_path)
    training.step()
    assert spelled(save.saved()) == spelled(save.cut)


# Taken again


def test_while_one_thread_takes_it_again_no_other_takes_a_step(torn, monkeypatch):
    training, save = torn
    is_moving, may_go_on = threading.Event(), threading.Event()
    move = copying.move

    def slow_move(target: int, source: int | bytes, count: int) -> None:
        is_moving.set()
        assert may_go_on.wait(20)
        move(target, source, count)

    save.staged._late.work()
    monkeypatch.setattr(copying, "move", slow_move)
    first = Background(save.staged.let_change)
    assert is_moving.wait(20)
    second = Background(save.staged.let_change)
    assert not second.ended(0.05)
    may_go_on.set()
    first.result()
    second.result()
    assert save.write().measures["retakes"] == 1


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
        on_device = Plan(starts=[0, self.tensor.nbytes], late_odd=[(0, self.tensor)])
        on_device._witnessed.append((Image("model.safetensors", 0, (), keys=("weight",)), 0))
        on_device.witnesses.add(self.tensor, 0)
        on_device.witnesses.look()
        on_device.witnesses._sampled, on_device.witnesses._samples = [], b""  # as of one on an accelerator
        self.staging = Staging([], on_device, self.arena, set(), is_paranoid=is_paranoid)

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
    assert one.staging._torn == [Name("model.safetensors", "weight")]
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


def test_a_writer_that_comes_before_the_copy_waits_for_it_and_not_the_copy_for_the_writer(
    eager: Stager, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    has_come = threading.Event()
    free, work = copying.Copy.free, copying.Copy.work

    def freeing(copy: copying.Copy, blocks: int) -> None:
        free(copy, blocks)
        has_come.set()

    def late(copy: copying.Copy) -> None:
        assert has_come.wait(20), "the writer never came"
        work(copy)

    monkeypatch.setattr(copying.Copy, "free", freeing)
    monkeypatch.setattr(copying.Copy, "work", late)
    staged = eager.take(FORMAT.lay_out(Snapshot({"model": {"weight": torch.arange(100_000.0)}}), 0))
    (tmp_path / "step").mkdir()
    writing = Background(lambda: staged.write(LocalStore(tmp_path), "step"))
    staging = Background(staged.stage)
    staging.result()
    assert writing.result().files
    staged.release()

"""A resume into a live program: bit for bit, in its own memory, and never from what is damaged."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, NoCheckpoint, StateMismatch
from distckpt.ranks import Solo
from distckpt.resuming import read_part


class Program:
    """A training whose parts are in one run's directory."""

    def __init__(self, folder: Path, *, width: int = 16, head: bool = True) -> None:
        torch.manual_seed(0)
        layers = {"body": nn.Linear(8, width), "norm": nn.BatchNorm1d(width)}
        layers |= {"head": nn.Linear(width, 1)} if head else {}
        self.model = nn.ModuleDict(layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.parts = {"model": self.model, "optimizer": self.optimizer}
        self.ckpt = Checkpointer(folder, self.parts, interval=1, save_last=False, max_keep_ckpts=5)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model["norm"](self.model["body"](torch.randn(6, 8))).square().mean().backward()
        self.optimizer.step()
        self.ckpt.step()

    def told(self) -> str:
        """Every number that training depends on, and what comes next."""
        state = [self.model.state_dict(), self.optimizer.state_dict(), torch.get_rng_state().tolist()]
        with torch._tensor_str.printoptions(threshold=10**9, precision=20):
            return str(state)


@pytest.fixture
def two_steps(tmp_path: Path) -> tuple[Path, list[str]]:
    """A run's directory, and what its program held at each of two steps."""
    program, told = Program(tmp_path / "run"), []
    with program.ckpt:
        program.ckpt.resume()
        for _ in (1, 2):
            program.step()
            told.append(program.told())
    return tmp_path / "run", told


class Held:
    """A part that takes whatever it is given."""

    def __init__(self) -> None:
        self.state: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def flip_the_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_new_program_goes_on_as_the_one_that_was_saved(two_steps):
    folder, told = two_steps
    program = Program(folder)
    with program.ckpt:
        assert program.ckpt.resume() == 2 and program.told() == told[1]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_damage_in_the_last_byte_leaves_nothing_of_the_newer_behind(two_steps, caplog, file):
    folder, told = two_steps
    flip_the_last_bit(folder / "step-00000002" / file)
    program = Program(folder)
    with program.ckpt:
        assert program.ckpt.resume() == 1 and program.told() == told[0]
    assert (
        "step-00000002 is damaged and passed over; it is left for inspection. rank 0: DamagedCheckpoint: "
        in caplog.text
    )
    assert f"step-00000002/{file}: its bytes changed after the commit" in caplog.text


def test_a_program_that_has_trained_on_is_taken_back_in_its_own_memory(two_steps):
    folder, told = two_steps
    program = Program(folder)
    with program.ckpt:
        program.ckpt.resume()
        program.step()
        weight = program.model["body"].weight.data_ptr()
        assert program.ckpt.resume(1) == 1 and program.told() == told[0]
        assert program.model["body"].weight.data_ptr() == weight


def test_what_does_not_fit_changes_nothing(two_steps):
    folder, _ = two_steps
    program = Program(folder, width=17)
    before = program.told()
    with pytest.raises(StateMismatch, match="Nothing of it was put in"), program.ckpt:
        program.ckpt.resume()
    assert program.told() == before


def test_where_none_verifies_the_generators_are_left_and_the_error_says_what_is_not(two_steps):
    folder, _ = two_steps
    for step in (1, 2):
        flip_the_last_bit(folder / f"step-0000000{step}" / "optimizer.safetensors")
    program = Program(folder)
    generators, moments = torch.get_rng_state(), program.optimizer.state_dict()["state"]
    with pytest.raises(NoCheckpoint, match="The state is not what it was"), program.ckpt:
        program.ckpt.resume()
    assert torch.equal(torch.get_rng_state(), generators) and program.optimizer.state_dict()["state"] == moments == {}


def test_what_only_a_damaged_one_had_is_named(tmp_path, caplog):
    for head in (False, True):
        program = Program(tmp_path / "run", head=head)
        with program.ckpt:
            program.ckpt.resume(only="model", strict=False)
            program.step()
    newest = max(tmp_path.glob("run/step-*/"))
    flip_the_last_bit(newest / "model.safetensors")
    program = Program(tmp_path / "run")
    with program.ckpt:
        assert program.ckpt.resume(only="model", strict=False) == 1
    assert re.search(
        r"2 hold what a damaged checkpoint does, and step-00000001 has none of: model\.head\.bias, model\.head\.weight",
        caplog.text,
    )


def large(what: str) -> dict[str, Any]:
    """50 parameters of 4 MiB and 1,000 small ones; or 13 with the moments that an optimizer has for each."""
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(48)), *(nn.Linear(16, 16) for _ in range(500)))
    if what == "module":
        return {"model": model}
    model = model[:12]
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


RESUMED = """
import re, sys
from pathlib import Path
from typing import Any
import torch
from test_resuming import large
from distckpt import Checkpointer

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

ckpt = Checkpointer(sys.argv[1], large(sys.argv[2]))
ckpt._stager._arena.wait_touched()  # the memory of saves, which is taken in the background
before = peak()
assert ckpt.resume() == 1
print(peak() - before)
ckpt.close()
"""


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("what", "state_bytes", "own_bytes"), [("module", 202e6, 0), ("optimizer", 151e6, 101e6)])
def test_a_resume_takes_no_second_copy_of_the_state(tmp_path, what, state_bytes, own_bytes):
    """But for what the optimizer did not have before."""
    parts = large(what)
    if what == "optimizer":
        for one in parts["model"].parameters():
            one.grad = torch.ones_like(one)
        parts["optimizer"].step()
    with Checkpointer(tmp_path / "run", parts, interval=1) as ckpt:
        ckpt.step()
    words = [sys.executable, "-c", RESUMED, str(tmp_path / "run"), what]
    place = {"cwd": Path(__file__).parent, "env": {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}}
    told = subprocess.run(words, capture_output=True, text=True, timeout=150, **place)
    assert told.returncode == 0, told.stderr
    assert int(told.stdout) < own_bytes + 0.15 * state_bytes + 40 * 1024 * 1024


def test_one_part_can_be_read_before_there_is_a_program(two_steps):
    root, _ = two_steps
    (root / "step-00000002" / "model.safetensors").write_bytes(b"")  # nobody looks at it
    held = Held()
    assert read_part(root, Solo(), "optimizer", held)
    assert {int(one["step"]) for one in held.state["state"].values()} == {2}
    assert read_part(root, Solo(), "optimizer", held, name="step-00000001")
    assert {int(one["step"]) for one in held.state["state"].values()} == {1}
    flip_the_last_bit(root / "step-00000002" / "optimizer.safetensors")
    assert read_part(root, Solo(), "optimizer", held)
    assert {int(one["step"]) for one in held.state["state"].values()} == {1}


def test_of_a_directory_without_checkpoints_no_part_can_be_read(tmp_path):
    held = Held()
    assert not read_part(tmp_path, Solo(), "optimizer", held)
    assert held.state is None

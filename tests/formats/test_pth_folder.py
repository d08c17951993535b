"""Weights in files of ``torch.save``, read straight into tensors wherever a file allows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distckpt.errors import DamagedCheckpoint
from distckpt.formats.pth_folder import PthFolder

STATE = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(4).bfloat16(),
    "whole": torch.ones(3, 3).T.contiguous(),
    "number": torch.tensor(7),
    "empty": torch.empty(0, 2),
    "extra": {"scale": 2},
}


def old(value: Any, path: Path) -> None:
    """As torch wrote files before 1.6."""
    torch.save(value, path, _use_new_zipfile_serialization=False)


def odd(value: Any, path: Path) -> None:
    """With tensors that do not fill what they lie in."""
    torch.save({key: torch.stack([one, one])[1] if torch.is_tensor(one) else one for key, one in value.items()}, path)


def read(folder: PthFolder) -> dict[str, Any]:
    (found,) = folder.snapshot({"part": {name: name for name in (*folder.tensors, *folder.values)}}).shared.values()
    made = {key: torch.full(one.shape, 9).to(one.dtype) for key, one in found.items() if isinstance(one, Tensor)}
    folder.fill([(found[key], one) for key, one in made.items()])
    return found | made


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    alike = [
        torch.equal(value, one[key]) if torch.is_tensor(value) else value == one[key] for key, value in other.items()
    ]
    return one.keys() == other.keys() and all(alike)


@pytest.mark.parametrize("save", [torch.save, old, odd])
def test_all_that_files_hold_is_read_back_whatever_torch_wrote_them(tmp_path, save):
    halves = [dict([*STATE.items()][nth::2]) for nth in (0, 1)]
    for nth, half in enumerate(halves):
        save(half, tmp_path / f"{nth}.bin")
    folder = PthFolder(tmp_path, {"0.bin": None, "1.bin": None})
    assert folder.values == ["extra"] and same(read(folder), STATE)


@pytest.mark.parametrize("save", [torch.save, old, odd])
def test_only_what_is_wanted_of_a_file_is_there_and_files_of_which_nothing_is_are_left(tmp_path, save):
    save(STATE, tmp_path / "a.bin")
    save({"c": torch.ones(2)}, tmp_path / "b.bin")
    folder = PthFolder(tmp_path, {"a.bin": frozenset({"a", "extra"}), "b.bin": None})
    assert (folder.tensors, folder.values) == (["a", "c"], ["extra"])
    (tmp_path / "b.bin").unlink()
    standing = folder.snapshot({"part": {"x": "a"}}).shared["part"]["x"]
    target = torch.zeros(2, 3)
    folder.fill([(standing, target)])
    assert torch.equal(target, STATE["a"])


@pytest.mark.parametrize("save", [torch.save, old, odd])
def test_a_file_that_is_another_by_the_time_that_it_is_filled_from_is_named(tmp_path, save):
    save(STATE, tmp_path / "a.bin")
    folder = PthFolder(tmp_path, {"a.bin": None})
    save({"a": torch.ones(2, 4), "b": torch.ones(5), "whole": torch.zeros(2)}, tmp_path / "a.bin")
    with pytest.raises(DamagedCheckpoint, match=r"a\.bin"):
        read(folder)


class Runs:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._path}",)


@pytest.mark.parametrize("save", [torch.save, old])
def test_no_code_of_a_file_is_run(tmp_path, save):
    save({"a": torch.ones(2), "b": Runs(tmp_path / "made")}, tmp_path / "a.bin")
    with pytest.raises(DamagedCheckpoint, match=r"a\.bin cannot be read without running code that it names"):
        PthFolder(tmp_path, {"a.bin": None})
    assert not (tmp_path / "made").exists()


def test_a_byte_that_changed_is_found_by_the_checksums_in_the_file(tmp_path):
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "a.bin")
    folder = PthFolder(tmp_path, {"a.bin": None})
    with (tmp_path / "a.bin").open("r+b") as file:
        file.seek(200_000)
        file.write(b"\1")
    with pytest.raises(DamagedCheckpoint, match=r"a\.bin"):
        read(folder)


PEAK = """
import re, sys, torch
from pathlib import Path
from distckpt.formats.pth_folder import PthFolder

def memory(word):
    return int(re.search(rf"{word}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

folder = PthFolder(Path(sys.argv[1]), {name: None for name in sys.argv[2:]})
weights = folder.snapshot({"part": {name: name for name in folder.tensors}}).shared["part"]
target = torch.zeros(weights["0.bin"].shape)
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = memory("VmRSS")
folder = PthFolder(Path(sys.argv[1]), {name: None for name in sys.argv[2:]})
weights = folder.snapshot({"part": {name: name for name in folder.tensors}}).shared["part"]
folder.fill([(one, target) for one in weights.values()])
print(memory("VmHWM") - before)
"""


@pytest.mark.parametrize(("save", "most_mib"), [(torch.save, 30), (old, 160)])
def test_as_much_memory_is_taken_as_the_largest_file_has_that_must_be_read_whole(tmp_path, save, most_mib):
    names = [f"{nth}.bin" for nth in range(4)]
    for name in names:
        save({name: torch.ones(16 * 1024 * 1024)}, tmp_path / name)  # of 64 MiB
    run = [sys.executable, "-c", PEAK, str(tmp_path), *names]
    told = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    assert int(told.stdout) < most_mib

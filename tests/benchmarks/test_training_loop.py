"""The benchmark of the training loop, run as people run it, on the smallest workload."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarking import BENCHMARKS, refusal_of, run_benchmark
from matplotlib import image

# Each process of a contender imports torch.
pytestmark = pytest.mark.timeout(300)

TEN_LINES = '''"""The model alone, in one file."""
import torch
from contenders import Contender
class Added(Contender):
    package = "torch"
    def save(self, step): torch.save(self.model.state_dict(), self.path(step))
    def restore(self, step): self.model.load_state_dict(torch.load(self.path(step), weights_only=True))
contender = Added()
'''
# It tells what was fsynced, what was left, and what there was when it was asked to wait before the optimizer.
WITNESS = (
    TEN_LINES
    + """
import json, os
from pathlib import Path
durable, fsync, calls = [], os.fsync, []
def recorded(fd):
    fsync(fd)
    durable.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
os.fsync = recorded
def before_optimizer():
    calls.append([float(one.grad.abs().sum()) > 0 for one in contender.model.parameters()])
def close():
    left = os.listdir(contender.directory)
    Path(__file__).with_suffix(".json").write_text(json.dumps({"durable": durable, "left": left, "calls": calls}))
contender.before_optimizer, contender.close = before_optimizer, close
"""
)
RAISES = (
    TEN_LINES
    + """
def save(step):
    if step == 2: raise OSError("cannot write /somewhere/private/2.pt")
    torch.save({}, contender.path(step))
contender.save = save
"""
)


def test_a_run_tells_what_the_saves_of_each_contender_cost(tmp_path: Path) -> None:
    saved, told, picture = tmp_path / "saved", tmp_path / "loop.json", tmp_path / "loop.png"
    saved.mkdir()
    words = ("--only", "distckpt_lazy", "--saves", 3, "--dir", saved, "--json", told, "--png", picture)
    done = run_benchmark("training_loop.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(told.read_text())
    check_text(done.stdout, result)
    for one in result["contenders"].values():
        check_turns(one["turns"], saves=3)
        check_saves_alone(one["alone"], result["state_bytes"])
    assert all(len(turn["steps"]) == 2 for control in result["controls"] for turn in control)
    lazy = result["contenders"]["distckpt_lazy"]
    assert lazy["alone"][-1]["peak_memory_bytes"] > 0.9 * result["state_bytes"]
    assert lazy["turns"][-1]["telemetry"]["event"] == "saved"
    assert all(floor[key] > 0 for floor in result["floor"] for key in ("memcpy", "direct_write", "direct_read"))
    assert str(tmp_path) not in told.read_text() and str(BENCHMARKS.parent) not in told.read_text()
    height, width, _ = image.imread(picture).shape
    assert width > 2 * height > 0
    assert list(saved.iterdir()) == []


def check_text(text: str, result: dict[str, Any]) -> None:
    """The control and every contender once; what was measured once or twice is compared with nothing."""
    rows = [line.split("|")[1].strip() for line in text.split("\n\n")[1].splitlines() if line.startswith("| ")]
    assert rows == ["contender", "no_save", "torch_save_fsync", "distckpt_lazy"]
    assert list(result["contenders"]) == rows[2:]
    assert "raw O_DIRECT write into a new file, and fsync" in text
    assert result["contenders"]["distckpt_lazy"]["figures"]["durable"]["count"] == 1
    assert [line for line in text.splitlines() if line.startswith("| torch_save_fsync") and "too few" in line]


def check_turns(turns: list[dict[str, Any]], saves: int) -> None:
    """A save, and the steps around it; the first is one more."""
    assert ["is_first" in turn for turn in turns] == [True, *[False] * saves]
    for turn in turns:
        assert len(turn["quiet"]) == 1 and len(turn["steps"]) >= 2
        assert 0 < turn["call"] < turn["steps"][0] and 0 <= turn["waited"] < turn["steps"][0]
        assert turn["call"] < turn["done_seconds"]


def check_saves_alone(saves: list[dict[str, Any]], state_bytes: int) -> None:
    """In the first round and in the last, each with a time, a cost and the whole state."""
    assert len(saves) == 2
    for save in saves:
        assert 0 < save["blocked"] <= save["durable"] - save["fsync"]
        assert save["cpu"] > 0 and save["file_bytes"] >= state_bytes


def test_contenders_that_were_added_are_measured_or_told_as_failed(tmp_path: Path) -> None:
    folder, told = tmp_path / "benchmarks", tmp_path / "result.json"
    shutil.copytree(BENCHMARKS, folder)
    for name, text in {"witness": WITNESS, "raises": RAISES}.items():
        (folder / "contenders" / f"{name}.py").write_text(text)
    words = ("--saves", 1, "--json", told, "--only", "witness", "raises")
    done = run_benchmark("training_loop.py", *words, folder=folder)
    result, seen = json.loads(told.read_text()), json.loads((folder / "contenders" / "witness.json").read_text())
    assert done.returncode == 1
    assert result["failures"] == {"raises": "OSError: cannot write 2.pt"}
    assert "- raises FAILED: OSError: cannot write 2.pt" in done.stdout
    assert set(result["contenders"]) == {"torch_save_fsync", "witness"}
    assert result["contenders"]["witness"]["about"] == "The model alone, in one file."
    check_witness(seen)


def check_witness(seen: dict[str, Any]) -> None:
    """What was left in the page cache was fsynced with its folder, only the newest stayed, and there were gradients
    when training was to wait: in two turns, not in the saves that were made alone behind each."""
    assert [name for name in dict.fromkeys(seen["durable"]) if name != "witness"] == ["1", "2", "3", "4"]
    assert seen["durable"][1] == "witness"
    assert seen["left"] == ["4"]
    assert [all(has_gradient) for has_gradient in seen["calls"]] == [True, False, True, False]


def test_a_contender_is_a_file_of_ten_lines() -> None:
    assert TEN_LINES.count("\n") <= 10


def test_saves_at_every_step_are_told_as_a_slowdown(tmp_path: Path) -> None:
    words = ("--in-a-row", 12, "--only", "distckpt_lazy")
    done = run_benchmark("training_loop.py", *words, "--json", tmp_path / "row.json", "--png", tmp_path / "row.png")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "row.json").read_text())
    for one in result["contenders"].values():
        row = one["row"]
        assert [len(row[key]) for key in ("steps", "blocked", "memory_bytes")] == [12] * 3
        assert len(row["quiet_before"]) == len(row["quiet_after"]) > 0
        assert max(row["memory_bytes"][-3:]) < max(row["memory_bytes"][:3]) + 20e6
    assert "- distckpt_lazy against torch_save_fsync: " in done.stdout
    assert (tmp_path / "row.png").stat().st_size > 0


def test_nothing_is_left_on_the_disk_when_it_is_told_to_end(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "training_loop.py"), "--workload", "tiny", "--saves", "100000"]
    words = ["--only", "torch_save_fsync", "--dir", str(tmp_path)]
    with subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr
        while not running.stderr.readline().startswith("first round"):
            assert running.poll() is None
        running.terminate()
        assert running.wait(60) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [("--only", "nobody"), ("--saves", "0"), ("--every", "1"), ("--in-a-row", "many"), ("--dir", "nowhere")]
)
def test_a_wrong_word_is_refused(words: tuple[str, str]) -> None:
    assert words[1] in refusal_of("training_loop.py", *words)

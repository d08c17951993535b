"""The benchmark of one save, run as people run it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Five processes that import torch take 15 s on two quiet cores, and several times that on busy ones.
pytestmark = pytest.mark.timeout(300)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CONTENDERS = {path.stem for path in BENCHMARKS.glob("contenders/*.py")} - {"__init__"}

TEN_LINES = '''"""The model alone, in one file."""
import torch
class Added:
    package = "torch"
    def open(self, directory, model, optimizer): self.model, self.directory = model, directory
    def save(self, step): torch.save(self.model.state_dict(), self.directory / f"{step}.pt")
    def wait(self): pass
    def delete(self, step): (self.directory / f"{step}.pt").unlink()
    def close(self): pass
contender = Added()
'''
RAISES = (
    TEN_LINES
    + """
def save(step):
    if step == 2: raise OSError("cannot write /somewhere/private/2.pt")
contender.save, contender.delete = save, print
"""
)
DIES = (
    TEN_LINES
    + """
import os, sys
def save(step):
    print("no memory left", file=sys.stderr, flush=True)
    os._exit(3)
contender.save = save
"""
)
STAYS_OPEN = (
    TEN_LINES
    + """
def close(): raise RuntimeError("still writing")
contender.close = close
"""
)
WITNESS = (
    TEN_LINES
    + """
import json, mmap, os
from pathlib import Path
durable, fsync = [], os.fsync
def recorded(fd):
    fsync(fd)
    durable.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
os.fsync = recorded
write = contender.save
def save(step):
    write(step)
    if step == 1:
        with mmap.mmap(-1, 64_000_000) as memory: memory.write(bytes(1) * 64_000_000)
def close():
    told = {"durable": durable, "left": os.listdir(contender.directory)}
    Path(__file__).with_suffix(".json").write_text(json.dumps(told))
contender.save, contender.close = save, close
"""
)


def benchmark(*words: object, folder: Path = BENCHMARKS) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "save_latency.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """The table, the JSON and the directory of one run."""
    folder, file = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("told") / "result.json"
    done = benchmark("--mb", 2, "--rounds", 1, "--dir", folder, "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(file.read_text()), folder


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any], Path]:
    """A run with contenders that were added to a copy, and the folder of these."""
    folder = tmp_path_factory.mktemp("copy") / "benchmarks"
    shutil.copytree(BENCHMARKS, folder)
    added = {"added": TEN_LINES, "raises": RAISES, "dies": DIES, "stays_open": STAYS_OPEN, "witness": WITNESS}
    for name, text in added.items():
        (folder / "contenders" / f"{name}.py").write_text(text)
    told = folder / "result.json"
    done = benchmark("--mb", 1, "--rounds", 1, "--json", told, "--only", *added, folder=folder)
    return done, json.loads(told.read_text()), folder / "contenders"


def test_the_table_has_every_contender_once(ran: tuple[str, dict[str, Any], Path]) -> None:
    table, result, _ = ran
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows == ["contender", *sorted(CONTENDERS)]
    assert set(result["contenders"]) == CONTENDERS
    assert result["failures"] == {}


def test_every_sample_has_a_time_a_cost_and_the_whole_state(ran: tuple[str, dict[str, Any], Path]) -> None:
    _, result, _ = ran
    assert result["state_bytes"] >= 2_000_000
    for one in result["contenders"].values():
        assert len(one["samples"]) == result["rounds"] == 1
        for sample in (one["first"], *one["samples"]):
            assert 0 < sample["blocking_seconds"] < sample["durable_seconds"]
            assert 0 < sample["fsync_seconds"] < sample["durable_seconds"]
            assert sample["cpu_seconds"] > 0
            assert sample["file_bytes"] >= result["state_bytes"]


def test_a_copy_of_the_state_counts_as_memory(ran: tuple[str, dict[str, Any], Path]) -> None:
    _, result, _ = ran
    for name in ("distckpt_checkpointer", "mmengine_hook"):
        one = result["contenders"][name]
        assert one["summary"]["peak_memory_bytes"]["max"] - one["opened_memory_bytes"] > 0.9 * result["state_bytes"]


def test_memory_that_a_save_had_for_a_moment_counts_for_that_save_alone(
    extended: tuple[subprocess.CompletedProcess[str], dict[str, Any], Path],
) -> None:
    witness = extended[1]["contenders"]["witness"]
    assert witness["first"]["peak_memory_bytes"] > 64_000_000
    assert witness["samples"][0]["peak_memory_bytes"] < 32_000_000


def test_ratios_are_against_torch_save_in_the_same_run(ran: tuple[str, dict[str, Any], Path]) -> None:
    _, result, _ = ran
    assert set(result["contenders"]["torch_save"]["ratios"].values()) == {1.0}
    mine, torch_save = (result["contenders"][name] for name in ("mmengine_hook", "torch_save"))
    measured = mine["samples"][0]["durable_seconds"] / torch_save["samples"][0]["durable_seconds"]
    assert mine["ratios"]["durable_seconds"] == pytest.approx(measured)


def test_the_json_names_no_place(ran: tuple[str, dict[str, Any], Path]) -> None:
    assert "/" not in json.dumps(ran[1])


def test_nothing_is_left_on_the_disk(ran: tuple[str, dict[str, Any], Path]) -> None:
    assert list(ran[2].iterdir()) == []


def test_a_contender_is_a_file_of_ten_lines(
    extended: tuple[subprocess.CompletedProcess[str], dict[str, Any], Path],
) -> None:
    _, result, _ = extended
    assert TEN_LINES.count("\n") == 10
    assert result["contenders"]["added"]["about"] == "The model alone, in one file."
    assert result["contenders"]["added"]["ratios"] is None


def test_a_contender_that_fails_is_told_and_the_others_are_measured(
    extended: tuple[subprocess.CompletedProcess[str], dict[str, Any], Path],
) -> None:
    done, result, _ = extended
    assert done.returncode == 1
    assert result["failures"] == {
        "raises": "OSError: cannot write 2.pt",
        "dies": "ended with 3: no memory left",
        "stays_open": "RuntimeError: still writing",
    }
    assert "- raises FAILED: OSError" in done.stdout
    assert set(result["contenders"]) == {"added", "witness"}


def test_what_a_contender_left_in_the_page_cache_is_fsynced_with_its_folder(
    extended: tuple[subprocess.CompletedProcess[str], dict[str, Any], Path],
) -> None:
    durable = json.loads((extended[2] / "witness.json").read_text())["durable"]
    assert durable == ["1.pt", "witness", "2.pt", "witness", "witness"]


def test_only_the_newest_save_stays_on_the_disk(
    extended: tuple[subprocess.CompletedProcess[str], dict[str, Any], Path],
) -> None:
    assert json.loads((extended[2] / "witness.json").read_text())["left"] == ["2.pt"]


def test_nothing_is_left_on_the_disk_when_it_is_told_to_end(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "save_latency.py"), "--mb", "1", "--rounds", "1000000"]
    with subprocess.Popen(
        [*command, "--only", "torch_save", "--dir", str(tmp_path)], stderr=subprocess.PIPE
    ) as running:
        assert running.stderr
        assert running.stderr.readline() == b"first saves\n"
        running.terminate()
        assert running.wait(60) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("--only", "nobody"), ("--rounds", "0"), ("--mb", "many"), ("--dir", "nowhere")])
def test_a_wrong_word_is_refused(words: tuple[str, str]) -> None:
    done = benchmark(*words)
    assert done.returncode == 2
    assert words[1] in done.stderr.splitlines()[-1]

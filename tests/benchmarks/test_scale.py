"""The benchmark of planning, run as people run it, for few ranks and tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarking import BENCHMARKS

STATES = ["fsdp", "ddp", "hsdp", "2d", "different"]


def run_scale(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / "scale.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)


def test_each_state_is_planned_restored_and_planned_by_stock_dcp(tmp_path: Path) -> None:
    told = tmp_path / "scale.json"
    done = run_scale("--states", *STATES, "--ranks", 4, 32, "--tensors", 20, "--json", told)
    assert done.returncode == 0, done.stderr
    result = json.loads(told.read_text())
    planned = [(state, ranks) for state in STATES for ranks in (4, 32)]
    assert [(one["state"], one["ranks"]) for one in result["ours"]] == planned
    assert [(one["state"], one["ranks"]) for one in result["stock"]] == planned
    for one in result["ours"]:
        assert one["tensors"] == 20
        assert one["reads"] >= 1 and one["groups"] >= 1
        for figure in ("leader_seconds", "told_bytes", "answer_bytes", "manifest_bytes", "peak_memory_bytes"):
            assert one[figure] > 0
    assert {one["state"] for one in result["growth"]} == set(STATES)
    assert all(one["state"] in ("ddp", "hsdp") for one in result["ours"] if one["balance"])
    assert "ranks as objects" in done.stdout or "ranks are objects" in done.stdout
    for state in STATES:
        assert f"| {state} " in done.stdout


@pytest.mark.parametrize("words", [["--states", "nothing"], ["--ranks", "0"], ["--json", "/no/such/folder/x"]])
def test_what_cannot_be_measured_is_refused(words: list[str]) -> None:
    assert run_scale(*words).returncode == 2

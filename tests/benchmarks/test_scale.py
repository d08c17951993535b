"""The benchmark of planning and agreeing, run as people run it, for few ranks and tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarking import BENCHMARKS, refusal_of

STATES = ["fsdp", "ddp", "hsdp", "2d", "different"]


def run_scale(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / "scale.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)


def measured(tmp_path: Path, *words: object) -> tuple[dict[str, Any], str]:
    told = tmp_path / "scale.json"
    done = run_scale(*words, "--json", told)
    assert done.returncode == 0, done.stderr
    return json.loads(told.read_text()), done.stdout


def test_each_state_is_planned_restored_and_planned_by_stock_dcp(tmp_path: Path) -> None:
    words = ["--only", "planning", "--states", *STATES, "--ranks", 4, 32, "--tensors", 20]
    result, told = measured(tmp_path, *words)
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
    assert "the ranks are objects" in told
    for state in STATES:
        assert f"| {state} " in told


def test_ranks_agree_on_a_plan_and_on_saves_and_each_says_and_hears_as_much_as_of_fewer(tmp_path: Path) -> None:
    result, told = measured(tmp_path, "--only", "agreeing", "--states", "hsdp", "--ranks", 32, 128, "--tensors", 20)
    few, many = result["agreed"]
    assert (few["ranks"], many["ranks"]) == (32, 128) and few["save_seconds"] > 0
    for part in ("plan", "save"):
        for figure in ("said_bytes", "heard_bytes"):
            assert 0 < many[part][figure] / 127 < 1.2 * few[part][figure] / 31
    assert "TCPStore" in told and "| hsdp " in told and "agreeing on a save grows as ranks^" in told


def test_a_later_save_is_seen_to_be_of_the_same_state(tmp_path: Path) -> None:
    result, told = measured(tmp_path, "--only", "later", "--tensors", 40)
    assert [(one["kind"], one["tensors"]) for one in result["later"]] == [("DTensors", 40), ("plain tensors", 40)]
    assert all(one["lay_out_seconds"] > one["compare_seconds"] > 0 for one in result["later"])
    assert "0 collectives" in told


@pytest.mark.parametrize(
    "words, told",
    [
        (["--states", "nothing"], "invalid choice: 'nothing'"),
        (["--ranks", "0"], "--ranks"),
        (["--json", "/no/such/folder/x"], "/no/such/folder is not a directory"),
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        (["--only", "agreeing", "--states", "fsdp", "--ranks", "1"], "one rank has nobody to agree with"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], told: str) -> None:
    assert told in refusal_of("scale.py", *words)

"""The benchmark of several ranks, run as people run it, on the smallest workload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarking import run_benchmark

pytestmark = pytest.mark.timeout(300)


def test_all_save_and_restore_with_another_number_of_ranks_and_are_told(tmp_path: Path) -> None:
    told = tmp_path / "sharded.json"
    words = ("--rounds", 1, "--json", told)
    done = run_benchmark("sharded.py", *words)
    assert done.returncode == 0, done.stderr
    samples = json.loads(told.read_text())["samples"]
    names = {"raw", "distckpt", "distckpt_recycled", "dcp_1_threads", "dcp_2_threads", "dcp_4_threads"}
    for key in ("durable", "restored"):
        counted = [one for one in samples if key in one and not one["is_first"]]
        assert {one["name"] for one in counted} == names and all(one[key] > 0 for one in counted)
    assert "2 ranks save, 3 restore" in done.stdout and "distckpt" in done.stdout

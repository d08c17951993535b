"""The benchmark of a restore, run as people run it, on the smallest workload."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from benchmarking import BENCHMARKS, run_benchmark

pytestmark = pytest.mark.timeout(300)

FORGETS = '''"""It restores nothing."""
import torch
from contenders import Contender
class Forgets(Contender):
    package = "torch"
    def save(self, step): torch.save({}, self.path(step))
contender = Forgets()
'''


def test_restores_are_compared_with_what_was_saved_cold_and_warm(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    shutil.copytree(BENCHMARKS, folder)
    (folder / "contenders" / "forgets.py").write_text(FORGETS)
    words = ("--rounds", 1, "--only", "distckpt_eager", "forgets")
    told = tmp_path / "restore.json"
    done = run_benchmark("restore_time.py", *words, "--json", told, "--png", tmp_path / "restore.png", folder=folder)
    result = json.loads(told.read_text())
    assert done.returncode == 1
    assert result["failures"] == {"forgets": "ValueError: what it restored is not what it saved"}
    assert set(result["contenders"]) == {"torch_save_fsync", "distckpt_eager"}
    for one in result["contenders"].values():
        assert [restore["kind"] for restore in one["restores"]] == ["cold", "warm"] * 2
        for restore in one["restores"]:
            assert restore["seconds"] > 0 and restore["cpu"] > 0
            assert restore["cached_share"] == (0.0 if restore["kind"] == "cold" else 1.0)
    assert "raw O_DIRECT read" in done.stdout
    assert (tmp_path / "restore.png").stat().st_size > 0

"""The comparisons with what frameworks have of their own run, and say of this library that it goes on exactly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parents[2] / "benchmarks" / "integrations"


@pytest.mark.timeout(120)
def test_a_table_says_who_goes_on_exactly(tmp_path):
    pytest.importorskip("accelerate")
    words = [str(PROGRAMS / "with_accelerate.py"), "--width", "8", "--dir", str(tmp_path)]
    told = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    rows = [line.strip("| ").split(" | ") for line in told.stdout.splitlines() if line.startswith("| `")]
    assert [(row[1], row[-1]) for row in rows] == [("6", "yes"), ("6", "no")], told.stdout

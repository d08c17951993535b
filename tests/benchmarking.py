"""Runs a benchmark as people do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run_benchmark(script: str, *words: object, folder: Path = BENCHMARKS) -> subprocess.CompletedProcess[str]:
    """On the smallest workload, with one thread. Others may use the machine: no sample is thrown away for it."""
    # A copy of the folder does not lie beside the library.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(folder / script), "--workload", "tiny", "--foreign-percent", "1000000"]
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=280, env=environment)

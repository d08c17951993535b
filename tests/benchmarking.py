"""Runs a benchmark as people do."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run_benchmark(script: str, *words: object, folder: Path = BENCHMARKS) -> subprocess.CompletedProcess[str]:
    """On the smallest workload, with one thread. Others may use the machine: no sample is thrown away for it."""
    # A copy of the folder does not lie beside the library.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(folder / script), "--workload", "tiny", "--foreign-percent", "1000000"]
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=280, env=environment)


def refusal_of(script: str, *words: object) -> str:
    """What it says at last where it is called wrongly. In this process, as another would import all for one line."""
    program = importlib.import_module(script.removesuffix(".py"))
    told = io.StringIO()
    called = patch.object(sys, "argv", [script, *map(str, words)])
    with called, contextlib.redirect_stderr(told), pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    return told.getvalue().splitlines()[-1]

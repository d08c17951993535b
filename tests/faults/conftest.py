"""What the fault tests share: the shim, built once, and processes that are forked with it preloaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Forked processes import these modules by the same names as the tests do.
sys.path.insert(0, str(Path(__file__).parent))

import shim
from forks import Forks


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shim.build(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="session")
def forks(library: Path) -> Iterator[Forks]:
    with Forks(library) as running:
        yield running


@pytest.fixture(scope="session")
def trainings(library: Path) -> Iterator[Forks]:
    """Forks of a process that has imported torch and distckpt: a training costs 0.1 s, not 3."""
    with Forks(library, "workload") as running:
        yield running


@pytest.fixture(scope="session")
def ranks(library: Path) -> Iterator[Forks]:
    """As ``trainings``, of what the ranks of a sharded training do."""
    with Forks(library, "sharded_training") as running:
        yield running

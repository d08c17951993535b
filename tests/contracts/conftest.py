"""What contract tests share: every implementation of a contract, found by looking into its folder."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from distckpt import stores
from distckpt.stores import Store
from distckpt.stores.local import LocalStore
from distckpt.testing import FaultyStore

# How a store of each module in distckpt/stores is made in an empty folder.
MAKERS: dict[str, Callable[[Path], Store]] = {"local": LocalStore}


def modules_in(package: ModuleType) -> set[str]:
    return {module.name for module in pkgutil.iter_modules(package.__path__)}


@pytest.fixture(params=sorted(modules_in(stores)))
def make_store(request: pytest.FixtureRequest) -> Callable[[Path], Store]:
    """Makes a store in a folder; a module that nobody taught this to make has no contract that is kept."""
    assert request.param in MAKERS, f"distckpt/stores/{request.param}.py: say in MAKERS how one is made"
    return MAKERS[request.param]


@pytest.fixture(params=["itself", "counted"])
def store(request: pytest.FixtureRequest, make_store: Callable[[Path], Store], tmp_path: Path) -> Store:
    """A store in an empty directory, also as tests see it that count its operations."""
    made = make_store(tmp_path)
    return made if request.param == "itself" else FaultyStore(made)

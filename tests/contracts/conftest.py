"""What contract tests share: every implementation of a contract, found by looking into its folder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from distckpt import formats, stores
from distckpt.formats import Format
from distckpt.ranks import Ranks
from distckpt.ranks.process_group import detect
from distckpt.stores import Store
from distckpt.stores.local import LocalStore
from distckpt.testing import FaultyStore, on_threads, thread_ranks

# How a store of each module in distckpt/stores that has one is made in an empty folder.
MAKERS: dict[str, Callable[[Path], Store]] = {"local": LocalStore}


def modules_in(package: ModuleType) -> set[str]:
    return {module.name for module in pkgutil.iter_modules(package.__path__)}


def formats_in_their_folder() -> dict[str, Format]:
    """Every module of distckpt/formats that has a ``FORMAT`` is one, by its name."""
    modules = [importlib.import_module(f"{formats.__name__}.{name}") for name in modules_in(formats)]
    return {module.FORMAT.name: module.FORMAT for module in modules if hasattr(module, "FORMAT")}


def stores_in_their_folder() -> set[str]:
    """Every module of distckpt/stores that defines a class named "...Store". The others are what a store is made of:
    they make no promise that a caller of a store would hear of."""
    modules = {name: importlib.import_module(f"{stores.__name__}.{name}") for name in modules_in(stores)}
    return {
        name
        for name, module in modules.items()
        for one in vars(module).values()
        if isinstance(one, type) and one.__name__.endswith("Store") and one.__module__ == module.__name__
    }


@pytest.fixture(params=sorted(stores_in_their_folder()))
def make_store(request: pytest.FixtureRequest) -> Callable[[Path], Store]:
    """Makes a store in a folder; a module that nobody taught this to make has no contract that is kept."""
    assert request.param in MAKERS, f"distckpt/stores/{request.param}.py: say in MAKERS how one is made"
    return MAKERS[request.param]


@pytest.fixture(params=["itself", "counted"])
def store(request: pytest.FixtureRequest, make_store: Callable[[Path], Store], tmp_path: Path) -> Store:
    """A store in an empty directory, also as tests see it that count its operations."""
    made = make_store(tmp_path)
    return made if request.param == "itself" else FaultyStore(made)


class Job:
    """The ranks of one kind of job. A test gives it work, which is done on each rank."""

    def __init__(self, kind: str, world_size: int, run_ranks: Callable[..., list[Any]]) -> None:
        self.kind = kind
        self.world_size = world_size
        self._run_ranks = run_ranks

    def __call__(self, work: Callable[[Ranks], Any], *, timeout: timedelta = timedelta(seconds=20)) -> list[Any]:
        """What ``work`` returned, or the error that it raised, by rank."""
        if self.kind == "threads":
            return on_threads(thread_ranks(self.world_size, timeout=timeout), work)

        def told(rank: int) -> Any:
            ranks = detect(timeout)
            try:
                return work(ranks)
            except Exception as error:
                return error
            finally:
                ranks.close()

        return [told(0)] if self.kind == "solo" else self._run_ranks(self.world_size, told)


JOBS = {"solo": ("solo", 1), "2 threads": ("threads", 2), "4 threads": ("threads", 4), "2 processes": ("gloo", 2)}


@pytest.fixture(params=sorted(JOBS))
def job(request: pytest.FixtureRequest, run_ranks: Callable[..., list[Any]]) -> Job:
    return Job(*JOBS[request.param], run_ranks)


@pytest.fixture(params=sorted(formats_in_their_folder()))
def format(request: pytest.FixtureRequest) -> Format:
    return formats_in_their_folder()[request.param]

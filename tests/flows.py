"""A run of N thread ranks with a real format, for the tests of the flows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch

from distckpt.attempt import Attempt, Holder
from distckpt.catalog import Catalog
from distckpt.engine.stager import Stager
from distckpt.formats import Format, Snapshot, Staged, Written
from distckpt.formats.full import FORMAT, Full
from distckpt.formats.known import get_format
from distckpt.formats.stand_ins import Whole, read_whole
from distckpt.manifest import Manifest, Record
from distckpt.planning import plan
from distckpt.progress import Progress
from distckpt.ranks import Ranks, is_leader
from distckpt.restoring import Restored, restore_newest
from distckpt.saving import Job, save
from distckpt.stores import Store
from distckpt.stores.local import LocalStore
from distckpt.testing import on_threads, thread_ranks

SOON = timedelta(seconds=5)


def state_of(step: int) -> dict[str, Any]:
    """What a model holds after ``step`` steps."""
    return {"model": {"weight": torch.full((3, 2), float(step)), "bias": torch.arange(2) + step}}


def take(snapshot: Snapshot, *, rank: int = 0, format: Format = FORMAT) -> Staged:
    """The snapshot of that state, in an arena of its own, not staged yet."""
    return Stager().take(format.lay_out(snapshot, rank))


def write_now(format: Format, snapshot: Snapshot, store: Store, path: str, rank: int = 0) -> Written:
    """The files of that state are written, as a save does it."""
    staged = take(snapshot, rank=rank, format=format)
    staged.stage()
    try:
        return staged.write(store, path)
    finally:
        staged.release()


def read_now(
    format: Format,
    store: Store,
    path: str,
    manifest: Manifest,
    rank: int = 0,
    parts: Collection[str] | None = None,
) -> Snapshot:
    """That checkpoint, in new memory."""
    return read_whole(format.open(store, path, manifest, rank, parts))


class Gated:
    """A snapshot that is written once the gate is open."""

    def __init__(self, staged: Staged, gate: threading.Event) -> None:
        self._staged = staged
        self._gate = gate

    def write(self, store: Store, path: str) -> Written:
        assert self._gate.wait(20), "nobody opened the gate"
        return self._staged.write(store, path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._staged, name)


class Saves:
    """Saves steps one after another with ``world_size`` ranks into ``folder``, each rank through its own store."""

    def __init__(
        self, folder: Path, world_size: int, *, timeout: timedelta = SOON, make_format: Callable[[], Format] = Full
    ) -> None:
        self.folder = folder
        self.formats = [make_format() for _ in range(world_size)]
        self.ranks = thread_ranks(world_size, timeout=timeout)
        store = LocalStore(folder)
        store.make_root()
        self.catalog = Catalog(store, Attempt.start(store, Holder.here()))
        self.stores: list[Store] = [LocalStore(folder) for _ in self.ranks]

    def save(
        self, step: int, *, snapshot: Callable[[int], Snapshot] | None = None, absent: Sequence[int] = ()
    ) -> list[Record | BaseException | None]:
        """What became of the save of ``step`` on each rank."""

        def work(ranks: Ranks) -> Record | None:
            if ranks.rank in absent:
                return None

            format = self.formats[ranks.rank]
            own = {"rng": {"rank": ranks.rank, "step": step}}

            @cache
            def state() -> Snapshot:
                return snapshot(ranks.rank) if snapshot else Snapshot(state_of(step), own)

            @cache
            def taken() -> Staged:
                staged = take(state(), rank=ranks.rank, format=format)
                staged.stage()
                return staged

            if format.planner is not None and format.planner.is_due:
                plan(ranks, format.planner, state)
            catalog = None
            if is_leader(ranks):
                catalog = Catalog(self.stores[0], self.catalog.attempt)
                catalog._serial = self.catalog._serial
                self.catalog._serial += 1
            return save(
                Job(Progress(step), ("interval",), taken),
                format=format,
                store=self.stores[ranks.rank],
                ranks=ranks,
                catalog=catalog,
                after=lambda record, seconds, measures: None,
            )

        return on_threads(self.ranks, work)

    def restore(
        self, fit: Callable[[Snapshot, Record], Any] = lambda snapshot, _: Whole(snapshot), **words: Any
    ) -> list[Restored[Any] | None | BaseException]:
        """What each rank restores, into new memory if nothing else is said."""
        return on_threads(
            self.ranks,
            lambda ranks: restore_newest(ranks, fit, store=self.stores[ranks.rank], get_format=get_format, **words),
        )

"""Ranks of torch.distributed, which agree through the store that its process group was made with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol, cast

import torch.distributed as dist
from torch.distributed import distributed_c10d

from distckpt.ranks import Ranks, Solo
from distckpt.ranks.board import BoardRanks


def detect(timeout: timedelta) -> Ranks:
    """The ranks of the default process group; `Solo` where there is none. Collective, without waiting.

    Every rank must make the same number of calls: the n-th call of one agrees with the n-th of the others.

    Raises:
        RuntimeError: where a launcher started several processes that do not know of one another yet.
    """
    if not dist.is_available() or not dist.is_initialized():
        told = os.environ.get("WORLD_SIZE", "1")
        if told.isdecimal() and int(told) > 1:
            raise RuntimeError(
                f"WORLD_SIZE is {told}, but torch.distributed is not initialised: call "
                "torch.distributed.init_process_group() before, so that the ranks can agree on what is saved"
            )
        return Solo()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return Solo()
    # The store is how the process group itself met. It has no public name, and no substitute: a store of our own
    # would need a port, and an address that all ranks can reach.
    store = cast(Store, distributed_c10d._get_default_store())
    nth = store.add(f"distckpt/opened/{rank}", 1)
    return BoardRanks(C10dBoard(store.clone()), rank, world_size, name=f"distckpt/{nth}", timeout=timeout)


class Store(Protocol):
    """What is used of ``torch.distributed.Store``, whose own types are not exported."""

    def set(self, key: str, value: str) -> None: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def add(self, key: str, amount: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...
    def delete_key(self, key: str) -> bool: ...
    def clone(self) -> Store: ...


class C10dBoard:
    """A c10d store as a board. Nothing here waits in C++, where a lost peer could not be given up; so all threads of a
    rank can share one, which is a connection of its own to rank 0."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def post(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def look(self, keys: Sequence[str]) -> Sequence[str] | None:
        asked = list(keys)
        return [one.decode() for one in self._store.multi_get(asked)] if self._store.check(asked) else None

    def remove(self, key: str) -> None:
        self._store.delete_key(key)

"""A training on two ranks, each of which writes a part of its state, and what is there after one of them was lost."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import rank_processes
import shim
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from workload import RUN, SCORES, Told, leftovers

from distckpt import Checkpointer, DistckptError, RankFailure, SaveFailed
from distckpt.catalog import read_manifest, scan
from distckpt.manifest import FileEntry
from distckpt.stores.local import LocalStore

WORLD_SIZE = 2
DEADLINE = timedelta(seconds=4)


class Own:
    """What each rank has of its own."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.seen = torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert state["rank"] == self.rank
        self.seen = state["seen"]


class Training:
    """Numbers that some steps do not round, so that they are the same on one rank and on two."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self._rank, self._world_size = rank, world_size
        spread = torch.arange(36_000.0).view(600, 60)
        if world_size > 1:
            mesh = init_device_mesh("cpu", (world_size,))
            spread = DTensor.from_local(self._part(spread).clone(), mesh, [Shard(0)], run_check=False)
        self.model = nn.Module()
        self.model.spread = nn.Parameter(spread)
        self.model.alike = nn.Parameter(torch.arange(50.0))
        self.model.register_buffer("count", torch.tensor(0))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.5)
        self.own = Own(rank)

    def checkpointer(self, root: Path) -> Checkpointer:
        state = {"model": self.model, "optimizer": self.optimizer, "own": self.own}
        keeping = {"max_keep_ckpts": 1, "save_best": "score", "rule": "greater", "save_last": False}
        return Checkpointer(
            root / RUN, state, format="sharded", per_rank=["own"], sync_buffers=False, timeout=DEADLINE, **keeping
        )

    def step(self) -> None:
        for one in self.model.parameters():
            one.grad = torch.ones_like(one)
        self.optimizer.step()
        self.model.count += 1
        self.own.seen += self._rank + 1

    def held(self) -> dict[str, Tensor]:
        moments = [self.optimizer.state[one].get("momentum_buffer") for one in self.model.parameters()]
        tensors = {**self.model.state_dict(), "spread momentum": moments[0], "alike momentum": moments[1]}
        return {name: getattr(one, "_local_tensor", one) for name, one in tensors.items() if one is not None}

    def wrong(self, step: int) -> list[str]:
        """What is not where so many steps lead to, to the last bit. What is a rank's own is not resumed by one."""
        expected = {name: self._part(one) if "spread" in name else one for name, one in _EXPECTED[step].items()}
        found = self.held() | {"own": self.own.seen}
        expected["own"] = torch.full((3,), step * (self._rank + 1.0)) if self._world_size > 1 else self.own.seen
        return [
            f"{name} is not that of step {step}"
            for name in found | expected
            if not _same(found.get(name), expected.get(name))
        ]

    def _part(self, whole: Tensor) -> Tensor:
        return whole.chunk(self._world_size)[self._rank]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def _expected(steps: int) -> list[dict[str, Tensor]]:
    training, found = Training(), []
    for _ in range(steps):
        found.append({name: one.clone() for name, one in training.held().items()})
        training.step()
    return found


_EXPECTED = _expected(8)


def meet(rank: int, meeting: str, host: int) -> None:
    """The ranks know of one another; the store is in the process of ``host``."""
    store = rank_processes.meet(rank, WORLD_SIZE, Path(meeting), host=host)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=20))


def train(
    root: Path, *, rank: int, meeting: str, more: int, host: int = 0, is_forgiving: bool = False, waits: bool = True
) -> None:
    """Resume, check every bit, and do so many steps more, each saved and then labelled.

    Which ranks are lost, and how many milliseconds later that was known, is told; nothing more is done then. With
    ``is_forgiving`` a save that fails is told, the fault is over, and training goes on. Without ``waits`` it goes on
    while a save is written, until the next.
    """
    meet(rank, meeting, host)
    training = Training(rank, WORLD_SIZE)
    began = time.monotonic()
    try:
        with training.checkpointer(root) as checkpointer:
            start = checkpointer.resume()
            assert training.wrong(start) == []
            shim.say(f"resumed {start}")
            for step in range(start + 1, start + more + 1):
                training.step()
                began = time.monotonic()
                try:
                    checkpointer.step()
                    checkpointer.save("interval", wait=waits)
                    shim.say(f"acknowledged {step}" if waits else f"asked {step}")
                except SaveFailed as failure:
                    if not is_forgiving:
                        raise
                    shim.arm(None)
                    shim.say(f"failed {step} {[*failure.failures]} {failure}")
                    began = time.monotonic()
                if waits:
                    checkpointer.report({"score": SCORES.get(step, 0.0)})
    except RankFailure as failure:
        shim.say(f"lost {[*failure.failures]} {1000 * (time.monotonic() - began):.0f} {failure}")


def verify(root: Path, *, cases: list[str]) -> None:
    """What one rank resumes from in each of the folders ``cases``, and what is wrong there, as JSON."""
    for case in cases:
        problems = broken(root / case / RUN)
        training = Training()
        step = -1
        try:
            with training.checkpointer(root / case) as checkpointer:
                step = checkpointer.resume()
            problems += training.wrong(step)
        except Exception as error:  # what is judged may raise anything
            problems.append(f"{type(error).__name__}: {error}")
        print(json.dumps([case, step, problems]))


def go_on(root: Path, *, rank: int, meeting: str, cases: list[str]) -> None:
    """As `verify`, on two ranks, which save one step more."""
    meet(rank, meeting, 0)
    for case in cases:
        told = Told()
        logging.getLogger("distckpt").addHandler(told)
        training = Training(rank, WORLD_SIZE)
        problems: list[str] = []
        step = -1
        try:
            with training.checkpointer(root / case) as checkpointer:
                step = checkpointer.resume()
                problems += training.wrong(step)
                training.step()
                checkpointer.step()
                checkpointer.save(wait=True)
            if rank == 0:  # others may have closed it before the leader has deleted what it does
                problems += leftovers(root / case / RUN)
        except Exception as error:  # what is judged may raise anything
            problems.append(f"{type(error).__name__}: {error}")
        logging.getLogger("distckpt").removeHandler(told)
        print(json.dumps([case, step, problems + told.warnings]))


def broken(run: Path) -> list[str]:
    """Files of committed checkpoints that are not what was committed. There is no moment at which there may be one."""
    store = LocalStore(run)
    listing = scan(store)
    found = [str(error) for error in listing.unreadable.values()]
    for record in listing.records:
        try:
            manifest = read_manifest(store, record)
            found += [
                f"{record.name}/{one.path} is not whole"
                for one in manifest.files
                if not is_whole(run / record.name, one)
            ]
        except DistckptError as error:
            found.append(f"record without its content: {error}")
    return found


def is_whole(folder: Path, entry: FileEntry) -> bool:
    try:
        data = (folder / entry.path).read_bytes()
        blocks = [data]
        if entry.digests:
            size = json.loads((folder / entry.digests).read_bytes())["block_bytes"]
            blocks = [data[at : at + size] for at in range(0, len(data), size)]
    except (OSError, ValueError):
        return False
    digests = [xxhash.xxh3_128_digest(block) for block in blocks]
    digest = xxhash.xxh3_128_digest(b"".join(digests)) if entry.digests else digests[0]
    return len(data) == entry.size_bytes and digest.hex() == entry.xxh3_128

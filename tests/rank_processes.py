"""Ranks that are real processes over gloo, forked so that they cost a tenth of a second."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DDP imports it: once here, and not in each forked rank
import torch.distributed as dist

# c10d asks for the name of each address that connects, for its log: where an answer is lost, that takes 5 s.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

# A forked child of a process whose OpenMP pool has started hangs in its first parallel region.
torch.set_num_threads(1)


class RankProcesses:
    """Runs a function on N forked gloo ranks, and knows how each ended."""

    def __call__(
        self, world_size: int, work: Callable[..., Any], *args: Any, seconds: float = 60.0, lost: Collection[int] = ()
    ) -> list[Any]:
        """What ``work(rank, *args)`` returned on each rank; a rank that raised, died or hangs fails the test.

        The ranks in ``lost`` are expected to; their result is None, and while others go on nobody waits
        for them. Each of the others is there until all of them have returned: its process may have the store
        that they use.
        """
        context = multiprocessing.get_context("fork")
        with tempfile.TemporaryDirectory() as folder:
            pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
            writers = [writer for _, writer in pipes]
            stay = os.pipe()
            ranks = [
                context.Process(target=_run, args=(rank, world_size, folder, writers, stay, rank in lost, work, args))
                for rank in range(world_size)
            ]
            for rank in ranks:
                rank.start()
            for writer in writers:
                writer.close()
            told: dict[int, Any] = {}
            try:
                deadline = time.monotonic() + seconds
                for nth, (reader, _) in enumerate(pipes):
                    if nth not in lost:
                        told[nth] = _receive(reader, deadline)
            finally:
                for end in stay:
                    os.close(end)
                for nth, rank in enumerate(ranks):
                    goes = told[nth][0] != "hangs" if nth in told else len(lost) == world_size
                    rank.join(30 if goes else 0)
                    rank.kill()
                    rank.join()
        failed = {rank: words for rank, (ending, words) in told.items() if ending != "returned"}
        assert not failed, "\n".join(f"rank {rank}: {words}" for rank, words in failed.items())
        return [told[rank][1] if rank in told else None for rank in range(world_size)]


def _receive(reader: Connection, deadline: float) -> Any:
    try:
        if not reader.poll(max(0.0, deadline - time.monotonic())):
            return ("hangs", "did not end in time")
        return reader.recv()
    except EOFError:
        return ("died", "without a word")


def _run(
    rank: int,
    world_size: int,
    folder: str,
    writers: list[Connection],
    stay: tuple[int, int],
    is_lost: bool,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.close(stay[1])  # the parent alone has it, and closes it when all have told
    for one in writers[:rank] + writers[rank + 1 :]:
        one.close()  # so that the end of a rank that died is seen while others are there
    writer = writers[rank]
    try:
        store = meet(rank, world_size, Path(folder) / "port")
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
        told = ("returned", work(rank, *args))
    except BaseException as error:  # told to the test, which judges it
        told = ("raised", "".join(traceback.format_exception(error)))
    writer.send(told)
    writer.close()
    if told[0] == "returned" and not is_lost:  # who raised goes at once, so that others need not wait in vain
        os.read(stay[0], 1)
    os._exit(0)  # without the parent's exit handlers


def meet(rank: int, world_size: int, place: Path, *, host: int = 0) -> dist.TCPStore:
    """The store of the ranks, in the process of ``host``, which tells its port in the new file ``place``."""
    if rank == host:
        store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
        draft = place.with_suffix(".draft")
        draft.write_text(str(store.port))
        draft.rename(place)
        return store
    while not place.exists():
        time.sleep(0.002)
    return dist.TCPStore("127.0.0.1", int(place.read_text()), world_size, is_master=False)

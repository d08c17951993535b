"""What a save and a restore by several ranks cost: distckpt, torch.distributed.checkpoint, and the raw disk, in turns.

Every rank is a process over gloo and holds its part of the workload's state: cut by FSDP2, or all of it as under DDP.
All contenders save in turns, in an order that is shuffled in each round, and the first round is not counted. Then
another number of ranks restores what was saved, from the disk, with none of it in the page cache, into a model and an
optimizer that has no state yet, as after a restart. What was restored is compared with what was saved, untimed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import proc
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import workloads
from command_line import counted, tell
from figures import figure, ratio
from files import drop_from_cache
from floor import Floor
from reporting import table
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import distckpt

OURS, RECYCLED, RAW = "distckpt", "distckpt_recycled", "raw"
CUTS = ("fsdp", "ddp")


class Contender(Protocol):
    """Saves and restores the state of one rank, together with the others."""

    def clear(self) -> None:
        """What it saved before is gone, untimed."""

    def save(self, step: int) -> None:
        """On return training may go on."""

    def wait(self) -> None:
        """On return the save is durable."""

    def restore(self, step: int) -> None:
        """The state is what was saved at ``step``."""


class Ours:
    """With ``recycle`` it deletes what it saved before by itself, in the time that is measured, and writes over it."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, recycle: bool) -> None:
        self._folder = folder
        self._recycle = recycle
        self._checkpointer = distckpt.Checkpointer(
            folder,
            {"model": model, "optimizer": optimizer},
            format="sharded",
            snapshot="eager",
            save_last=False,
            max_keep_ckpts=1 if recycle else -1,
            recycle=recycle,
        )

    def clear(self) -> None:
        dist.barrier()
        for record in self._folder.glob("*.committed") if dist.get_rank() == 0 and not self._recycle else ():
            record.unlink()
            shutil.rmtree(record.with_suffix(""))

    def save(self, step: int) -> None:
        self._checkpointer.step()
        self._checkpointer.save()

    def wait(self) -> None:
        self._checkpointer.wait()

    def restore(self, step: int) -> None:
        self._checkpointer.resume()

    def close(self) -> None:
        """Its threads have ended before the process does."""
        self._checkpointer.close()


class Dcp:
    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, threads: int) -> None:
        self._folder, self._threads = folder, threads
        self._model, self._optimizer = model, optimizer

    def clear(self) -> None:
        dist.barrier()
        for folder in self._folder.iterdir() if dist.get_rank() == 0 else ():
            shutil.rmtree(folder)

    def _state(self) -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(self._model, self._optimizer)
        return {"model": model_state, "optimizer": optimizer_state}

    def save(self, step: int) -> None:
        writer = dcp.FileSystemWriter(self._folder / str(step), thread_count=self._threads)
        dcp.save(self._state(), storage_writer=writer)

    def wait(self) -> None:
        pass

    def restore(self, step: int) -> None:
        state = self._state()
        dcp.load(state, checkpoint_id=self._folder / str(step))
        set_state_dict(
            self._model, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )


class Raw:
    """As many bytes past the page cache as a rank's part has."""

    def __init__(self, folder: Path, part_bytes: int) -> None:
        folder = folder / str(dist.get_rank())
        folder.mkdir(exist_ok=True)
        self._floor = Floor(folder, part_bytes)
        self._folder = folder

    def clear(self) -> None:
        for file in self._folder.iterdir():
            file.unlink()

    def save(self, step: int) -> None:
        self._floor.write()

    def wait(self) -> None:
        pass

    def restore(self, step: int) -> None:
        self._floor.read()


def contenders(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, part: int) -> dict[str, Contender]:
    made: dict[str, Callable[[Path], Contender]] = {
        RAW: lambda place: Raw(place, part),
        OURS: lambda place: Ours(place, model, optimizer, recycle=False),
        RECYCLED: lambda place: Ours(place, model, optimizer, recycle=True),
        **{f"dcp_{n}_threads": lambda place, n=n: Dcp(place, model, optimizer, n) for n in (1, 2, 4)},
    }
    for name in made:
        (folder / name).mkdir(exist_ok=True)
    return {name: make(folder / name) for name, make in made.items()}


def trained(workload: str, cut: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer as after a step, with the same numbers however they are cut."""
    loaded = workloads.load(workload)
    model = loaded.model
    if cut == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for parameter in model.parameters():
        for nth, moment in enumerate(moments_of(optimizer, parameter), start=2):
            moment.copy_(parameter.detach() * nth)
    return model, optimizer


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    return [one for one in optimizer.state[parameter].values() if one.shape == parameter.shape]


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What this rank has of them."""
    parameters = list(model.parameters())
    held = [*parameters, *(moment for one in parameters for moment in moments_of(optimizer, one))]
    return [local(one.detach()) for one in held]


def on_all(work: Callable[[], object]) -> float:
    """How long it takes until the last rank has done it, from a moment at which all are ready."""
    dist.barrier()
    start = time.perf_counter()
    work()
    taken = [0.0] * dist.get_world_size()
    dist.all_gather_object(taken, time.perf_counter() - start)
    return max(taken)


def foreign_share(before: proc.Used) -> float:
    """How much of a core others had since then, but for the other ranks."""
    used = proc.used().since(before)
    told = [0.0] * dist.get_world_size()
    dist.all_gather_object(told, used.cpu_seconds)
    return max(used.foreign_seconds - sum(told) + used.cpu_seconds, 0.0) / used.wall_seconds


def save_job(rank: int, asked: argparse.Namespace, folder: Path) -> None:
    with job("save", rank, asked.ranks, folder) as say:
        model, optimizer = trained(asked.workload, asked.cut)
        held = sum(one.nbytes for one in tensors_of(model, optimizer))
        part = held if asked.cut == "fsdp" else held // asked.ranks
        running = contenders(folder, model, optimizer, part)
        shuffled = random.Random(0).sample
        for step in range(1, asked.rounds + 2):
            for name in shuffled(list(running), len(running)):
                one = running[name]
                one.clear()
                before = proc.used()
                blocked = on_all(partial(one.save, step))
                durable = blocked + on_all(one.wait)
                foreign = foreign_share(before)
                told = {"name": name, "blocked": blocked, "durable": durable}
                say({**told, "foreign_share": foreign, "is_first": step == 1, "part_bytes": part})
        close(running)


def restore_job(rank: int, asked: argparse.Namespace, folder: Path) -> None:
    with job("restore", rank, asked.restore_ranks, folder) as say:
        model, optimizer = trained(asked.workload, asked.cut)
        expected = [one.clone() for one in tensors_of(model, optimizer)]
        held = sum(one.nbytes for one in expected)
        running = contenders(folder, model, optimizer, held if asked.cut == "fsdp" else held // asked.restore_ranks)
        if isinstance(raw := running[RAW], Raw):
            raw.save(0)
        shuffled = random.Random(1).sample
        for number in range(asked.rounds + 1):
            for name in shuffled(list(running), len(running)):
                for tensor in model.parameters():
                    tensor.data.zero_()
                optimizer.state.clear()
                if rank == 0:
                    drop_from_cache(folder / name)
                before = proc.used()
                seconds = on_all(partial(running[name].restore, asked.rounds + 1))
                foreign = foreign_share(before)
                if name != RAW and not all(map(torch.equal, tensors_of(model, optimizer), expected)):
                    raise ValueError(f"what {name} restored on rank {rank} is not what it saved")
                say({"name": name, "restored": seconds, "foreign_share": foreign, "is_first": number == 0})
        close(running)


def close(running: Mapping[str, Contender]) -> None:
    for one in running.values():
        if isinstance(one, Ours):
            one.close()


class job:
    """A rank of a job; what it says is kept on rank 0."""

    def __init__(self, kind: str, rank: int, world_size: int, folder: Path) -> None:
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // world_size, 1))
        meeting = folder / f"meeting-{kind}"
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
        self._said = (folder / "said.jsonl").open("a") if rank == 0 else None

    def __enter__(self) -> Callable[[Mapping[str, Any]], None]:
        return self._say

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()

    def _say(self, told: Mapping[str, Any]) -> None:
        if self._said is not None:
            print(json.dumps(told), file=self._said, flush=True)
            tell(json.dumps(told))


def text(asked: argparse.Namespace, samples: list[dict[str, Any]]) -> str:
    kept = [one for one in samples if not one["is_first"] and one["foreign_share"] <= asked.foreign_percent / 100]
    names = dict.fromkeys(one["name"] for one in samples)
    of = {
        name: {
            key: figure(one[key] for one in kept if one["name"] == name and key in one)
            for key in ("blocked", "durable", "restored")
        }
        for name in names
    }
    total = next(one["part_bytes"] for one in samples) * asked.ranks / 1e9
    rows = []
    for name, one in of.items():
        durable = one["durable"]
        rate = f"{total / durable.median:.2f}" if durable else "-"
        told = [str(one[key] or "-") for key in ("blocked", "durable", "restored")]
        against = [ratio(of[OURS][key], one[key]) if name != OURS else "" for key in ("durable", "restored")]
        rows.append([name, *told, rate, *against])
    columns = [
        *("contender", "blocked s", "durable s", "restored s", "durable GB/s"),
        *("distckpt's durable against it", "restored"),
    ]
    head = (
        f"{workloads.about(asked.workload)} {total:.2f} GB, cut as by {asked.cut}; {asked.ranks} ranks save, "
        f"{asked.restore_ranks} restore, on {len(os.sched_getaffinity(0))} cores; {len(kept)} of {len(samples)} "
        "samples counted: not the first round, nor where others had a core."
    )
    return f"{head}\n\n{table(columns, rows)}\n\nSeconds until the last rank was done; medians (quartiles)."


def main() -> int:
    called = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    called.add_argument("--workload", choices=workloads.names(), default="gpt2")
    called.add_argument("--cut", choices=CUTS, default="fsdp", help="how the state lies on the ranks (fsdp)")
    called.add_argument("--ranks", type=counted, default=2, help="that save (2)")
    called.add_argument("--restore-ranks", type=counted, default=3, help="that restore (3)")
    called.add_argument("--rounds", type=counted, default=10, help="counted saves and restores of each (10)")
    called.add_argument("--foreign-percent", type=float, default=10, help="see training_loop.py (10)")
    called.add_argument("--dir", type=Path, help="where to save (the temporary folder)")
    called.add_argument("--json", type=Path, metavar="FILE", help="all samples as JSON")
    asked = called.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=asked.dir) as name:
        folder = Path(name).resolve()
        for work, ranks in ((save_job, asked.ranks), (restore_job, asked.restore_ranks)):
            torch.multiprocessing.start_processes(work, (asked, folder), nprocs=ranks, start_method="spawn")
        samples = [json.loads(line) for line in (folder / "said.jsonl").read_text().splitlines()]
    print(text(asked, samples))
    if asked.json:
        asked.json.write_text(json.dumps({"samples": samples}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

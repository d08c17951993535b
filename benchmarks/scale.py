"""What it costs to plan, agree on and commit a sharded save, and to plan a restore from it, for far more ranks than
there are machines here.

The code is what runs; see `scaling` for what stands for the ranks. No byte of a tensor is there. Beside it stock DCP
plans the same, where that ends in time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from command_line import counted, tell
from reporting import table
from scaling.agreeing import agreed
from scaling.cost import apart, growth
from scaling.jobs import STATES
from scaling.later import seen
from scaling.planning import planned
from scaling.stock import planned_by_stock

PARTS = ("planning", "agreeing", "later")
PLANNED = (
    *product(["fsdp"], [8, 64, 1024, 4096, 16384], [10_000]),
    *product(["fsdp"], [8, 64, 1024], [1_000]),
    ("fsdp", 1024, 50_000),
    *product(["ddp", "hsdp", "2d"], [64, 1024, 16384], [10_000]),
    *product(["different"], [64, 1024], [10_000]),
)
AGREED = (*product(["fsdp"], [8, 64, 1024, 4096, 16384], [10_000]), ("hsdp", 16384, 10_000))
# More of them take stock DCP longer than anybody waits for.
STOCK_ITEMS = 100_000


def measured(parts: Sequence[str], asked: argparse.Namespace) -> dict[str, Any]:
    """All figures of these parts."""
    series = [*product(asked.states, asked.ranks, asked.tensors)] if asked.states else None
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "stock": [], "agreed": [], "later": []}
    for state, ranks, tensors in (series or PLANNED) if "planning" in parts else ():
        found["ours"].append(apart(planned, state, ranks, tensors))
        tell(f"{state}, {ranks} ranks, {tensors} tensors: {found['ours'][-1]['leader_seconds']:.3f} s of the leader")
        if ranks * tensors <= STOCK_ITEMS:
            found["stock"].append(apart(planned_by_stock, state, ranks, tensors))
    for state, ranks, tensors in (series or AGREED) if "agreeing" in parts else ():
        found["agreed"].append(apart(agreed, state, ranks, tensors))
        tell(f"{state}, {ranks} ranks: a save takes {found['agreed'][-1]['save_seconds']:.3f} s of rank 0 to agree on")
    for kind, tensors in product(["DTensors", "plain tensors"], asked.tensors) if "later" in parts else ():
        found["later"].append(apart(seen, kind, tensors))
        tell(f"{tensors} {kind}: {found['later'][-1]['see_seconds'] * 1e3:.1f} ms to see them again")
    rates = {"growth": growth(found["ours"], "leader_seconds"), "save_growth": growth(found["agreed"], "save_seconds")}
    return {**found, **rates}


def text(result: Mapping[str, Any]) -> str:
    """The result as people read it."""
    head = (
        f"Real code; the ranks are objects. CPU-seconds, one run each, torch {result['torch']}, Python "
        f"{result['python']}, {result['cores']} cores, load average {result['load_average'][0]:.2f} before, "
        f"{result['load_average'][1]:.2f} after."
    )
    tables = [*_planning(result), *_agreeing(result), *_later(result)]
    return "\n\n".join([head, "\n".join(f"- {name}: {about}" for name, (about, _) in STATES.items()), *tables])


def _planning(result: Mapping[str, Any]) -> list[str]:
    about = (
        "Plan, and plan of a restore on half as many ranks: the ranks are asked one after another, and no byte goes "
        "through a store. What a rank holds is made by `boxes_at`, not read off DTensors."
    )
    columns = [
        *("state", "ranks", "tensors", "layouts", "leader s", "parse + plan + answer s", "gathered MB", "answer kB"),
        *("peak MB", "balance", "tell ms", "parts ms", "manifest MB", "written s", "read s", "restore ms", "reads"),
    ]
    rows = [
        [
            *(one["state"], f"{one['ranks']:,}", f"{one['tensors']:,}", f"{one['layouts']:,}"),
            *(f"{one['leader_seconds']:.3f}", " + ".join(f"{part:.3f}" for part in one["leader"].values())),
            *(f"{one['told_bytes'] / 1e6:.2f}", f"{one['answer_bytes'] / 1e3:.1f}"),
            *(f"{one['peak_memory_bytes'] / 1e6:.0f}", f"{one['balance']:.4f}" if one["balance"] else "-"),
            *(f"{one['tell_seconds'] * 1e3:.1f}", f"{one['parts_seconds'] * 1e3:.1f}"),
            *(f"{one['manifest_bytes'] / 1e6:.2f}", f"{one['manifest_write_seconds']:.3f}"),
            *(f"{one['manifest_read_seconds']:.3f}", f"{one['restore_seconds'] * 1e3:.1f}", f"{one['reads']:,}"),
        ]
        for one in result["ours"]
    ]
    stock_columns = ["stock DCP", "ranks", "tensors", "leader s", "gathered MB", "scattered MB", ".metadata MB"]
    stock_rows = [
        [
            *(one["state"], f"{one['ranks']:,}", f"{one['tensors']:,}", f"{one['leader_seconds']:.3f}"),
            *(f"{one[key] / 1e6:.2f}" for key in ("told_bytes", "answer_bytes", "manifest_bytes")),
        ]
        for one in result["stock"]
    ]
    told = [about, table(columns, rows), *_rates(result["growth"], "the leader's CPU time for a plan")] if rows else []
    return [*told, table(stock_columns, stock_rows)] if stock_rows else told


def _agreeing(result: Mapping[str, Any]) -> list[str]:
    about = (
        "Agreement and commit: the leader is a process with a TCPStore of torch, which is real like `plan`, `save` and "
        "the directory; the other ranks are objects in another process, which share 16 connections and come one after "
        "another. CPU of rank 0 is that of the thread that leads, and of those of the store; bytes are what all others "
        "told and heard. A rank's own is what it pays for agreeing on a save. A look in vain is what those who wait "
        "cost: of those who only listen, so many a second."
    )
    columns = [
        *("state", "ranks", "tensors", "plan: rank 0 s", "told + heard MB", "save: rank 0 s", "told + heard MB"),
        *("a rank's own ms", "more memory MB", "a look in vain us", "looks a second", "of a core"),
    ]
    rows = [
        [
            *(one["state"], f"{one['ranks']:,}", f"{one['tensors']:,}"),
            *(cell for part in ("plan", "save") for cell in _agreed(one[part])),
            *(f"{one['save']['rank_seconds'] * 1e3:.2f}", f"{one['more_memory_bytes'] / 1e6:.0f}"),
            *(f"{one['look_seconds'] * 1e6:.1f}", f"{one['idle_looks_per_second']:,.0f}"),
            f"{one['look_seconds'] * one['idle_looks_per_second']:.1%}",
        ]
        for one in result["agreed"]
    ]
    rates = _rates(result["save_growth"], "rank 0's CPU time for agreeing on a save")
    return [about, table(columns, rows), *rates] if rows else []


def _agreed(cost: Mapping[str, float]) -> list[str]:
    return [
        f"{cost['leader_seconds']:.3f} + {cost['store_seconds']:.3f}",
        f"{cost['said_bytes'] / 1e6:.2f} + {cost['heard_bytes'] / 1e6:.2f}",
    ]


def _later(result: Mapping[str, Any]) -> list[str]:
    about = (
        "A later save of the same state: what it costs a rank to see that it is the one that was planned, and what of "
        "that is the comparison of types, shapes and placements that were read off; and to lay out its files, in which "
        "the first is. One rank of 1,024 with DTensors, or one alone. No rank is asked: 0 collectives, 0 words. The "
        "median of 21."
    )
    columns = ["tensors", "", "see that it is the same ms", "of which comparing ms", "lay out all files ms"]
    rows = [
        [
            *(f"{one['tensors']:,}", one["kind"], f"{one['see_seconds'] * 1e3:.1f}"),
            *(f"{one['compare_seconds'] * 1e3:.2f}", f"{one['lay_out_seconds'] * 1e3:.1f}"),
        ]
        for one in result["later"]
    ]
    return [about, table(columns, rows)] if rows else []


def _rates(found: Sequence[Mapping[str, Any]], what: str) -> list[str]:
    told = [
        f"- {one['state']}, {one['tensors']:,} tensors: from {one['from_ranks']:,} to {one['to_ranks']:,} ranks {what} "
        f"grows as ranks^{one['exponent']:.2f}"
        for one in found
    ]
    return ["\n".join(told)] if told else []


def main() -> int:
    """0 when all was measured, 2 when called wrongly."""
    called = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    called.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts")
    called.add_argument("--states", nargs="+", choices=STATES, help="these, each with all --ranks and --tensors")
    called.add_argument("--ranks", nargs="+", type=counted, default=[8, 1024], help="with --states (8 1024)")
    called.add_argument("--tensors", nargs="+", type=counted, default=[10_000], help="(10000)")
    called.add_argument("--json", type=Path, metavar="FILE", help="all figures as JSON")
    asked = called.parse_args()
    if asked.json and not asked.json.parent.is_dir():
        called.error(f"{asked.json.parent} is not a directory")
    if "agreeing" in asked.only and min(asked.ranks) < 2:
        called.error("one rank has nobody to agree with")
    load_before = os.getloadavg()[0]
    figures = measured(asked.only, asked)
    result = {
        "benchmark": "scale",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [load_before, os.getloadavg()[0]],
        **figures,
    }
    print(text(result))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

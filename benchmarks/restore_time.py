"""How long it takes to restore a training state into a model and an optimizer that exist, of distckpt and others.

Each contender lives in a process of its own with the same workload, has saved once, and restores in turns, in an order
that is shuffled in each round: from the disk, with none of its files in the page cache, and from the page cache. All
tensors are zeroed before and compared with what was saved after, untimed. The first round is told apart.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping
from dataclasses import asdict
from statistics import median
from typing import Any

import command_line
from command_line import counted, its_own, tell
from contenders import REFERENCE
from figures import Figure, figure, ratio, undisturbed
from loop_report import cell, floor_lines, floor_of
from picture import OURS, Panel
from reporting import abouts, setting, table
from running import Running, Stage, batches, needed_bytes, started

MAIN = (REFERENCE, "torch_load_mmap", "distckpt_eager", "safetensors_fsync", "dcp_save", "torchsnapshot_async")
KINDS = ("cold", "warm")
# A restore from the disk of which more than this share of the pages was in the page cache is none.
CACHED_LIMIT = 0.02
WORDS = (
    "Times stand on the clock, as medians (quartiles), CPU on CPU-seconds. Distckpt compares all bytes with their "
    "checksums meanwhile; none of the others does. Cold: fsynced, dropped from the page cache, and looked for there; a "
    "restore that found more than 2 % of its pages is thrown away. The disk may have a cache of its own. A ratio is "
    "told where two figures differ by more than either's quartiles do."
)


def measure(stage: Stage, asked: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """All restores of all contenders. The reference takes part in all batches."""
    measured: dict[str, Any] = {}
    floors: list[dict[str, Any]] = []
    with stage.contenders([REFERENCE]) as reference:
        told = started(stage, REFERENCE)
        with stage.floor(told["state_bytes"]) as floor:
            # What is loaded lies beside the state for a moment, in one process at a time.
            budget = asked.memory_gb * 1e9 - told["state_bytes"]
            for batch in batches(names, lambda name: needed_bytes(name, told), budget):
                with stage.contenders(batch) as others:
                    running = {**reference, **others}
                    restored = rounds(stage, running, floor, asked.rounds, floors)
                for name in running:
                    measured.setdefault(name, its_own(stage, name) | {"restores": []})["restores"] += restored[name]
    return {
        "benchmark": "restore_time",
        "rounds": asked.rounds,
        "foreign_limit": asked.foreign_percent / 100,
        "floor": floors,
        "contenders": {name: one for name, one in measured.items() if name not in stage.failures},
    }


def rounds(
    stage: Stage, running: Mapping[str, Running], floor: Running, count: int, floors: list[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """All restores of a batch."""
    restored: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    shuffled = random.Random(0).sample
    for name, one in running.items():
        with stage.noted(name):
            one.ask(do="alone")
    for number in range(count + 1):
        first = {} if number else {"is_first": True}
        for name in shuffled(list(running), len(running)):
            for kind in KINDS:
                if name not in stage.failures:
                    with stage.noted(name):
                        told = running[name].ask(do="restore", cold=kind == "cold")
                        restored[name].append(told | {"kind": kind} | first)
        if "floor" not in stage.failures:
            with stage.noted("floor"):
                floors.append(floor.ask(do="measure") | first)
        started(stage, REFERENCE)
        tell(f"{', '.join(running)}: {f'round {number} of {count}' if number else 'first round'}")
    return restored


def figures_of(result: Mapping[str, Any], name: str) -> dict[str, Figure | None]:
    """Seconds and CPU-seconds of a restore, cold and warm."""
    told: dict[str, Figure | None] = {}
    restores = undisturbed(result["contenders"][name]["restores"], result["foreign_limit"])
    for kind in KINDS:
        kept = [one for one in restores if one["kind"] == kind and "is_first" not in one]
        if kind == "cold":
            kept = [one for one in kept if one["cached_share"] <= CACHED_LIMIT]
        told |= {kind: figure(one["seconds"] for one in kept), f"{kind} CPU": figure(one["cpu"] for one in kept)}
    return told


def text(result: dict[str, Any]) -> str:
    """The result as people read it. What it amounts to is added to it, for those who read the JSON."""
    told = {name: figures_of(result, name) for name in result["contenders"]}
    columns = ["contender", "cold s", "GB/s", "of the raw read", "cold CPU s/GB", "warm s", "GB/s", "warm CPU s/GB"]
    size, raw = result["state_bytes"] / 1e9, floor_of(result).get("direct_read")
    rows = []
    for name, of in told.items():
        result["contenders"][name]["figures"] = {key: asdict(one) if one else None for key, one in of.items()}
        against_raw = f"{raw.median / of['cold'].median:.0%}" if raw and of["cold"] else "-"
        cold = [cell(of["cold"]), rate(size, of["cold"]), against_raw, per_gb(of["cold CPU"], size)]
        rows.append([name, *cold, cell(of["warm"]), rate(size, of["warm"]), per_gb(of["warm CPU"], size)])
    foreign = [one["foreign_share"] for each in result["contenders"].values() for one in each["restores"]]
    thrown = sum(share > result["foreign_limit"] for share in foreign)
    head = (
        f"{setting(result)} {result['rounds']} restores of each kind in turns. Others had "
        f"{median(foreign) if foreign else 0:.0%} of a core meanwhile (median); {thrown} of {len(foreign)} restores "
        f"were thrown away, as others had more than {result['foreign_limit']:.0%}."
    )
    parts = (head, table(columns, rows), "\n".join(floor_lines(result)), WORDS, comparisons(result, told))
    return "\n\n".join(part for part in (*parts, abouts(result)) if part)


def panels(result: Mapping[str, Any]) -> list[Panel]:
    """What the picture shows."""
    told = {name: figures_of(result, name) for name in result["contenders"]}
    of = {kind: {name: one[kind] for name, one in told.items()} for kind in KINDS}
    raw = floor_of(result).get("direct_read")
    return [
        Panel("restored from the disk, s", of["cold"], raw, "the raw read of the same bytes"),
        Panel("restored from the page cache, s", of["warm"]),
    ]


def comparisons(result: Mapping[str, Any], told: Mapping[str, Mapping[str, Figure | None]]) -> str:
    """Each of ours against each of the others."""
    ours = [name for name, one in result["contenders"].items() if one["package"] == OURS]
    keys = [f"{kind}{what}" for kind in KINDS for what in ("", " CPU")]
    columns = ["against", *(f"{name}: {key}" for name in ours for key in keys)]
    rows = [
        [other, *(ratio(told[name][key], told[other][key]) for name in ours for key in keys)]
        for other in result["contenders"]
        if other not in ours
    ]
    return table(columns, rows) if ours and rows else ""


def rate(size_gb: float, one: Figure | None) -> str:
    return f"{size_gb / one.median:.2f}" if one else "-"


def per_gb(one: Figure | None, size_gb: float) -> str:
    return f"{one.median / size_gb:.2f}" if one else "-"


def main() -> int:
    """0 when every contender was measured, 1 when one failed, 2 when called wrongly."""
    called = command_line.parser(__doc__, MAIN)
    called.add_argument("--rounds", type=counted, default=10, help="counted restores of each kind (10)")
    return command_line.run(called, measure, text, panels)


if __name__ == "__main__":
    sys.exit(main())

"""What a save costs the training that it is made from: distckpt and others, on a real model, in one run.

Each contender lives in a process of its own with the same workload. They train and save in turns, in an order that is
shuffled in each round, so that what else happens on the machine meets all of them; the first round is told apart.
A turn is one step, a save, and the steps until that is done; the control's turns have no save. Every few rounds each
saves once while nothing is trained, which is how CPU, bytes, memory and the time until all is durable are measured.
Nothing here judges: figures of one run compare with one another, not with those of another machine.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping
from typing import Any

import command_line
import loop_report
from command_line import counted, its_own, tell
from contenders import REFERENCE
from loop_report import CONTROL
from running import Running, Stage, batches, needed_bytes, started

MAIN = ("torch_save_fsync", "distckpt_eager", "distckpt_lazy", "dcp_async_overlapped")
# In rounds with these distances each also saves alone.
ALONE_EVERY = 5
# Of the steps in a row: as many before and after those with a save as tell how long a step takes.
QUIET_STEPS = 10

Samples = dict[str, list[dict[str, Any]]]


def in_turns(stage: Stage, asked: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Turns of all contenders. The reference takes part in all batches, and gives the control its process."""
    measured: dict[str, Any] = {}
    floors: list[dict[str, Any]] = []
    controls: list[list[dict[str, Any]]] = []
    with stage.contenders([REFERENCE]) as reference:
        told = started(stage, REFERENCE)
        with stage.floor(told["state_bytes"]) as floor:
            found = batches(names, lambda name: needed_bytes(name, told), asked.memory_gb * 1e9)
            for number, batch in enumerate(found):
                tell(f"batch {number + 1} of {len(found)}: {', '.join((CONTROL, REFERENCE, *batch))}")
                with stage.contenders(batch) as others:
                    turns, alone = rounds(stage, {**reference, **others}, floor, asked)
                floors += alone.pop("floor")
                controls.append(turns.pop(CONTROL))
                for name in turns:
                    one = measured.setdefault(name, {**its_own(stage, name), "turns": [], "alone": [], "batches": []})
                    one["batches"].append(number)
                    one["turns"] += turns[name]
                    one["alone"] += alone[name]
    return {
        "benchmark": "training_loop",
        "every": asked.every,
        "saves": asked.saves,
        "foreign_limit": asked.foreign_percent / 100,
        "floor": floors,
        "controls": controls,
        "contenders": {name: one for name, one in measured.items() if name not in stage.failures},
    }


def rounds(
    stage: Stage, running: Mapping[str, Running], floor: Running, asked: argparse.Namespace
) -> tuple[Samples, Samples]:
    """All turns of a batch, and all saves that were made alone."""
    turns: Samples = {name: [] for name in (CONTROL, *running)}
    alone: Samples = {name: [] for name in ("floor", *running)}
    shuffled = random.Random(0).sample
    for number in range(asked.saves + 1):
        is_alone = number % ALONE_EVERY == 0 or number == asked.saves
        for name in shuffled(list(turns), len(turns)):
            one = running[REFERENCE if name == CONTROL else name]
            if one.name not in stage.failures:
                with stage.noted(one.name):
                    turns[name].append(one.ask(do="turn", before=1, after=asked.every - 1, saves=name != CONTROL))
                    if is_alone and name != CONTROL:
                        alone[name].append(one.ask(do="alone"))
        if is_alone and "floor" not in stage.failures:
            with stage.noted("floor"):
                alone["floor"].append(floor.ask(do="measure"))
        started(stage, REFERENCE)
        tell(f"round {number} of {asked.saves}" if number else "first round")
    # The first of all: cold memory, things that are made once.
    for one in (*turns.values(), *alone.values()):
        for sample in one[:1]:
            sample["is_first"] = True
    return turns, alone


def in_a_row(stage: Stage, asked: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """A save at every step, so many in a row, of one contender after the other."""
    rows: dict[str, Any] = {}
    for name in dict.fromkeys((REFERENCE, *names)):
        with stage.contenders([name]) as running:
            for one in running.values():
                tell(f"{name}: {asked.in_a_row} steps with a save at each")
                with stage.noted(name):
                    one.ask(do="alone")  # the first, which is not counted
                    row = one.ask(do="row", quiet=QUIET_STEPS, saves=asked.in_a_row)
                    rows[name] = its_own(stage, name) | {"row": row}
    limit = asked.foreign_percent / 100
    return {"benchmark": "in_a_row", "saves": asked.in_a_row, "foreign_limit": limit, "contenders": rows}


def steps(text: str) -> int:
    """A turn has a step before its save and one behind it."""
    if counted(text) < 2:
        raise argparse.ArgumentTypeError(f"should be at least 2, is {text!r}")
    return int(text)


def main() -> int:
    """0 when every contender was measured, 1 when one failed, 2 when called wrongly."""
    called = command_line.parser(__doc__, MAIN)
    called.add_argument("--saves", type=counted, default=20, help="counted saves of each contender (20)")
    called.add_argument("--every", type=steps, default=3, help="one save in so many steps, at least (3)")
    called.add_argument("--quick", action="store_true", help="3 saves of the workload tiny: to see that it runs")
    called.add_argument("--in-a-row", type=counted, metavar="N", help="instead: N steps with a save at each")
    if called.parse_args().quick:
        called.set_defaults(saves=3, workload="tiny")
    if called.parse_args().in_a_row:
        return command_line.run(called, in_a_row, loop_report.row_text, loop_report.row_panels)
    return command_line.run(called, in_turns, loop_report.text, loop_report.panels)


if __name__ == "__main__":
    sys.exit(main())

"""What the turns of a training loop amount to, as numbers and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from statistics import median
from typing import Any

from contenders import REFERENCE
from figures import (
    Figure,
    Sample,
    added,
    figure,
    quiet_step,
    ratio,
    slowdown,
    undisturbed,
    undisturbed_pairs,
)
from picture import OURS, Panel
from reporting import abouts, setting, table

CONTROL = "no_save"
COMPARED = {"added": "added", "durable": "durable", "cpu": "CPU"}
CLOCKS = (
    "`blocked`, `added` and `durable` stand on the clock, as medians (quartiles): other load makes them larger. `CPU` "
    "stands on CPU-seconds of the process and all its children, without the kernel's own threads, and memory and bytes "
    "on counts. `blocked` is the call and the wait before the optimizer's step. `added` is how much longer the steps "
    "from the save on took, until it was done, than they would have without. `durable` is until everything is fsynced "
    "while nothing is trained; what a contender does not fsync is fsynced for it. A ratio is told where two figures "
    "differ by more than either's quartiles do."
)


def counted(samples: Sequence[Sample]) -> list[Sample]:
    """All but the first of each batch."""
    return [one for one in samples if "is_first" not in one]


def figures_of(result: Mapping[str, Any], name: str) -> dict[str, Figure | None]:
    """The figures of a contender, in seconds; of the control, of its turns against themselves."""
    limit = result["foreign_limit"]
    if name == CONTROL:
        turns = control = undisturbed(chain(*map(counted, result["controls"])), limit)
        return {"added": figure(added(turns, control))}
    one = result["contenders"][name]
    controls = list(chain(*(counted(result["controls"][number]) for number in one["batches"])))
    turns, control = undisturbed_pairs(counted(one["turns"]), controls, limit)
    alone = undisturbed(counted(one["alone"]), limit)
    return {
        "blocked": figure(turn["call"] + turn["waited"] for turn in turns),
        "added": figure(added(turns, control)),
        "done": figure(turn["done_seconds"] for turn in turns),
        "durable": figure(save["durable"] for save in alone),
        "cpu": figure(save["cpu"] for save in alone),
    }


def floor_of(result: Mapping[str, Any]) -> dict[str, Figure | None]:
    """The figures of the floor, in seconds."""
    kept = undisturbed(counted(result["floor"]), result["foreign_limit"])
    return {key: figure(one[key] for one in kept) for key in (*(kept[0] if kept else ()),) if key != "foreign_share"}


def step_seconds(result: Mapping[str, Any]) -> float:
    """A step without a save, of the control, disturbed or not."""
    return quiet_step(chain(*result["controls"]))


def text(result: dict[str, Any]) -> str:
    """The result as people read it. What it amounts to is added to it, for those who read the JSON."""
    told = {name: figures_of(result, name) for name in (CONTROL, *result["contenders"])}
    for name, of in told.items():
        into = result if name == CONTROL else result["contenders"][name]
        into["figures"] = {key: asdict(one) if one else None for key, one in of.items()}
    parts = [
        f"{setting(result)} One save in {result['every']} steps or more, {result['saves']} of each in turns; a step "
        f"without takes {step_seconds(result):.3f} s. {disturbance(result)}",
        loop_table(result, told),
        "\n".join(floor_lines(result)),
        CLOCKS,
        comparisons(result, told),
        abouts(result),
    ]
    return "\n\n".join(part for part in parts if part)


def panels(result: Mapping[str, Any]) -> list[Panel]:
    """What the picture shows."""
    told = {name: figures_of(result, name) for name in result["contenders"]}
    raw = floor_of(result).get("direct_write")
    return [
        Panel("training time that a save adds, s", {name: of["added"] for name, of in told.items()}),
        Panel(
            "until it is durable, s",
            {name: of["durable"] for name, of in told.items()},
            raw,
            "the raw write of the same bytes",
        ),
    ]


def disturbance(result: Mapping[str, Any]) -> str:
    """How much of the machine others had, and what was thrown away for it."""
    turns = [turn for one in result["contenders"].values() for turn in counted(one["turns"])]
    if not turns:
        return "Nothing was measured."
    kept = sum(
        len(undisturbed_pairs(counted(one["turns"]), controls, result["foreign_limit"])[0])
        for one in result["contenders"].values()
        for controls in [list(chain(*(counted(result["controls"][number]) for number in one["batches"])))]
    )
    return (
        f"Others had {median(turn['foreign_share'] for turn in turns):.0%} of a core meanwhile (median); "
        f"{len(turns) - kept} of {len(turns)} turns were thrown away, as others had more than "
        f"{result['foreign_limit']:.0%} then or in the control's turn."
    )


def loop_table(result: Mapping[str, Any], told: Mapping[str, Mapping[str, Figure | None]]) -> str:
    """One row for the control and for each contender."""
    columns = ["contender", "blocked s", "added s", "of a step", "durable s", "of the raw write", "CPU s/GB"]
    columns += ["MB written", "peak extra memory, states", "first save alone s"]
    step, size = step_seconds(result), result["state_bytes"]
    raw = floor_of(result).get("direct_write")
    rows = [[CONTROL, "-", cell(told[CONTROL]["added"]), share(told[CONTROL]["added"], step), *["-"] * 6]]
    for name, one in result["contenders"].items():
        of, alone = told[name], one["alone"]
        rows.append(
            [
                name,
                cell(of["blocked"], digits=4),
                cell(of["added"]),
                share(of["added"], step),
                cell(of["durable"]),
                f"{raw.median / of['durable'].median:.0%}" if raw and of["durable"] else "-",
                f"{of['cpu'].median / size * 1e9:.2f}" if of["cpu"] else "-",
                f"{median(save['file_bytes'] for save in alone) / 1e6:.1f}" if alone else "-",
                memory_cell([save["peak_memory_bytes"] / size for save in alone[1:] or alone]),
                f"{alone[0]['durable']:.2f}" if alone else "-",
            ]
        )
    return table(columns, rows)


def memory_cell(states: Sequence[float]) -> str:
    """The first of them and the last, where they differ."""
    if not states:
        return "-"
    ends = [f"{one:.2f}" for one in (states[0], states[-1])]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def floor_lines(result: Mapping[str, Any]) -> list[str]:
    """What the same bytes cost when nothing else is done with them."""
    words = {
        "memcpy": "copy, one thread",
        "memcpy_2_threads": "copy, two threads",
        "direct_write": "raw O_DIRECT write into a new file, and fsync",
        "direct_read": "raw O_DIRECT read",
    }
    found = {words[key]: one for key, one in floor_of(result).items() if one}
    lines = [f"- {what}: {one} s, {result['state_bytes'] / one.median / 1e9:.1f} GB/s" for what, one in found.items()]
    return ["The floor, with the same bytes:", *lines] if lines else []


def comparisons(result: Mapping[str, Any], told: Mapping[str, Mapping[str, Figure | None]]) -> str:
    """Each of ours against each of the others."""
    ours = [name for name, one in result["contenders"].items() if one["package"] == OURS]
    others = [name for name in result["contenders"] if name not in ours]
    columns = ["against", *(f"{name}: {word}" for name in ours for word in COMPARED.values())]
    rows = [
        [other, *(ratio(told[name][key], told[other][key]) for name in ours for key in COMPARED)] for other in others
    ]
    return table(columns, rows) if ours and others else ""


def row_text(result: dict[str, Any]) -> str:
    """A save at every step, as people read it."""
    columns = ["contender", "training slower by", "step with s", "step without s", "blocked s"]
    columns += ["extra memory at the first and last saves, states", "others had, of a core"]
    rows = []
    for name, one in result["contenders"].items():
        row = one["row"]
        slow, blocked, memory = slowdown(row), figure(row["blocked"]), row["memory_bytes"]
        one["figures"] = {"slowdown": asdict(slow), "blocked": asdict(blocked)} if blocked else {}
        tenth = max(1, len(memory) // 10)
        ends = [max(part) / result["state_bytes"] for part in (memory[:tenth], memory[-tenth:])]
        rows.append(
            [
                name,
                f"{slow.median:.1%} ({slow.low:.1%}..{slow.high:.1%})",
                f"{sum(row['steps']) / len(row['steps']):.3f}",
                f"{median(row['quiet_before'] + row['quiet_after']):.3f}",
                cell(blocked, digits=4),
                f"{ends[0]:.2f}, {ends[1]:.2f}",
                f"{row['foreign_share']:.0%}{' (too much)' if row['foreign_share'] > result['foreign_limit'] else ''}",
            ]
        )
    words = "All of it stands on the clock. The range is against the steps before and against those after."
    told = {name: slowdown(one["row"]) for name, one in result["contenders"].items()}
    lines = [
        f"- {name} against {REFERENCE}: {ratio(told[name], told[REFERENCE])}"
        for name, one in result["contenders"].items()
        if one["package"] == OURS and REFERENCE in told
    ]
    head = f"{setting(result)} {result['saves']} steps in a row with a save at each."
    return "\n\n".join(part for part in (head, table(columns, rows), words, "\n".join(lines), abouts(result)) if part)


def row_panels(result: Mapping[str, Any]) -> list[Panel]:
    """What the picture of a save at every step shows."""
    slower = {name: slowdown(one["row"]) for name, one in result["contenders"].items()}
    return [Panel("training with a save at every step is slower by, times", slower)]


def cell(one: Figure | None, digits: int = 3) -> str:
    """The median and the quartiles."""
    if one is None:
        return "-"
    return f"{one.median:.{digits}f} ({one.low:.{digits}f}..{one.high:.{digits}f})"


def share(one: Figure | None, step: float) -> str:
    """Of a step."""
    return f"{one.median / step:.0%}" if one else "-"

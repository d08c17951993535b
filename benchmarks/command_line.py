"""What the benchmarks have in common when they are called: words, where to save, in what circumstances, the result."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import contenders
import picture
import proc
import workloads
from running import ContenderFailed, Stage

# The share of the memory that is free which contenders may take together; files are cached in the rest.
MEMORY_SHARE = 0.6
SAME_FOR_ALL = ("state_bytes", "tensors", "torch", "threads")
ITS_OWN = ("about", "package", "version")

Measure = Callable[[Stage, argparse.Namespace, list[str]], dict[str, Any]]


def parser(description: str | None, default: Sequence[str]) -> argparse.ArgumentParser:
    """The words that every benchmark takes; ``default`` are its contenders."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--workload", choices=workloads.names(), default="gpt2", help="what is trained (gpt2)")
    made.add_argument("--only", nargs="+", metavar="NAME", choices=contenders.names(), help="these contenders")
    made.add_argument("--all", action="store_true", help=f"all contenders, not only {', '.join(default)}")
    made.add_argument("--dir", type=Path, help="where to save: what is measured is its disk (the temporary folder)")
    made.add_argument("--memory-gb", type=float, help="what all contenders may take together (60 %% of what is free)")
    made.add_argument(
        "--foreign-percent",
        type=float,
        default=10,
        help="a sample during which others used more of a core than this is thrown away (10)",
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="all samples as JSON")
    made.add_argument("--png", type=Path, metavar="FILE", help="the figures as a picture")
    made.set_defaults(default=default)
    return made


def counted(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a whole number of at least 1, is {text!r}")
    return int(text)


def run(
    called: argparse.ArgumentParser,
    measure: Measure,
    report: Callable[[dict[str, Any]], str],
    panels: Callable[[dict[str, Any]], list[picture.Panel]],
) -> int:
    """Measure, and tell the result: 0 when every contender was measured or is not installed, 1 when one failed."""
    asked = called.parse_args()
    for folder in (asked.dir, asked.json and asked.json.parent, asked.png and asked.png.parent):
        if folder is not None and not folder.is_dir():
            called.error(f"{folder} is not a directory")
    # What was saved is gigabytes: it is removed when this is told to end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    names = contenders.names() if asked.all else list(asked.only or asked.default)
    if asked.memory_gb is None:
        asked.memory_gb = MEMORY_SHARE * proc.free_memory_bytes() / 1e9
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=asked.dir) as folder:
        stage = Stage(asked.workload, Path(folder).resolve())
        try:
            result = circumstances(stage, lambda: measure(stage, asked, names))
        except ContenderFailed as error:
            print(f"the reference failed: {error}", file=sys.stderr)
            return 1
    print(report(result))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    if asked.png:
        picture.draw(result, panels(result), asked.png)
    return 1 if result["failures"] else 0


def circumstances(stage: Stage, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, and in what circumstances."""
    load_before = os.getloadavg()[0]
    measured = measure()
    told = next(iter(stage.told.values()), {})
    return {
        "workload": stage.workload,
        "about_workload": workloads.about(stage.workload),
        **{key: told[key] for key in SAME_FOR_ALL if key in told},
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "file_system": proc.file_system_of(stage.directory),
        "load_average": [load_before, os.getloadavg()[0]],
        **measured,
        "absent": stage.absent,
        "failures": stage.failures,
    }


def its_own(stage: Stage, name: str) -> dict[str, Any]:
    """What a contender says about itself."""
    return {key: stage.told[name][key] for key in ITS_OWN}


def tell(line: str) -> None:
    """How far it is."""
    print(line, file=sys.stderr, flush=True)

"""What one save costs: blocking time, durable time, CPU, bytes and memory, of distckpt and of others, in one run.

Each contender lives in a process of its own with the same state. They save in turns, in an order that is shuffled
in each round, so that what else happens on the machine meets all of them. The first save of each is told apart.
Nothing here judges: figures of one run compare with one another, not with those of another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import contenders

REFERENCE = "torch_save"
SAME_FOR_ALL = ("state_bytes", "tensors", "torch", "threads")
ITS_OWN = ("about", "package", "version", "baseline_memory_bytes", "opened_memory_bytes")
RATIOS = ("blocking_seconds", "durable_seconds", "cpu_seconds")
MB = 1_000_000


class ContenderFailed(Exception):
    """A contender did not answer, or answered that it failed."""


class Running:
    """The process of one contender. Leaving the context ends it."""

    def __init__(self, name: str, directory: Path, size_mb: int) -> None:
        self.name = name
        self.deadline_seconds = 240 + size_mb / 5
        directory.mkdir()
        self._errors = directory.with_suffix(".err").open("w+")
        script = Path(__file__).with_name("one_contender.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), name, str(directory), str(size_mb * MB)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def save(self, step: int) -> dict[str, Any]:
        """What the save at ``step`` cost.

        Raises:
            ContenderFailed: with its own words.
        """
        assert self._process.stdin
        try:
            print("save", step, file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise ContenderFailed(self._last_words()) from error
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """What it says next; the first answer of all is about itself.

        Raises:
            ContenderFailed: with its own words, or if it says nothing in time.
        """
        assert self._process.stdout
        # It answers once to each line, so nothing is buffered here when this waits.
        if not select.select([self._process.stdout], [], [], self.deadline_seconds)[0]:
            self._process.kill()
            raise ContenderFailed(f"did not answer within {self.deadline_seconds:.0f} s")
        line = self._process.stdout.readline()
        said: dict[str, Any] = json.loads(line) if line else {"failed": self._last_words()}
        if "failed" in said:
            raise ContenderFailed(without_folders(said["failed"]))
        return said

    def close(self) -> None:
        """It has closed everything and ended.

        Raises:
            ContenderFailed: with its own words, or if it does not end in time.
        """
        assert self._process.stdin
        self._process.stdin.close()
        try:
            code = self._process.wait(self.deadline_seconds)
        except subprocess.TimeoutExpired as error:
            raise ContenderFailed(f"did not end within {self.deadline_seconds:.0f} s") from error
        if code:
            self.answer()

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"ended with {self._process.returncode}: {lines[-1] if lines else 'no word'}"


@contextmanager
def noted(name: str, failures: dict[str, str]) -> Iterator[None]:
    """Go on after a contender failed, with its words in ``failures``."""
    try:
        yield
    except ContenderFailed as error:
        failures[name] = str(error)


def run(names: list[str], directory: Path, size_mb: int, rounds: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Every sample of every contender, and what the run was. A contender that fails is left out."""
    load_before = os.getloadavg()[0]
    failures: dict[str, str] = {}
    with ExitStack() as ending:
        running = [ending.enter_context(Running(name, directory / name, size_mb)) for name in names]
        told: dict[str, dict[str, Any]] = {}
        for one in running:
            with noted(one.name, failures):
                told[one.name] = one.answer()
        samples = in_turns(running, rounds, failures, tell)
        for one in running:
            if one.name not in failures:
                with noted(one.name, failures):
                    one.close()
    measured = {name: samples[name][1:] for name in names if name not in failures}
    return {
        "benchmark": "save_latency",
        "rounds": rounds,
        **next(({key: one[key] for key in SAME_FOR_ALL} for one in told.values()), {}),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "file_system": file_system_of(directory),
        "load_average": [load_before, os.getloadavg()[0]],
        "contenders": {
            name: {key: told[name][key] for key in ITS_OWN}
            | {"summary": summary(taken), "ratios": ratios(taken, measured.get(REFERENCE))}
            | {"first": samples[name][0], "samples": taken}
            for name, taken in measured.items()
        },
        "failures": failures,
    }


def in_turns(
    running: list[Running], rounds: int, failures: dict[str, str], tell: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """The first save of each, then ``rounds`` more, each round in another order."""
    samples: dict[str, list[dict[str, Any]]] = {one.name: [] for one in running}
    shuffled = random.Random(0).sample
    for step in range(1, rounds + 2):
        for one in shuffled(running, len(running)):
            if one.name not in failures:
                with noted(one.name, failures):
                    samples[one.name].append(one.save(step))
        tell(f"round {step - 1} of {rounds}" if step > 1 else "first saves")
    return samples


def summary(samples: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The median and the range of each measure."""
    columns = {measure: [sample[measure] for sample in samples] for measure in samples[0]}
    return {key: {"median": median(of), "min": min(of), "max": max(of)} for key, of in columns.items()}


def ratios(samples: list[dict[str, Any]], reference: list[dict[str, Any]] | None) -> dict[str, float] | None:
    """The median over the rounds of each measure against the reference's in the same round."""
    if reference is None:
        return None
    return {
        measure: median(one[measure] / other[measure] for one, other in zip(samples, reference, strict=True))
        for measure in RATIOS
    }


def table(result: dict[str, Any]) -> str:
    """The result as people read it, in Markdown."""
    columns = (
        "contender",
        "blocking s",
        "durable s",
        "CPU s/GB",
        "MB written",
        "peak memory MB",
        "blocking, durable, CPU against " + REFERENCE,
        "first save s",
    )
    rows = [columns, *(row(name, one, result["state_bytes"]) for name, one in result["contenders"].items())]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(map(str.ljust, cells, widths))} |" for cells in rows]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    abouts = [
        f"- {name} ({one['package']} {one['version']}): {one['about']}" for name, one in result["contenders"].items()
    ]
    failed = [f"- {name} FAILED: {why}" for name, why in result["failures"].items()]
    return "\n".join([setting(result), "", *lines, "", *abouts, *failed])


def row(name: str, one: dict[str, Any], state_bytes: int) -> tuple[str, ...]:
    """The cells of one contender."""
    of, against = one["summary"], one["ratios"]
    return (
        name,
        spread(of["blocking_seconds"]),
        spread(of["durable_seconds"]),
        f"{of['cpu_seconds']['median'] / state_bytes * 1e9:.2f}",
        f"{of['file_bytes']['median'] / MB:.1f}",
        f"{of['peak_memory_bytes']['max'] / MB:.0f}",
        ", ".join(f"{against[measure]:.2f}" for measure in RATIOS) if against else "-",
        f"{one['first']['blocking_seconds']:.3f}, {one['first']['durable_seconds']:.3f}",
    )


def spread(of: dict[str, float]) -> str:
    """The median, then the range."""
    return f"{of['median']:.3f} ({of['min']:.3f}..{of['max']:.3f})"


def setting(result: dict[str, Any]) -> str:
    """In what circumstances the figures came about."""
    if not result["contenders"]:
        return "Nothing was measured."
    samples = [sample for one in result["contenders"].values() for sample in one["samples"]]
    others = sum(one["others_cpu_seconds"] for one in samples) / sum(one["durable_seconds"] for one in samples)
    before, after = result["load_average"]
    return (
        f"State of {result['state_bytes'] / MB:.1f} MB in {result['tensors']} tensors; median (least..most) of "
        f"{result['rounds']} rounds; torch {result['torch']} with {result['threads']} threads on {result['cores']} "
        f"cores, {result['file_system']}; load average {before:.2f} before, {after:.2f} after; other processes used "
        f"{others:.0%} of a core meanwhile."
    )


def file_system_of(directory: Path) -> str:
    """The type of the file system that holds ``directory``, as the kernel names it."""
    device = directory.stat().st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return kind.split()[0]
    return "unknown file system"


def without_folders(text: str) -> str:
    """``text`` with every absolute path cut down to its last part."""
    return re.sub(r"(?:/[^/\s'\"():]+)*/(?=[^/\s'\"():])", "", text)


def counted(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a whole number of at least 1, is {text!r}")
    return int(text)


def main() -> int:
    """0 when every contender was measured, 1 when one failed, 2 when called wrongly."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=counted, default=256, help="size of the state in MB of 10^6 bytes (256)")
    parser.add_argument("--rounds", type=counted, default=7, help="counted saves of each contender (7)")
    parser.add_argument("--dir", type=Path, help="where to save: what is measured is its disk (the temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all samples as JSON")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=contenders.names(), help="only these contenders")
    asked = parser.parse_args()
    for folder in (asked.dir, asked.json and asked.json.parent):
        if folder is not None and not folder.is_dir():
            parser.error(f"{folder} is not a directory")
    # What was saved is gigabytes: it is removed when this is told to end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    names = [name for name in contenders.names() if name in (asked.only or contenders.names())]
    with tempfile.TemporaryDirectory(prefix="save_latency-", dir=asked.dir) as folder:
        result = run(names, Path(folder).resolve(), asked.mb, asked.rounds, lambda line: print(line, file=sys.stderr))
    print(table(result))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())

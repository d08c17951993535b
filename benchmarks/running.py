"""The processes of a benchmark, seen from the one that asks: started, asked in turns, and ended."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contenders import REFERENCE

# Freed memory stays with the process. Else the large tensors of each step are mapped and touched anew, which takes a
# fifth of a step of GPT-2, and by chance several times that.
ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2000000000"}
PATIENCE_SECONDS = 900

# What a contender holds at most while it saves, in states, as measured; to plan with.
HELD_STATES = {
    **dict.fromkeys(("torch_save", "torch_save_fsync", "torch_load_mmap", "safetensors_fsync"), 0.1),
    **dict.fromkeys(("dcp_save", "dcp_save_4_threads", "accelerate_save_state"), 0.1),
    **dict.fromkeys(("torch_checkpointing_async", "lightning_async"), 2.2),
}
ELSE_HELD_STATES = 1.1


class ContenderFailed(Exception):
    """It did not answer, or answered that it failed."""


class ContenderAbsent(ContenderFailed):
    """What it needs is not installed."""


class Running:
    """A process that answers with one line of JSON to each that it is sent, and first of all says what it is. Leaving
    the context ends it, and what it started."""

    def __init__(self, name: str, directory: Path, *command: object) -> None:
        self.name = name
        self._errors = directory.with_suffix(".err").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        with suppress(ProcessLookupError):  # its children, too; it leads its own group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def ask(self, **command: object) -> dict[str, Any]:
        """What it answers.

        Raises:
            ContenderFailed: with its own words, or if it says nothing in time.
        """
        assert self._process.stdin
        try:
            print(json.dumps(command), file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise ContenderFailed(self._last_words()) from error
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """What it says next. Raises as `ask` does, and ContenderAbsent."""
        assert self._process.stdout
        # It answers once to each line, so nothing is buffered here when this waits.
        if not select.select([self._process.stdout], [], [], PATIENCE_SECONDS)[0]:
            raise ContenderFailed(f"did not answer within {PATIENCE_SECONDS} s")
        line = self._process.stdout.readline()
        said: dict[str, Any] = json.loads(line) if line else {"failed": self._last_words()}
        if "absent" in said:
            raise ContenderAbsent(said["absent"])
        if "failed" in said:
            raise ContenderFailed(without_folders(said["failed"]))
        return said

    def close(self) -> None:
        """It has closed everything and ended. Raises as `ask` does."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            code = self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ContenderFailed(f"did not end within {PATIENCE_SECONDS} s") from error
        if code:
            self.answer()

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return without_folders(f"ended with {self._process.returncode}: {lines[-1] if lines else 'no word'}")


@dataclass
class Stage:
    """Where contenders run: several at once, as far as memory allows, each with the workload and a folder of its own.

    Attributes:
        told: what each that was started said about itself.
        absent, failures: why the others were not measured.
    """

    workload: str
    directory: Path
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def contenders(self, names: Sequence[str]) -> Iterator[dict[str, Running]]:
        """Those of ``names`` that could be started; they are ended at the end."""
        with ExitStack() as ending:
            running: dict[str, Running] = {}
            for name in names:
                folder = self.directory / name
                folder.mkdir()
                script = Path(__file__).with_name("one_contender.py")
                one = ending.enter_context(Running(name, folder, script, name, self.workload, folder))
                with self.noted(name):
                    self.told[name] = one.answer()
                    running[name] = one
            yield running
            for name, one in running.items():
                if name not in self.failures:
                    with self.noted(name):
                        one.close()
        for name in names:
            remove(self.directory / name)

    @contextmanager
    def floor(self, size_bytes: int) -> Iterator[Running]:
        """The floor of so many bytes."""
        folder = self.directory / "floor"
        folder.mkdir()
        script = Path(__file__).with_name("floor.py")
        with Running("floor", folder, script, folder, size_bytes) as floor:
            with self.noted("floor"):
                floor.answer()
            yield floor
        remove(folder)

    @contextmanager
    def noted(self, name: str) -> Iterator[None]:
        """Go on after it failed, with its words where they belong."""
        try:
            yield
        except ContenderAbsent as error:
            self.absent[name] = str(error)
        except ContenderFailed as error:
            self.failures[name] = str(error)


def started(stage: Stage, name: str) -> dict[str, Any]:
    """What it says of itself.

    Raises:
        ContenderFailed: where it failed, or is not installed, in its words.
    """
    if name not in stage.told or name in stage.failures:
        raise ContenderFailed(stage.failures.get(name) or stage.absent[name])
    return stage.told[name]


def batches(names: Sequence[str], needed_bytes: Callable[[str], float], budget_bytes: float) -> list[list[str]]:
    """``names`` but the reference, in their order, in batches that fit beside it; one that never fits is alone."""
    found: list[list[str]] = []
    left = 0.0
    for name in names:
        if name != REFERENCE:
            if not found or needed_bytes(name) > left:
                found.append([])
                left = budget_bytes - needed_bytes(REFERENCE)
            found[-1].append(name)
            left -= needed_bytes(name)
    return found or [[]]


def needed_bytes(name: str, reference: Mapping[str, Any]) -> float:
    """What the process of a contender takes, by what the reference says of the workload."""
    held = HELD_STATES.get(name, ELSE_HELD_STATES)
    return float(reference["training_memory_bytes"] + held * reference["state_bytes"])


def remove(folder: Path) -> None:
    """What a contender left, and what it said."""
    shutil.rmtree(folder)
    folder.with_suffix(".err").unlink()


def without_folders(text: str) -> str:
    """``text`` with every absolute path cut down to its last part."""
    return re.sub(r"(?:/[^/\s'\"():]+)*/(?=[^/\s'\"():])", "", text)

"""A training of some hundred kilobytes whose whole state is a function of its step, saved and resumed with distckpt."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import shim
import torch
from torch import nn

from distckpt import Checkpointer, DamagedCheckpoint, SaveFailed, layout
from distckpt.catalog import read_manifest, scan
from distckpt.formats.full import FORMAT
from distckpt.formats.stand_ins import read_whole
from distckpt.stores import spares
from distckpt.stores.local import LocalStore

RUN = "runs/tiny"

# By this metric step 2 is best, then 4: one checkpoint is kept for its age, and an older one for its metric.
SCORES = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.95}


class Training:
    """Random data, dropout and momentum: to be at the same weights one must have resumed the generators too.

    Its two large files pass the page cache by, all but their tails.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 1500), nn.Dropout(0.5), nn.Linear(1500, 4))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 8)).square().mean().backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """It as it is until the next step."""
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return parts | {"generator": torch.get_rng_state()}


def _states() -> Iterator[dict[str, Any]]:
    training = Training()
    while True:
        yield copy.deepcopy(training.state())
        training.step()


# Worked out once, before any process is forked.
EXPECTED = list(itertools.islice(_states(), 8))


def train(root: Path, *, more: int, is_async: bool, is_forgiving: bool = False, recycles: bool = False) -> int:
    """Resume, check every bit, and do so many steps more, each saved and then labelled; the step resumed from.

    With ``is_forgiving`` a save that fails is told, the fault is over, and training goes on. With ``recycles`` a save
    is written over what the one before has deleted, however small that is.
    """
    if recycles:
        spares.LEAST_BYTES = 4096
    training = Training()
    checkpointer = Checkpointer(
        root / RUN,
        {"model": training.model, "optimizer": training.optimizer},
        max_keep_ckpts=1,
        save_best="score",
        rule="greater",
        save_last=False,
        async_save=is_async,
        recycle=recycles,
    )
    start = checkpointer.resume()
    check(training, start)
    shim.say(f"resumed {start}")
    for step in range(start + 1, start + more + 1):
        training.step()
        checkpointer.step()
        try:
            checkpointer.save("interval", wait=True)
        except SaveFailed as failure:
            if not is_forgiving:
                raise
            shim.arm(None)
            shim.say(f"failed {step} {failure}")
        else:
            shim.say(f"acknowledged {step}")
        checkpointer.report({"score": SCORES.get(step, 0.0)})
    checkpointer.close()
    check(training, start + more)
    return start


def judge(root: Path, *, cases: list[str]) -> None:
    """Go on in each of the folders ``cases`` where a process or a machine ended; tell what came out, as JSON."""
    for case in cases:
        told = Told()
        logging.getLogger("distckpt").addHandler(told)
        resumed, again, problems = -1, -1, []
        try:
            problems = broken_records(root / case / RUN)
            resumed = train(root / case, more=1, is_async=False)
            problems += leftovers(root / case / RUN)
            again = train(root / case, more=0, is_async=False)
        except Exception as error:  # what is judged may raise anything
            problems.append(f"{type(error).__name__}: {error}")
        logging.getLogger("distckpt").removeHandler(told)
        print(json.dumps([case, resumed, again, problems + told.warnings]))


def broken_records(run: Path) -> list[str]:
    """Records of checkpoints that do not verify. There is no moment at which there may be one."""
    store = LocalStore(run)
    listing = scan(store)
    found = [str(error) for error in listing.unreadable.values()]
    for record in listing.records:
        try:
            read_whole(FORMAT.open(store, record.name, read_manifest(store, record), 0, None))
        except (DamagedCheckpoint, OSError) as error:
            found.append(f"record without its content: {error}")
    return found


def leftovers(run: Path) -> list[str]:
    """What lies in the directory of a run and belongs to nothing that is committed."""
    names = {path.name for path in run.iterdir()}
    committed = {layout.recorded_by(name) for name in names}
    known = committed | {layout.RUN, layout.EVENTS, layout.LOCK, layout.LATEST, layout.best_label("score")}
    attempts = sorted(name for name in names if layout.parse_attempt(name))
    left = {name for name in names - known - set(attempts[-1:]) if not layout.recorded_by(name)}
    return [f"left over: {name}" for name in sorted(left)]


class Told(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())


def check(training: Training, step: int) -> None:
    """The training is where ``step`` steps lead, bit by bit.

    Raises:
        AssertionError: naming the first place where it is not.
    """
    _compare(training.state(), EXPECTED[step], f"step {step}")


def _compare(got: Any, expected: Any, place: str) -> None:
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype and torch.equal(got, expected), f"{place} differs"
    elif isinstance(expected, Mapping):
        assert got.keys() == expected.keys(), f"{place} has other keys"
        for key in expected:
            _compare(got[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), f"{place} has another length"
        for index, (one, other) in enumerate(zip(got, expected, strict=True)):
            _compare(one, other, f"{place}.{index}")
    else:
        assert got == expected, f"{place} is {got}, should be {expected}"


torch.set_num_threads(1)
logging.getLogger("distckpt").setLevel(logging.WARNING)

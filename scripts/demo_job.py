"""One start of the demo's training job, and how to kill it at a chosen moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from distckpt.layout import StepName, record_of

TRAIN = Path(__file__).resolve().parent / "demo_train.py"
STEPS = 300
RANKS = 2


@dataclass(frozen=True)
class Kill:
    """One kill to come: once ``after_step`` is done, or the first write that begins after it."""

    whom: str
    after_step: int
    in_a_write: bool


@dataclass(frozen=True)
class Hit:
    """One kill that happened.

    Attributes:
        step: the last step that was done.
        computed: how many steps the run had computed until then, repeated ones too.
        unfinished: the folders of the write that it hit.
    """

    kill: Kill
    step: int
    computed: int
    unfinished: list[str]


class Job:
    """One start of the training job: torchrun and its ranks."""

    def __init__(self, out: Path, log: Path) -> None:
        self.out = out
        self.checkpoints = out / "checkpoints"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        command += [str(TRAIN), str(out), "--steps", str(STEPS)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("a") as file:
            self.torchrun = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment
            )

    def pids(self) -> dict[str, int]:
        """The ranks that run now. They are not in torchrun's process group: each has to be killed by itself."""
        found = {}
        for task in Path(f"/proc/{self.torchrun.pid}/task").iterdir():
            for pid in (task / "children").read_text().split():
                try:
                    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                except (FileNotFoundError, ProcessLookupError):
                    continue
                found |= {f"rank {entry[5:].decode()}": int(pid) for entry in environment if entry.startswith(b"RANK=")}
        return found

    def wait(self) -> int:
        """Waits for the end, and says how it was: 0 is well."""
        try:
            return self.torchrun.wait(timeout=300)
        except subprocess.TimeoutExpired:
            for pid in [self.torchrun.pid, *self.pids().values()]:
                os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"training did not end in 5 minutes; see the logs in {self.out.parent}") from None

    def kill(self, kill: Kill) -> Hit:
        """Waits for the moment, kills, and waits until nothing of the job is left."""
        while len(pids := self.pids()) < RANKS:
            self.must_run()
            time.sleep(0.01)
        while not (self.unfinished(kill.after_step) if kill.in_a_write else self.step() >= kill.after_step):
            self.must_run()
            time.sleep(0.0002)
        for pid in [self.torchrun.pid, *pids.values()] if kill.whom == "everything" else [pids[kill.whom]]:
            os.kill(pid, signal.SIGKILL)
        self.wait()
        while any(is_running(pid) for pid in pids.values()):
            time.sleep(0.01)
        return Hit(kill, self.step(), len(read_losses(self.out, 0)), self.unfinished(kill.after_step))

    def must_run(self) -> None:
        if self.torchrun.poll() is not None:
            raise SystemExit(f"training ended before it could be killed; see the logs in {self.out.parent}")

    def step(self) -> int:
        """The highest step that was ever done."""
        return max((step for step, _ in read_losses(self.out, 0)), default=0)

    def unfinished(self, after_step: int) -> list[str]:
        """The folders of later steps that hold tensors, and that nobody committed."""
        names = {path.name for path in self.checkpoints.iterdir()} if self.checkpoints.exists() else set()
        return [
            name
            for name in sorted(names)
            if (parsed := StepName.parse(name))
            and parsed.step > after_step
            and record_of(name) not in names
            and any((self.checkpoints / name).glob("*.safetensors"))
        ]


def is_running(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def read_losses(out: Path, rank: int) -> list[tuple[int, str]]:
    """Every step that was computed, in order, with its loss as a hexadecimal float."""
    path = out / f"losses-rank{rank}.csv"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(step), loss) for step, loss in (line.split(",") for line in lines if line.count(",") == 1)]

"""The process of one contender: it trains and saves as it is told to, and answers with what that cost.

It reads one command in JSON a line, and answers each with one line of JSON, until its input ends. Linux only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

# What is measured is this checkout, whether it is installed or not.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import contenders  # noqa: E402
import proc  # noqa: E402
import torch  # noqa: E402
import workloads  # noqa: E402
import xxhash  # noqa: E402
from files import (  # noqa: E402
    bring_into_cache,
    bytes_in,
    cached_share,
    drop_from_cache,
    files_in,
    fsync,
    make_durable,
)

# A save that is not done after so many steps is not waited for with further ones.
MOST_STEPS = 20


class Trainer:
    """The loop that a contender saves from."""

    def __init__(self, contender: contenders.Contender, workload: workloads.Workload) -> None:
        self.contender, self.workload = contender, workload
        self._may_step = 0.0
        # Optimizers call the hooks of all optimizers first, and waits may be there too: this one is the last.
        workload.optimizer.register_step_pre_hook(self._note)

    def _note(self, *_: object) -> None:
        self._may_step = perf_counter()

    def train(self, before_optimizer: Callable[[], None] = lambda: None) -> tuple[float, float]:
        """One step: how long it took, and how long of that training waited before the optimizer's step."""
        start = perf_counter()
        self.workload.loss().backward()
        ready = perf_counter()
        before_optimizer()
        self.workload.optimizer.step()
        self.workload.after_step()
        # Gradients that were freed would be mapped and touched anew in each step, which is what one would measure.
        self.workload.optimizer.zero_grad(set_to_none=False)
        return perf_counter() - start, self._may_step - ready

    def quiet(self, steps: int) -> list[float]:
        """How long each of so many steps took; nothing is saved."""
        return [self.train()[0] for _ in range(steps)]


class Watch:
    """Looks from a thread of its own how long a save takes that training goes on beside."""

    def __init__(self, contender: contenders.Contender, start: float) -> None:
        self._contender, self._start = contender, start
        self._error: Exception | None = None
        self.seconds: float | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        """It is done. Raises what the contender raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._contender.wait()
            self.seconds = perf_counter() - self._start
        except Exception as error:
            self._error = error


class Server:
    """Does what is asked: each public method is a command, whose answer is what it returns."""

    def __init__(self, contender: contenders.Contender, directory: Path, workload: workloads.Workload) -> None:
        self._contender, self._directory, self._workload = contender, directory, workload
        self._trainer = Trainer(contender, workload)
        self._trainer.quiet(2)
        self._training_bytes = proc.held_bytes()
        self._state_bytes = sum(tensor.nbytes for tensor in workload.tensors())
        self._baseline_bytes = proc.resident_bytes()
        self._kept: list[int] = []
        self._digests: list[str] = []
        contender.open(directory, workload.model, workload.optimizer)

    def about(self) -> dict[str, object]:
        """What does not change any more."""
        return {
            "package": self._contender.package,
            "version": import_module(self._contender.package).__version__,
            "is_durable": self._contender.is_durable,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "state_bytes": self._state_bytes,
            "tensors": len(self._workload.tensors()),
            "training_memory_bytes": self._training_bytes,
        }

    def turn(self, *, before: int, after: int, saves: bool) -> dict[str, object]:
        """So many steps, a save if asked for, and so many steps, or more until the save is done."""
        start = proc.used()
        told: dict[str, object] = {"quiet": self._trainer.quiet(before)}
        told |= self._saved_beside_training(after) if saves else {"steps": self._trainer.quiet(after)}
        return told | {"foreign_share": proc.used().since(start).foreign_share}

    def _saved_beside_training(self, after: int) -> dict[str, object]:
        called = self._save()
        returned = perf_counter()
        watch = Watch(self._contender, called)
        first, waited = self._trainer.train(self._contender.before_optimizer)
        steps = [returned - called + first]
        while len(steps) < after or not (watch.is_done or len(steps) >= MOST_STEPS):
            steps += self._trainer.quiet(1)
        watch.join()
        told = {
            "call": returned - called,
            "waited": waited,
            "steps": steps,
            "done_seconds": watch.seconds,
            "telemetry": dict(self._contender.telemetry),
        }
        make_durable(self._directory, files_in(self._directory))
        self._keep_newest(1)
        return told

    def alone(self) -> dict[str, object]:
        """A save while nothing is trained. A step of training follows, so that no save finds the last one's state."""
        proc.touch(self._state_bytes)
        proc.resident_bytes()  # gives back what training freed
        old = set(files_in(self._directory))
        proc.forget_peak()
        before = proc.used()
        start = self._save()
        self._contender.before_optimizer()
        blocked = perf_counter() - start
        self._contender.wait()
        waited = perf_counter()
        new = set(files_in(self._directory)) - old
        make_durable(self._directory, new)
        durable = perf_counter()
        took = proc.used().since(before)
        told = {
            "blocked": blocked,
            "durable": durable - start,
            "fsync": durable - waited,
            "cpu": took.cpu_seconds,
            "disk_bytes": took.disk_bytes,
            "file_bytes": bytes_in(new),
            "peak_memory_bytes": proc.peak_memory_bytes() - self._baseline_bytes,
            "foreign_share": took.foreign_share,
            "telemetry": dict(self._contender.telemetry),
        }
        self._digests = self._digests_now()
        self._keep_newest(1)
        self._trainer.quiet(1)
        return told

    def row(self, *, quiet: int, saves: int) -> dict[str, object]:
        """So many steps, then so many with a save at each, then so many steps again."""
        before, start = self._trainer.quiet(quiet), proc.used()
        steps, blocked, memory = [], [], []
        for _ in range(saves):
            called = self._save()
            returned = perf_counter()
            first, waited = self._trainer.train(self._contender.before_optimizer)
            steps.append(returned - called + first)
            blocked.append(returned - called + waited)
            memory.append(proc.held_bytes() - self._baseline_bytes)
            self._keep_newest(2)  # the last one may still be written
        self._contender.wait()
        foreign = proc.used().since(start).foreign_share
        make_durable(self._directory, files_in(self._directory))
        after = self._trainer.quiet(quiet)
        told = {"quiet_before": before, "quiet_after": after, "steps": steps, "blocked": blocked}
        return told | {"memory_bytes": memory, "foreign_share": foreign}

    def restore(self, *, cold: bool) -> dict[str, object]:
        """The last save that was made alone is loaded, from the disk or from the page cache, and every tensor is
        compared with what was saved.
        """
        # Some leave the optimizer with tensors that are the file: then it could not leave the page cache.
        for of in self._workload.optimizer.state.values():
            of |= {key: one.clone() for key, one in of.items() if torch.is_tensor(one)}
        with torch.no_grad():
            for tensor in self._workload.tensors():
                tensor.zero_()
        (drop_from_cache if cold else bring_into_cache)(self._directory)
        cached = cached_share(self._directory)
        before, start = proc.used(), perf_counter()
        self._contender.restore(self._kept[-1])
        seconds = perf_counter() - start
        took = proc.used().since(before)
        if self._digests_now() != self._digests:
            raise ValueError("what it restored is not what it saved")
        return {
            "seconds": seconds,
            "cpu": took.cpu_seconds,
            "cached_share": cached,
            "foreign_share": took.foreign_share,
        }

    def close(self) -> None:
        self._contender.close()

    def _save(self) -> float:
        """When it was called."""
        step = self._kept[-1] + 1 if self._kept else 1
        start = perf_counter()
        self._contender.save(step)
        self._kept.append(step)
        return start

    def _keep_newest(self, count: int) -> None:
        for step in self._kept[:-count]:
            self._contender.delete(step)
        del self._kept[:-count]
        fsync(self._directory)  # else the journal would do it while the next one is timed

    def _digests_now(self) -> list[str]:
        flat = (tensor.detach().reshape(-1).contiguous().view(torch.uint8) for tensor in self._workload.tensors())
        return [xxhash.xxh3_128_hexdigest(one.numpy()) for one in flat]


def serve(name: str, workload: str, directory: Path, answer: Callable[[dict[str, object]], None]) -> None:
    """Answer to every line of the standard input; first of all with what the contender is."""
    server = Server(contenders.load(name), directory, workloads.load(workload))
    answer({"about": contenders.about(name), **server.about()})
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        answer(getattr(server, command.pop("do"))(**command))
    server.close()


def failure(error: Exception) -> dict[str, object]:
    """How it is told: what is not installed is no failure of the contender."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            return {"absent": f"{package} is not installed"}
    return {"failed": f"{type(error).__name__}: {error}"}


def main() -> None:
    """``one_contender.py NAME WORKLOAD DIRECTORY``: see the module."""
    name, workload, directory = sys.argv[1:]
    # Contenders print too: what they print goes to the errors.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(value: dict[str, object]) -> None:
        print(json.dumps(value), file=answers)

    try:
        serve(name, workload, Path(directory), answer)
    except Exception as error:
        answer(failure(error))
        raise


if __name__ == "__main__":
    main()

"""The process of one contender: it saves whenever it is told to, and answers with what the save cost.

It reads ``save STEP`` line by line, and answers each with one line of JSON, until its input ends. Linux only: memory
and bytes are read from ``/proc``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import re
import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from time import perf_counter

# What is measured is this checkout, whether it is installed or not.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from contenders import Contender, fsync, load  # noqa: E402
from transformer import tensors_of, training_state  # noqa: E402

# The most that a save takes is twice the state: a copy of it, beside its pages in the page cache. And a margin.
TOUCHED_TIMES_STATE = 3


@dataclass(frozen=True)
class Sample:
    """What one save cost.

    Attributes:
        blocking_seconds: until training could go on.
        durable_seconds: until everything was fsynced, from the same start; the contender has nothing else to do.
        fsync_seconds: the part of it that the contender left to be fsynced for it.
        cpu_seconds: of this process, all threads, until durable. What the kernel does in threads of its own, such as
            writing back the page cache, is not in it.
        others_cpu_seconds: what other processes used of the machine meanwhile, in user mode, to 10 ms.
        file_bytes: the sizes of all files that are new or changed, each inode once.
        disk_bytes: what the kernel charged to this process as writes (``write_bytes``): files written and deleted
            again are in it, a file system in memory is not.
        peak_memory_bytes: the largest resident size meanwhile, above that before the contender was opened. It does
            not know the page cache.
    """

    blocking_seconds: float
    durable_seconds: float
    fsync_seconds: float
    cpu_seconds: float
    others_cpu_seconds: float
    file_bytes: int
    disk_bytes: int
    peak_memory_bytes: int


def serve(name: str, directory: Path, size_bytes: int, answer: Callable[[dict[str, object]], None]) -> None:
    """Answer to every line of the standard input."""
    contender, about = load(name)
    model, optimizer = training_state(size_bytes)
    tensors = tensors_of(model, optimizer)
    state_bytes = sum(tensor.nbytes for tensor in tensors)
    baseline_bytes = resident_bytes()
    contender.open(directory, model, optimizer)
    opened_bytes = resident_bytes() - baseline_bytes
    answer(
        {
            "about": about,
            "package": contender.package,
            "version": import_module(contender.package).__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "state_bytes": state_bytes,
            "tensors": len(tensors),
            "baseline_memory_bytes": baseline_bytes,
            "opened_memory_bytes": opened_bytes,
        }
    )
    for line in sys.stdin:
        step = int(line.removeprefix("save "))
        # No save finds the state that the one before it has written.
        optimizer.step()
        gc.collect()
        touch(TOUCHED_TIMES_STATE * state_bytes)
        answer(asdict(measure(contender, directory, step, baseline_bytes)))
    contender.close()


def measure(contender: Contender, directory: Path, step: int, baseline_bytes: int) -> Sample:
    """What the save at ``step`` costs. The save before it is deleted afterwards."""
    before = set(files_in(directory))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is as high as the resident size now
    others, written, cpu = others_cpu_seconds(), field("/proc/self/io", "write_bytes"), cpu_seconds()
    start = perf_counter()
    contender.save(step)
    returned = perf_counter()
    contender.wait()
    waited = perf_counter()
    new = set(files_in(directory)) - before
    make_durable(directory, new)
    durable = perf_counter()
    sample = Sample(
        blocking_seconds=returned - start,
        durable_seconds=durable - start,
        fsync_seconds=durable - waited,
        cpu_seconds=cpu_seconds() - cpu,
        others_cpu_seconds=max(0.0, others_cpu_seconds() - others),
        file_bytes=sum({file.inode: file.size_bytes for file in new}.values()),
        disk_bytes=field("/proc/self/io", "write_bytes") - written,
        peak_memory_bytes=field("/proc/self/status", "VmHWM") * 1024 - baseline_bytes,
    )
    if step > 1:
        contender.delete(step - 1)
        # Else the journal would do it while the next one is timed.
        fsync(directory)
    return sample


def touch(size_bytes: int) -> None:
    """Have so much memory once and give it back. In a virtual machine memory that nobody has used yet is several
    times as slow at its first touch, and who gets it is chance: a save of the same state took 0.07 or 0.25 s.
    """
    with mmap.mmap(-1, size_bytes) as memory:
        ctypes.memset((ctypes.c_char * size_bytes).from_buffer(memory), 1, size_bytes)


@dataclass(frozen=True)
class File:
    """A file as it was found; one that was written into since is another."""

    path: Path
    inode: int
    size_bytes: int
    modified_ns: int


def files_in(directory: Path) -> Iterable[File]:
    """All regular files below ``directory``; links are not followed."""
    for folder, _, files in os.walk(directory):
        for name in files:
            path = Path(folder, name)
            if not path.is_symlink():
                status = path.stat()
                yield File(path, status.st_ino, status.st_size, status.st_mtime_ns)


def make_durable(directory: Path, files: Iterable[File]) -> None:
    """Fsync these files and every folder. What was durable already takes no time worth counting."""
    for file in files:
        fsync(file.path)
    for folder, _, _ in os.walk(directory, topdown=False):
        fsync(Path(folder))


def field(path: str, name: str) -> int:
    """One number of a file in ``/proc``."""
    found = re.search(rf"^{name}:\s+(\d+)", Path(path).read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{path} has no {name}")
    return int(found[1])


def resident_bytes() -> int:
    """The resident size, once memory that was freed is given back: it would hide what a save takes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return field("/proc/self/status", "VmRSS") * 1024


def cpu_seconds() -> float:
    """What this process has used so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def others_cpu_seconds() -> float:
    """What all other processes have used so far in user mode."""
    user, nice = Path("/proc/stat").read_text().split(maxsplit=3)[1:3]
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    return (int(user) + int(nice)) / os.sysconf("SC_CLK_TCK") - mine


def main() -> None:
    """``one_contender.py NAME DIRECTORY SIZE_BYTES``: see the module."""
    name, directory, size_bytes = sys.argv[1:]
    # Contenders print too: what they print goes to the errors.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(value: dict[str, object]) -> None:
        print(json.dumps(value), file=answers)

    try:
        serve(name, Path(directory), int(size_bytes), answer)
    except Exception as error:
        answer({"failed": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()

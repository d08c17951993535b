"""What this process and its children use of the machine, and what others use meanwhile, as ``/proc`` tells it."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Used:
    """What was used so far, or, of a difference, in between.

    Attributes:
        cpu_seconds: of this process, all threads, and all its children. What the kernel does in threads of its own,
            such as writing back the page cache, is not in it.
        foreign_seconds: what other processes used in user mode, and what the hypervisor gave to other machines.
        disk_bytes: what the kernel charged to them as writes: files written and deleted again are in it, a file
            system in memory is not.
    """

    wall_seconds: float
    cpu_seconds: float
    foreign_seconds: float
    disk_bytes: int

    def since(self, before: Used) -> Used:
        """The difference. Of foreign time, which has a resolution of 10 ms, never less than nothing."""
        return Used(
            self.wall_seconds - before.wall_seconds,
            self.cpu_seconds - before.cpu_seconds,
            max(0.0, self.foreign_seconds - before.foreign_seconds),
            self.disk_bytes - before.disk_bytes,
        )

    @property
    def foreign_share(self) -> float:
        """Of one core."""
        return self.foreign_seconds / self.wall_seconds if self.wall_seconds else 0.0


def used() -> Used:
    """What was used so far. It takes some milliseconds: every process of the machine is looked at."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    user, total = own.ru_utime + ended.ru_utime, own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime
    disk_bytes = _field("/proc/self/io", "write_bytes")
    for child in children():
        fields = _stat(child)
        if fields:
            user += (int(fields[11]) + int(fields[13])) / _TICKS
            total += sum(map(int, fields[11:15])) / _TICKS
            disk_bytes += _field(f"/proc/{child}/io", "write_bytes")
    cores = Path("/proc/stat").read_text().split(maxsplit=10)
    others = (int(cores[1]) + int(cores[2]) + int(cores[8])) / _TICKS - user
    return Used(time.perf_counter(), total, others, disk_bytes)


def children() -> list[int]:
    """All processes that descend from this one."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    parents = {pid: int(fields[1]) for pid in pids if (fields := _stat(pid))}
    found = [os.getpid()]
    for parent in found:
        found += [pid for pid, its in parents.items() if its == parent]
    return found[1:]


def forget_peak() -> None:
    """The peak of each is as high as what it has now."""
    for pid in (os.getpid(), *children()):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """The largest resident size of this process since, and what its children had beside what they share with it: not
    the libraries, not the shared memory. Neither knows the page cache.
    """
    peak, shared = own_peak_bytes() // 1024, _field("/proc/self/status", "RssShmem")
    for child in children():
        status = f"/proc/{child}/status"
        # It may have let go of the shared memory since, which its peak still has in it.
        apart = _field(status, "RssFile") + max(shared, _field(status, "RssShmem"))
        peak += max(_field(status, "RssAnon"), _field(status, "VmHWM") - apart)
    return peak * 1024


def own_peak_bytes() -> int:
    """As `peak_memory_bytes`, of this process alone."""
    return _field("/proc/self/status", "VmHWM") * 1024


def resident_bytes() -> int:
    """What is held, once memory that was freed is given back: it would hide what a save takes."""
    gc.collect()
    _libc.malloc_trim(0)
    return held_bytes()


def held_bytes() -> int:
    """The resident size of this process, and what its children have beside what they share with it."""
    alone = sum(_field(f"/proc/{child}/status", "RssAnon") for child in children())
    return (_field("/proc/self/status", "VmRSS") + alone) * 1024


def touch(size_bytes: int) -> None:
    """Have so much memory once and give it back. In a virtual machine memory that nobody has used yet is several
    times as slow at its first touch, and who gets it is chance: a save of the same state took 0.07 or 0.25 s.
    """
    with mmap.mmap(-1, size_bytes) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        ctypes.memset((ctypes.c_char * size_bytes).from_buffer(memory), 1, size_bytes)


def file_system_of(directory: Path) -> str:
    """The type of the file system that holds ``directory``, as the kernel names it."""
    device = directory.stat().st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return kind.split()[0]
    return "unknown file system"


def free_memory_bytes() -> int:
    """What programs can still have."""
    return _field("/proc/meminfo", "MemAvailable") * 1024


def _stat(pid: int) -> list[str]:
    """The fields behind the name, or none if it has ended: the state, the parent, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _field(path: str, name: str) -> int:
    """One number of a file in ``/proc``; 0 where the process has ended."""
    try:
        text = Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0  # a process that nobody waited for yet has no memory any more

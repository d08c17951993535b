"""A store in which files lie that are large enough to pass the page cache by, written and read as formats do it."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import shim
from disks import drop_from_cache, memory

from distckpt.stores.local import LocalStore

# Two pieces that pass the page cache by, the second up to its last 100 bytes; one that cannot, from there; and, as its
# place is right again, one that does. Half of 68 KiB is no whole number of pages.
PIECES = (68 * 1024, 64 * 1024 + 100, 4096 - 100, 128 * 1024)

# Three blocks are read ahead of this. It repeats itself nowhere where a block, or a page, begins.
READ_AHEAD = (random.Random(7).randbytes(999_983) * 21)[: 20 * 1024 * 1024 + 100]


def content(step: int) -> bytes:
    return b"".join(memory(size, seed=step) for size in PIECES)


def save_steps(root: Path, *, steps: list[int]) -> None:
    """Save each step, and say which are sure and which failed. The fault is over when it was met."""
    store = LocalStore(root)
    for step in steps:
        try:
            with store.create(f"file-{step}") as sink:
                for size in PIECES:
                    sink.write(memory(size, seed=step))
            store.settle()
            store.put(f"record-{step}", hashlib.sha256(content(step)).hexdigest().encode())
        except OSError as error:
            shim.arm(None)
            shim.say(f"failed {step} {error}")
        else:
            shim.say(f"acknowledged {step}")


def newest(root: Path) -> int:
    """The newest step whose record is there, 0 if there is none.

    Raises:
        AssertionError: naming a record that promises what is not there.
    """
    found = [0]
    for record in root.glob("record-*"):
        step = int(record.name.removeprefix("record-"))
        data = (root / f"file-{step}").read_bytes()
        assert record.read_text() == hashlib.sha256(data).hexdigest(), f"{record.name}: not what was saved"
        found.append(step)
    return max(found)


def put_read_ahead(root: Path) -> None:
    """A file that is read ahead is on the disk, and not in the page cache."""
    (root / "file").write_bytes(READ_AHEAD)
    drop_from_cache(root / "file")


def read_whole(root: Path) -> None:
    """Read the file, and say whether it is what was put there."""
    target = bytearray(len(READ_AHEAD))
    try:
        with LocalStore(root).open("file") as source:
            source.read_into(memoryview(target)[:8])
            source.read_into(memoryview(target)[8:])
    except OSError as error:
        shim.say(f"failed 0 {error}")
    else:
        shim.say("right" if target == READ_AHEAD else "wrong")

"""What tests ask of a real disk: memory that it can be written from, and what of a file lies in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from pathlib import Path

import pytest

PAGE_BYTES = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def memory(size: int, *, skip: int = 0, seed: int = 0) -> memoryview:
    """So many random bytes, ``skip`` bytes behind the begin of a page."""
    view = memoryview(mmap.mmap(-1, size + skip or 1))[skip : skip + size]
    view[:] = random.Random(seed).randbytes(size)
    return view


def drop_from_cache(place: Path) -> None:
    """Nothing of the file is in the page cache."""
    for _ in range(100):  # what somebody is just using stays
        with place.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not (left := pages_in_cache(place)):
            return
    raise AssertionError(f"{left} pages of {place} stay in the page cache")


def pages_in_cache(place: Path) -> int:
    """How many pages of the file are in the page cache. To ask for that brings none there."""
    size = place.stat().st_size
    with place.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        is_there = (ctypes.c_ubyte * -(-size // PAGE_BYTES))()
        first = ctypes.c_char.from_buffer(mapped)
        failed = _libc.mincore(ctypes.addressof(first), size, is_there)
        del first  # or the mapping could not be closed
    assert not failed, os.strerror(ctypes.get_errno())
    return sum(one & 1 for one in is_there)


def skip_without_direct(folder: Path) -> None:
    """Skip the test where the file system of ``folder`` has no O_DIRECT, or is the page cache itself, as tmpfs is."""
    place = folder / "probe"
    place.write_bytes(bytes(PAGE_BYTES))
    try:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECT)
        try:
            os.preadv(fd, [mmap.mmap(-1, PAGE_BYTES)], 0)
        finally:
            os.close(fd)
        with place.open("rb") as file:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return
    except OSError as error:
        pytest.skip(f"needs a folder on a disk: {folder}: {error}")
    finally:
        place.unlink()

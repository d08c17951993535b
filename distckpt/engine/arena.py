"""The arena: one block of host memory that every save of a rank is staged in."""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import weakref

import torch
from torch import Tensor

from distckpt.errors import DistckptError

_log = logging.getLogger("distckpt")

_HUGE_PAGE_BYTES = 2 * 1024 * 1024
_STEP_BYTES = 64 * 1024 * 1024  # is touched in one call, which cannot be interrupted
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, since Linux 5.14
_WIPEONFORK = 18  # MADV_WIPEONFORK: a child finds zeros
_MAP_NORESERVE = 0x4000
_FOR_ALL_DEVICES = 1  # cudaHostRegisterPortable

_libc = ctypes.CDLL(None, use_errno=True)  # releases the GIL, which mmap.madvise holds for as long as it takes
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Arena:
    """Anonymous memory on huge pages, which the disk reads two to three times as fast as others.

    It is touched once, in the background: memory that nobody has used yet is several times as slow. Forked workers of
    data loaders do not share it: while they live, each page that a save writes would be copied for them.

    Args:
        is_pinned: whether accelerators copy into it, and it is page-locked for them.

    Raises:
        DistckptError: where the system does not give that much.
    """

    def __init__(self, size_bytes: int, *, is_pinned: bool = False) -> None:
        self.size_bytes = -(-size_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            mapped = mmap.mmap(-1, self.size_bytes + _HUGE_PAGE_BYTES, flags=flags)
        except (OSError, ValueError, OverflowError) as error:
            raise DistckptError(
                f"a snapshot of this state needs {self.size_bytes / 1e6:.0f} MB of host memory, which the system does "
                f"not give ({error}): say in arena_bytes= how much it may take, e.g. arena_bytes=1_000_000_000"
            ) from error
        whole = torch.frombuffer(mapped, dtype=torch.uint8)  # unmapped with the last tensor that shows a part of it
        skipped = -whole.data_ptr() % _HUGE_PAGE_BYTES
        self.memory: Tensor = whole[skipped : skipped + self.size_bytes]
        self.address = self.memory.data_ptr()
        for advice in (mmap.MADV_HUGEPAGE, _WIPEONFORK):
            _advise(self.address, self.size_bytes, advice)  # a kernel without it stages as well, only slower
        self._is_pinned = False
        self._device = torch.cuda.current_device() if is_pinned and torch.cuda.is_available() else None
        self._is_wanted = threading.Event()
        self._is_wanted.set()
        self._toucher = threading.Thread(target=_touch, args=(weakref.ref(self),), name="distckpt-arena", daemon=True)
        self._toucher.start()

    def wait_touched(self) -> None:
        """All of it was used once, and is page-locked if it is to be."""
        self._toucher.join()

    def pin(self) -> None:
        """All of it is page-locked, where there is an accelerator of CUDA."""
        self.wait_touched()
        if not self._is_pinned and torch.cuda.is_available():
            self._lock_pages()

    def close(self) -> None:
        """The memory is given back, once nothing refers to it. Safe to call twice."""
        self._is_wanted.clear()
        self._toucher.join()
        if self._is_pinned and self.size_bytes:
            torch.cuda.cudart().cudaHostUnregister(self.address)  # type: ignore[no-untyped-call]  # torch's own
        self._is_pinned, self.size_bytes = False, 0
        self.memory = torch.empty(0, dtype=torch.uint8)

    def _lock_pages(self) -> None:
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's own
        failed = int(cudart.cudaHostRegister(self.address, self.size_bytes, _FOR_ALL_DEVICES))
        self._is_pinned = not failed
        if failed:
            _log.warning("the arena could not be page-locked (error %d of CUDA), so copies to it are slow", failed)


def _touch(known: weakref.ref[Arena]) -> None:
    begin = 0
    while (arena := known()) is not None and begin < arena.size_bytes and arena._is_wanted.is_set():
        count = min(_STEP_BYTES, arena.size_bytes - begin)
        if not _advise(arena.address + begin, count, _POPULATE_WRITE):
            break  # an older kernel: the first save touches it
        begin += count
        del arena
    if (arena := known()) is not None and arena._device is not None and arena._is_wanted.is_set():
        with torch.cuda.device(arena._device):  # each thread begins with the first of all devices
            arena._lock_pages()


def _advise(address: int, count: int, advice: int) -> bool:
    return int(_libc.madvise(address, count, advice)) == 0

"""A plugin that keeps the process of the tests small, as each rank that is forked from it pays for its size."""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Generator
from pathlib import Path

import pytest

# So much larger is it when memory is given back.
_GROWTH_BYTES = 50 * 1024 * 1024


class LeanHeap:
    """What was imported is never looked at by the collector again; what was freed is given back to the system.

    The C library keeps what threads have freed: the process grows to some gigabytes, page tables for which are copied
    at each fork.
    """

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        self._bytes = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Generator[None, object, object]:
        gc.disable()  # imports make half a million objects, nearly all of which stay
        try:
            return (yield)
        finally:
            gc.collect()
            gc.freeze()
            gc.enable()

    def pytest_runtest_logfinish(self) -> None:
        if self._trim and _resident_bytes() > self._bytes + _GROWTH_BYTES:
            self._trim(0)
            self._bytes = _resident_bytes()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

"""What work costs, and how that grows."""

from __future__ import annotations

import gc
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """How much CPU time that took stands in ``seconds``."""
    begin = time.process_time()
    yield
    seconds[what] = time.process_time() - begin


@contextmanager
def uncollected() -> Iterator[None]:
    """Python does not look for garbage, as in a restore."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def apart(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Done in a process of its own, so that its peak of memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(work, *args).result()


def growth(results: Sequence[Mapping[str, Any]], figure: str) -> list[dict[str, Any]]:
    """With which power of the ranks a figure grows, from each number of ranks to the next."""
    found = []
    for state, tensors in dict.fromkeys((one["state"], one["tensors"]) for one in results):
        same = sorted(
            (one for one in results if (one["state"], one["tensors"]) == (state, tensors)), key=lambda one: one["ranks"]
        )
        for few, many in zip(same, same[1:], strict=False):
            exponent = math.log(many[figure] / few[figure], many["ranks"] / few["ranks"])
            between = {"from_ranks": few["ranks"], "to_ranks": many["ranks"]}
            found.append({"state": state, "tensors": tensors, **between, "exponent": exponent})
    return found

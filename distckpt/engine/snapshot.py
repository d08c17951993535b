"""One snapshot: a rank's state, cut at one step, on its way from live tensors through the arena to a store."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from distckpt.engine.arena import Arena
from distckpt.engine.copying import BLOCK_BYTES, Copy
from distckpt.engine.plan import Name, Plan, view
from distckpt.engine.transfer import Transfer
from distckpt.engine.writing import beside, write_image
from distckpt.errors import DistckptError
from distckpt.formats import Image, Written
from distckpt.stores import Store

_log = logging.getLogger("distckpt")

_MOST_THREADS = 4  # memory is not faster for more
_SHOWN = 5


class Staging:
    """The snapshot of ``images``; see `distckpt.formats.Staged` for what each method promises.

    What is late in ``plan`` is copied beside training. When that copy ends, each tensor is compared with what it was
    before (see `Witnesses`), and nothing counts as written before all were found unchanged.

    Args:
        suspects: tensors that were once found changed are added to it.
        is_paranoid: whether every byte is compared, and not a few of each tensor.
    """

    def __init__(
        self,
        images: Sequence[Image],
        plan: Plan,
        arena: Arena,
        suspects: set[Name],
        *,
        is_paranoid: bool = False,
    ) -> None:
        self._images = images
        self._plan = plan
        self._memory = memory = arena.memory
        self._suspects = suspects
        self._is_paranoid = is_paranoid
        blocks = plan.starts[-1] // BLOCK_BYTES + 1
        is_bounded = plan.starts[-1] > arena.size_bytes
        self._window_bytes = (arena.size_bytes // BLOCK_BYTES if is_bounded else blocks) * BLOCK_BYTES
        self._now = Copy(arena.memory, self._window_bytes, plan.now)
        plan.now = []  # each piece goes with its copy, as it may hold one of its whole tensor
        self._late = Copy(arena.memory, self._window_bytes, plan.late)
        devices = [one for one in plan.odd if one[1].device.type != "cpu"]
        self._transfer_now = Transfer([(view(memory, *one), one[1]) for one in devices])
        self._transfer_late = Transfer([(view(memory, *one), one[1]) for one in plan.late_odd])
        self._measures: dict[str, float] = defaultdict(
            float, arena_bytes=arena.size_bytes, retakes=0, waited_seconds=0.0
        )
        self._begun = threading.Event()
        self._changed = threading.Condition()
        self._catching_up = threading.Lock()
        self._failure: Exception | None = None
        self._torn: list[Name] | None = None  # None: nobody has looked yet
        self._generation = 0

    # On the training thread

    def stage(self) -> None:
        began = time.monotonic()
        try:
            with torch.no_grad():
                self._stage()
        except Exception as error:  # raised by the save that follows, on all ranks
            self._fail(error)
        except BaseException as error:
            self._fail(DistckptError(f"the snapshot was interrupted ({type(error).__name__})"))
            raise
        self._measures["stage_seconds"] += time.monotonic() - began

    def let_change(self) -> None:
        """What it copies may be changed on return. Where somebody did so too early, all that was late is copied anew,
        as it is now."""
        self._transfer_late.hold_back()  # whatever stream this thread works on, and whoever asked before
        if self._torn == [] or self._failure is not None:
            return
        began = time.monotonic()
        self._catch_up(self._retake)
        self._measures["waited_seconds"] += time.monotonic() - began

    def settle(self) -> None:
        if self._torn == [] or self._failure is not None:
            return
        if not self._begun.is_set():
            self._fail(DistckptError("the snapshot was interrupted before it was staged"))
        self._catch_up(self._refuse)

    # On the writer's thread

    def write(self, store: Store, path: str) -> Written:
        images, starts = self._images, self._plan.starts
        places = [f"{path}/{image.path}" if image.path else path for image in images]
        while True:
            generation = self._generation
            self._begun.wait()
            self._raise_failure()
            self._transfer_now.wait()
            self._transfer_late.wait()
            entries = [
                entry
                for image, start, place in zip(images, starts, places, strict=False)
                for entry in write_image(image, self._pieces(image, start), store, place, self._spend)
            ]
            if self._is_whole(generation):
                told = [image.groups for image in images]
                groups = None if None in told else tuple(group for of in told for group in of or ())
                gone = tuple(one for image in images for one in image.gone)
                return Written(tuple(entries), groups, gone, dict(self._measures))
            for image, place in zip(images, places, strict=True):
                store.delete(place)
                if image.digests:
                    store.delete(beside(place, image))

    def release(self) -> None:
        ended = DistckptError("this snapshot was given up")
        self._fail(ended)
        self._now.end(ended)
        self._late.end(ended)
        self._transfer_now.end()
        self._transfer_late.end()
        with self._changed:
            self._images, self._plan, self._memory = (), Plan(), torch.empty(0, dtype=torch.uint8)

    def _stage(self) -> None:
        memory, plan = self._held()
        if plan.texts or plan.small or plan.odd:
            plan.scatter(memory)
        self._transfer_now.begin()
        self._transfer_late.begin()
        self._begun.set()
        self._now.start(min(len(os.sched_getaffinity(0)), _MOST_THREADS) - 1)
        self._now.work()
        self._now.wait()
        self._transfer_now.wait()
        if self._plan.witnesses:
            threading.Thread(target=self._copy_late, name="distckpt-copy", daemon=True).start()
        else:
            self._judge()

    def _copy_late(self) -> None:
        try:
            self._late.work()
            self._late.wait()
            self._transfer_late.wait()
            self._judge()
        except Exception as error:  # whoever waits for it raises it
            self._fail(error)

    def _catch_up(self, correct: Callable[[Sequence[Name]], None]) -> None:
        """All that was late is copied, and ``correct`` has done what is to be done where some of it was changed. What
        goes wrong is raised by the save, and never here."""
        with self._catching_up:  # several threads may take steps: each waits until it is right
            try:
                self._late.work()
                self._late.wait()
                self._judge()
                if self._torn:
                    correct(self._torn)
            except Exception as error:
                self._fail(error)

    def _judge(self) -> None:
        with self._changed:
            if self._torn is None:
                base, plan = self._memory.data_ptr(), self._plan
                torn = plan.witnesses.changed(base)
                if self._is_paranoid:
                    self._transfer_late.wait()
                    torn = sorted({*torn, *plan.witnesses.different(base)})
                self._torn = [plan.name(nth) for nth in torn]
                self._changed.notify_all()

    def _retake(self, torn: Sequence[Name]) -> None:
        memory, plan = self._held()
        again = Copy(memory, self._window_bytes, plan.late)
        try:
            again.start(min(len(os.sched_getaffinity(0)), _MOST_THREADS) - 1)
            again.work()
            again.wait()
        finally:
            again.end(DistckptError("it is over"))
        self._transfer_late.begin()
        self._transfer_late.hold_back()
        self._suspects.update(torn)
        _log.warning(
            "%s changed while it was being copied, and not by an optimizer's step: all that was being copied is saved "
            "as it is now, before that step. It will be copied before training goes on from now on",
            _names(torn),
        )
        with self._changed:
            self._measures["retakes"] += 1
            self._generation += 1
            self._torn = []
            self._changed.notify_all()

    def _refuse(self, torn: Sequence[Name]) -> None:
        self._suspects.update(torn)
        self._fail(
            DistckptError(
                f"{_names(torn)} changed while it was being copied, and not by an optimizer's step, so this is "
                'the state of no step. The next save copies it before training goes on; snapshot="eager" does so for '
                "all, and wait_staged() is to be called before such a change"
            )
        )

    def _is_whole(self, generation: int) -> bool:
        """Whether what was written is the snapshot, once that is known. Not so if it was taken again meanwhile."""
        with self._changed:
            while self._failure is None and self._torn != []:
                if self._torn and not threading.main_thread().is_alive():
                    self._refuse(self._torn)  # nobody is left who could take it again
                self._changed.wait(1.0)
        self._raise_failure()
        return generation == self._generation

    def _pieces(self, image: Image, start: int) -> Iterator[memoryview]:
        at, end = start, start + image.size_bytes
        while at < end:
            block = at // BLOCK_BYTES
            self._now.free(max(block - 1, 0))  # the one before may be just being written
            self._now.wait_for(block)
            self._late.wait_for(block)
            stop = min(end, (block + 1) * BLOCK_BYTES)
            place = at % self._window_bytes
            yield memoryview(self._memory[place : place + stop - at].numpy())  # type: ignore[arg-type]  # it is a buffer
            at = stop

    def _held(self) -> tuple[Tensor, Plan]:
        """What is copied where: both, or neither any more. The writer's thread may give them up at any time."""
        with self._changed:
            return self._memory, self._plan

    def _spend(self, phase: str, seconds: float) -> None:
        self._measures[f"{phase}_seconds"] += seconds

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
        self._now.fail(error)
        self._late.fail(error)
        self._begun.set()


def _names(torn: Sequence[Name]) -> str:
    more = f" and {len(torn) - _SHOWN} more tensors" if len(torn) > _SHOWN else ""
    return ", ".join(map(str, torn[:_SHOWN])) + more

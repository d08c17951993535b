"""What a save of a program does, whoever asks for it: buffers made equal, a plan, a snapshot, and the run's writer."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from distckpt import environment
from distckpt.buffers import Mode, sync_buffers
from distckpt.capturing import Capturing
from distckpt.progress import Progress
from distckpt.ranks import from_leader
from distckpt.run import Run
from distckpt.saving import Job
from distckpt.state import Parts
from distckpt.triggers import Triggers

_log = logging.getLogger("distckpt")


class Saver:
    """Saves ``parts`` in ``run``. Every method is collective.

    Args:
        triggers: what is due by time is due as long after each save.
        buffers_mode: see `distckpt.buffers.sync_buffers`.
        is_async: whether training goes on while a save is written.
        skips: whether what is due by the interval is left out while the save before is not durable.
    """

    def __init__(
        self,
        run: Run,
        parts: Parts,
        capturing: Capturing,
        *,
        triggers: Triggers,
        buffers_mode: Mode,
        is_async: bool,
        skips: bool,
    ) -> None:
        self._run = run
        self._parts = parts
        self._capturing = capturing
        self._triggers = triggers
        self._buffers_mode = buffers_mode
        self._is_async = is_async
        self._skips = skips
        self._environment = environment.describe()

    def save(self, progress: Progress, reasons: Sequence[str], metrics: Mapping[str, float]) -> None:
        """The state at ``progress`` is being saved, or already was.

        Raises:
            SaveFailed, TimeoutError: as in `Run.save`.
        """
        if self._run.saved == progress:
            return
        began = time.monotonic()
        if self._skips and [*reasons] == ["interval"] and self._is_busy():
            _log.warning("step %d is not saved: the save before it is not durable yet", progress.step)
            return
        self._run.collect()
        modules = self._parts.modules.values()
        sync_buffers(modules, self._buffers_mode, ranks=self._run.ranks, timeout=self._run.timeout)
        self._triggers.restart()
        self.prepare()
        job = Job(progress, tuple(reasons), self._capturing.take, metrics=metrics, environment=self._environment)
        self._run.save(job, began=began, wait=not self._is_async or self._triggers.should_stop)

    def prepare(self) -> None:
        """The ranks know who writes what of the state as it is now, see `Run.plan`."""
        self._run.plan(self._capturing.capture)

    def _is_busy(self) -> bool:
        # Whether a writer is done is seen by each rank at another time, so one of them says.
        return bool(from_leader(self._run.ranks, "look at the writer", lambda: self._run.is_busy))

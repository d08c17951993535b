"""Why a save is due at this step: the schedule, the clock, or somebody who asked by a control file."""

from __future__ import annotations

import logging
from datetime import timedelta

from distckpt import layout
from distckpt.agreeing import Request, Stopwatch
from distckpt.progress import Progress
from distckpt.ranks import is_leader
from distckpt.run import Run
from distckpt.schedule import Schedule

_log = logging.getLogger("distckpt")

_SAVE, _STOP = "save", "stop"
_CONTROL_FILES = {layout.SAVE: Request(_SAVE, "asked"), layout.STOP: Request(_STOP, "stop")}
_CONTROL_PERIOD = timedelta(seconds=1)


class Triggers:
    """Says at each step, with the same words on all ranks, why a save is due.

    The schedule is a function of progress, and costs nothing. What only the leader sees, its clock and the control
    files, becomes a request that all ranks act on at one step.
    """

    def __init__(self, schedule: Schedule, run: Run, *, by_epoch: bool) -> None:
        self.should_stop = False
        self._schedule = schedule
        self._run = run
        self._by_epoch = by_epoch
        self._period = Stopwatch(schedule.period) if schedule.period else None
        self._control = Stopwatch(_CONTROL_PERIOD)

    def due(self, progress: Progress, *, epoch_ends: bool, before: Progress | None = None) -> list[str]:
        """The reasons; none where nothing is due. Every rank, at every step.

        Args:
            before: what was done the last time, if it was not one step, or epoch, less.
        """
        if is_leader(self._run.ranks):
            self._look()
        last = None if before is None else self._count(before)
        is_due = (epoch_ends or not self._by_epoch) and self._schedule.due(self._count(progress), last)
        reasons = ["interval"] if is_due else []
        for request in self._run.boundary(progress.step):
            reasons.append(request.why)
            self.should_stop = self.should_stop or request.what == _STOP
        return reasons

    def restart(self) -> None:
        """Something was saved just now: the clock begins anew."""
        if self._period is not None:
            self._period.restart()

    def end(self) -> None:
        """Training has ended: whoever asked it to stop has that, and the next start is not stopped by it. Every rank;
        not collective."""
        if is_leader(self._run.ranks):
            for name in _CONTROL_FILES:
                if self._run.store.exists(name):
                    self._removes(name)

    def _count(self, progress: Progress) -> int:
        return progress.epoch if self._by_epoch else progress.step

    def _look(self) -> None:
        if self._period is not None and self._period.is_over:
            self._period.restart()
            self._run.requests.ask(Request(_SAVE, "interval"))
        if self._control.is_over:
            self._control.restart()
            for name, request in _CONTROL_FILES.items():
                if self._run.store.exists(name) and self._removes(name):
                    self._run.requests.ask(request)

    def _removes(self, name: str) -> bool:
        try:
            self._run.store.delete(name)
        except OSError as error:  # the leader's alone: raised here, it would leave the other ranks waiting
            _log.warning("%s: %s is not obeyed, as it cannot be removed: %s", self._run.store.url, name, error)
            return False
        return True

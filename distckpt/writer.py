"""One background thread that does one job at a time."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_log = logging.getLogger("distckpt")


class Writer:
    """Does jobs in the background, in the order in which they were submitted.

    An error of a job is in its future; the thread lives on. At the end of the process what was submitted is still
    finished, for at most ``exit_seconds``.
    """

    def __init__(self, name: str, *, exit_seconds: float = 600.0) -> None:
        self._name = name
        self._jobs: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._current: Future[Any] | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        mine = weakref.ref(self)
        self._at_exit = lambda: (writer := mine()) and writer.close(exit_seconds)
        atexit.register(self._at_exit)

    @property
    def is_busy(self) -> bool:
        """Whether a job is running or waiting to run."""
        with self._changed:
            return bool(self._jobs) or self._current is not None

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """The job will run after those before it.

        Raises:
            RuntimeError: after `close`.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("this writer is closed")
            future: Future[T] = Future()
            self._jobs.append((job, future))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return future

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Whether all jobs ended within that time. Does not raise their errors."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and self._current is None, timeout_seconds)

    def close(self, timeout_seconds: float | None = None) -> bool:
        """No job is taken any more. Whether all ended within that time. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        atexit.unregister(self._at_exit)
        done = self.wait(timeout_seconds)
        if done and self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_seconds)
        if not done:
            _log.warning(
                "%s: given up after %s seconds; what was being saved is not committed", self._name, timeout_seconds
            )
        return done

    def _run(self) -> None:
        while (next_job := self._next()) is not None:
            job, future = next_job
            try:
                if not future.set_running_or_notify_cancel():
                    continue
                future.set_result(job())
            except BaseException as error:  # raised by the training thread, when it asks the future
                future.set_exception(error)
            finally:
                with self._changed:
                    self._current = None
                    self._changed.notify_all()

    def _next(self) -> tuple[Callable[[], Any], Future[Any]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return None
            job, self._current = self._jobs.pop(0)
            return job, self._current

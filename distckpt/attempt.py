"""Who may write into a run's directory: the attempt, a number that every start of the run raises.

Workers outlive a launcher that was killed, and a preempted job may linger on another node. Locks tell people so,
but are no fence on network file systems. The fence is the number: a writer looks for a higher one before each
commit and before each deletion, and if there is one, writes nothing more.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from distckpt import layout, strict_json
from distckpt.errors import DirectoryInUse, Superseded
from distckpt.stores import Store
from distckpt.strict_json import take

_log = logging.getLogger("distckpt")

# A pipe, a link, a directory or something huge in place of a file: it will not be one later.
_NO_FILE = {errno.EINVAL, errno.ELOOP, errno.EISDIR, errno.EFBIG}


@dataclass(frozen=True)
class Holder:
    """The process that leads an attempt. ``job`` is what its restarts have in common, "" if nothing is known."""

    host: str
    pid: int
    since: str
    job: str = ""

    @classmethod
    def here(cls) -> Holder:
        """This process, in the job that its launcher's variables name."""
        return cls(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"), _job())

    def __str__(self) -> str:
        job = f" of job {self.job}" if self.job else ""
        return f"process {self.pid}{job} on {self.host}, since {self.since}"


@dataclass(frozen=True)
class Attempt:
    """One start of a run. ``run`` is the id of the directory, the same for all its attempts."""

    store: Store
    run: str
    number: int
    holder: Holder

    @classmethod
    def start(cls, store: Store, holder: Holder, *, continues: str | None = None) -> Attempt:
        """The directory is this process's. Leader only.

        Args:
            continues: the run that this start goes on with. Where the directory holds another one, this is a new run,
                as it is with ``""``: what the other left is not its own. None goes on with whatever is there.

        Raises:
            DirectoryInUse: where another live process holds it that is not of the same job.
            OSError: where the directory cannot be written.
        """
        state = _read_state(store)
        _refuse_live_holder(store, state, holder)
        held = state["run"] if state else continues
        run = held if held and continues in (None, held) else secrets.token_hex(8)
        attempt = cls(store, run, max([*_numbers(store), state["attempt"] if state else 0]) + 1, holder)
        try:
            attempt._take_number()
            attempt._write_state("running")
            for old in _numbers(store):
                if old < attempt.number:
                    store.delete(layout.attempt_file(old))
        except BaseException:
            store.release(layout.LOCK)
            raise
        return attempt

    def check(self) -> None:
        """This attempt is still the newest. Leader only; one listing.

        Raises:
            Superseded: naming the newer one.
        """
        newest = max(_numbers(self.store), default=self.number)
        if newest > self.number:
            state = _read_state(self.store)
            who = f" ({state['holder']})" if state and state["attempt"] == newest else ""
            raise Superseded(
                f"{self.store.url}: attempt {newest}{who} has taken over from attempt {self.number} "
                f"({self.holder}), which saves no more: stop this process"
            )

    def end(self) -> None:
        """The directory is free for the next process, and what the store kept for this one is gone. Leader only."""
        try:
            self.store.drop_spares()
        finally:
            if max(_numbers(self.store), default=self.number) == self.number:
                self._write_state("finished")
            self.store.release(layout.LOCK)

    def _take_number(self) -> None:
        mark = layout.attempt_file(self.number)
        try:
            self.store.publish(mark, self._told("running"))
            # Where two others came in between, the second has removed the first one's mark, so that ours was free.
            is_ours = max(_numbers(self.store), default=self.number) == self.number
        except FileExistsError:
            is_ours = False
        if not is_ours:
            raise DirectoryInUse(f"{self.store.url}: another process started at the same moment; it goes on")

    def _write_state(self, state: str) -> None:
        self.store.put(layout.RUN, self._told(state))

    def _told(self, state: str) -> bytes:
        return strict_json.dump(
            {"run": self.run, "attempt": self.number, "state": state, "holder": asdict(self.holder)}
        )


def _refuse_live_holder(store: Store, state: dict[str, Any] | None, holder: Holder) -> None:
    was_free = store.hold(layout.LOCK)
    other: Holder | None = state["holder"] if state else None
    if was_free:
        if state and other and state["state"] == "running" and other.host != holder.host:
            _log.warning("%s: taking over from %s, which did not end in order", store.url, other)
        return
    if other and (holder.job and other.job == holder.job):
        return
    raise DirectoryInUse(
        f"{store.url} is in use by {other or 'another process'}: two runs cannot save into one directory. "
        "End that process, or give this run a directory of its own"
    )


def _read_state(store: Store) -> dict[str, Any] | None:
    """What the newest attempt says of itself: in run.json or, where that is older or lost, in its own mark."""
    state = _read_told(store, layout.RUN)
    newest = max(_numbers(store), default=0)
    if newest > (state["attempt"] if state else 0):
        return _read_told(store, layout.attempt_file(newest)) or state
    return state


def _read_told(store: Store, path: str) -> dict[str, Any] | None:
    try:
        fields = strict_json.load(store.read(path), path)
        holder = take(fields, "holder", dict, path)
        attempt = take(fields, "attempt", int, path)
        if attempt < 1 or layout.parse_attempt(layout.attempt_file(attempt)) != attempt:
            raise ValueError(f"{path}: there is no attempt {attempt}")
        return {
            "run": take(fields, "run", str, path),
            "attempt": attempt,
            "state": take(fields, "state", str, path),
            "holder": Holder(
                host=take(holder, "host", str, path),
                pid=take(holder, "pid", int, path),
                since=take(holder, "since", str, path),
                job=take(holder, "job", str, path),
            ),
        }
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_FILE:
            raise
        # A run goes on without it: checkpoints have records of their own, and the number is in the name of the mark.
        _log.warning("%s: the run goes on without what %s said: %s", store.url, path, error)
        return None


def _numbers(store: Store) -> list[int]:
    return [number for name in store.list() if (number := layout.parse_attempt(name)) is not None]


def _job() -> str:
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"slurm {job}"
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun says "none" where nobody chose an id
    return "" if run == "none" else f"torchrun {run}"

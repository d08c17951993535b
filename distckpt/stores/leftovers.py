"""What is written beside its place until it is whole, and what of that processes have left that were killed.

A process that writes so into a folder has a shared lock on it, which ends with the process. Whoever has the lock alone
is sure that nobody else writes there, among those whose locks it sees: the processes of one kernel, in one mounted file
system. The name of a draft tells of which. What those of another machine have left is nobody's to judge.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distckpt import layout
from distckpt.stores.local import LocalStore

_log = logging.getLogger("distckpt")

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

# As long as another process may take to remove what it finds: it has the folder alone for that time.
_PATIENCE_SECONDS = 60.0


@contextmanager
def drafts_in(store: LocalStore) -> Iterator[Callable[[str], Path]]:
    """What gives a new name in the root of ``store`` for what will be called so and so. What was written there under
    such a name by processes that were killed is gone, and what this one writes is safe until the context is left.

    Raises:
        BlockingIOError: where somebody else has locked that folder, and does not go.
    """
    fd = os.open(store.root, _FOLDER)
    try:
        domain = _domain(fd)
        if domain and _lock(fd, fcntl.LOCK_EX):
            _sweep(store, domain)
        _share(fd, store.root)
        yield lambda name: store.root / layout.export_draft(name, domain or secrets.token_hex(4), secrets.token_hex(4))
    finally:
        os.close(fd)


def remove(place: Path) -> None:
    """Nothing is there any more."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _domain(fd: int) -> str | None:
    """Where the lock of the folder is seen; ``None`` where that cannot be told."""
    try:
        boot = _BOOT.read_bytes()
    except OSError:
        return None
    return hashlib.sha256(b"%s%d" % (boot, os.fstat(fd).st_dev)).hexdigest()[:8]


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError:  # somebody else has it, or the file system has none
        return False
    return True


def _share(fd: int, folder: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                words = f"somebody has locked it for more than {_PATIENCE_SECONDS:.0f} s, so nothing is written there"
                raise BlockingIOError(errno.EAGAIN, words, str(folder)) from None
        except OSError:  # there are none, so nobody is alone there either
            return
        time.sleep(0.05)


def _sweep(store: LocalStore, domain: str) -> None:
    found = {place: layout.domain_of_export(place.name) for place in sorted(store.root.iterdir())}
    if domain in found.values():
        store.settle()  # else what was replaced could have its name back after a power cut, but no longer be whole
    for place, other in found.items():
        if other == domain:
            try:
                remove(place)
                _log.info("%s was left by an export that was killed, and is removed", place)
            except OSError as error:
                _log.warning("%s was left by an export that was killed, and cannot be removed: %s", place, error)
        elif other is not None:
            _log.info("%s is of an export on another machine, or from before this one was started: is it over?", place)

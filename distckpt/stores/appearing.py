"""A file or folder that appears whole under its name, or not at all."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distckpt import layout
from distckpt.stores.local import LocalStore

_log = logging.getLogger("distckpt")

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


def refuse_taken(target: Path, may_replace: Callable[[Path], bool] | None) -> None:
    """There is nothing at ``target``, or what may be replaced.

    Args:
        may_replace: whether what is there may be; ``None``: nothing may.

    Raises:
        FileExistsError: naming it.
    """
    if not os.path.lexists(target):
        return
    if may_replace is None:
        raise FileExistsError(errno.EEXIST, "there is one already; overwrite=True replaces it", str(target))
    if not may_replace(target):
        what = "a folder" if target.is_dir() else "a file"
        raise FileExistsError(
            errno.EEXIST, f"there is {what} that is no export of this kind, so it is not replaced", str(target)
        )


@contextmanager
def appearing(target: Path, may_replace: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A path beside ``target`` for a new file or folder, the files of which are durable. When the context is left
    without an error it is at ``target``, durably; with one it is gone, and ``target`` is as before.

    A folder that is replaced is moved away first: killed right then, there is none of that name, and the old one lies
    beside it.

    Args:
        may_replace: see `refuse_taken`.

    Raises:
        FileExistsError: where there is something at ``target``, also if it came there meanwhile.
        OSError: where the folder of ``target`` cannot be made or written.
    """
    store = LocalStore(target.parent)
    store.make_root()
    refuse_taken(target, may_replace)
    draft = _beside(target)
    try:
        yield draft
        refuse_taken(target, may_replace)
        if draft.is_dir():
            store.settle(draft.name)
            _move_folder(draft, target)
        elif may_replace is None:
            _publish(draft, target)
        else:
            draft.rename(target)
        store.settle()
    finally:
        _remove(draft)


def _beside(target: Path) -> Path:
    return target.with_name(f"{layout.EXPORT_PREFIX}{target.name[:60]}-{secrets.token_hex(4)}")


def _publish(draft: Path, target: Path) -> None:
    """A rename would replace what came there meanwhile."""
    try:
        os.link(draft, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        refuse_taken(target, None)
        draft.rename(target)


def _move_folder(draft: Path, target: Path) -> None:
    if not os.path.lexists(target):
        draft.rename(target)
        return
    old = _beside(target)
    target.rename(old)
    try:
        draft.rename(target)
    except BaseException:
        old.rename(target)
        raise
    try:
        _remove(old)
    except OSError as error:
        _log.warning("%s was replaced, but what was there before is left in %s: %s", target, old, error)


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)

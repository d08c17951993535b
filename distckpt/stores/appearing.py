"""A file or folder that appears whole under its name, or not at all."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distckpt import layout
from distckpt.stores.leftovers import drafts_in, remove
from distckpt.stores.local import LocalStore

_log = logging.getLogger("distckpt")

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}

_FROM_HERE = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE
_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # which musl has not


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
    without an error it is at ``target``, durably; with one it is gone, and ``target`` is as before. What was left there
    by processes that were killed in such a context is gone, too: see `distckpt.stores.leftovers`.

    Where the file system cannot exchange two names (NFS), a folder that is replaced is moved away first: killed right
    then, there is none of that name, and the old one lies beside it.

    Args:
        may_replace: see `refuse_taken`.

    Raises:
        FileExistsError: where there is something at ``target``, also if it came there meanwhile.
        OSError: where the folder of ``target`` cannot be made or written.
    """
    store = LocalStore(target.parent)
    store.make_root()
    refuse_taken(target, may_replace)
    with drafts_in(store) as new_draft:
        draft = new_draft(target.name)
        own: os.stat_result | None = None
        try:
            yield draft
            refuse_taken(target, may_replace)
            own = draft.lstat()
            if draft.is_dir():
                store.settle(draft.name)
            left = [draft, *_move(draft, target, store.settle)]
        except BaseException:
            # Where a move could not be undone, what was at the target lies there.
            if own is None or (os.path.lexists(draft) and os.path.samestat(draft.lstat(), own)):
                remove(draft)
            raise
        for place in left:
            try:
                remove(place)
            except OSError as error:
                _log.warning("%s is there, but what was there before is left in %s: %s", target, place, error)


def _move(draft: Path, target: Path, settle: Callable[[], None]) -> list[Path]:
    """The draft is at ``target``, durably. Where else than at ``draft`` what was there may lie now.

    Raises:
        OSError: where that is not so; the target is as before then.
    """
    if not os.path.lexists(target):
        with _or(_move_to_nothing(draft, target)):
            settle()
        return []
    if _exchange(draft, target):
        with _or(lambda: _exchange(draft, target)):
            settle()
        return []
    if not draft.is_dir():
        draft.rename(target)
        settle()
        return []
    old = target.with_name(layout.replaced(target.name))
    remove(old)  # what is at the target came after it
    target.rename(old)
    with _or(lambda: old.rename(target)):
        draft.rename(target)
        with _or(lambda: target.rename(draft)):
            settle()
    return [old]


def _move_to_nothing(draft: Path, target: Path) -> Callable[[], object]:
    """What undoes it."""
    if not draft.is_dir():
        try:
            os.link(draft, target)  # a rename would replace what came there meanwhile
            return target.unlink
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            refuse_taken(target, None)
    draft.rename(target)
    return lambda: target.rename(draft)


def _exchange(one: Path, other: Path) -> bool:
    """Whether each has the name of the other now, which not every file system can do."""
    if _renameat2 is None:
        return False
    if _renameat2(_FROM_HERE, os.fsencode(one), _FROM_HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@contextmanager
def _or(undo: Callable[[], object]) -> Iterator[None]:
    """Where it fails, ``undo`` is done."""
    try:
        yield
    except BaseException:
        undo()
        raise

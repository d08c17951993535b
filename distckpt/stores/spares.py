"""Large files of a deleted checkpoint that the next ones are written over: where a file has its blocks, that is up to
twice as fast.

Nobody may see it. So a file is written over only while it has one name and nobody has it open or mapped, in whatever
process. Who is asked is the kernel, which gives a write lease on no other file; but it knows this only of its own file
systems: not of a network's other machines, nor, on overlayfs, of mappings.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import secrets
import signal
import stat
from contextlib import suppress
from pathlib import Path

from distckpt import layout

_log = logging.getLogger("distckpt")

# Less is written as fast into a new file, and needs no place of its own meanwhile.
LEAST_BYTES = 16 * 1024 * 1024

_SPARE = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

# As statfs calls them: ext4, XFS, tmpfs. Others do not know who has a file mapped, or write to new blocks anyway.
_LOCAL = {0xEF53, 0x58465342, 0x01021994}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.statfs.argtypes = [ctypes.c_char_p, ctypes.c_void_p]


class Spares:
    """What was kept of one folder, by the names that the files had there. Each is used once, or dropped.

    Args:
        root: where they lie meanwhile, on the file system of that folder, under names that nobody else reads.
        takes: whether those are used, too, that another process kept: one rank deletes what all of them wrote.
    """

    def __init__(self, root: Path, *, takes: bool = False) -> None:
        self._root = root
        self._takes = takes
        self._kept: dict[str, Path] = {}

    def __contains__(self, name: str) -> bool:
        """Whether what has that name in the root is one of them."""
        return any(spare.name == name for spare in list(self._kept.values()))

    def keep(self, folder: Path) -> None:
        """What can be of use later is not in ``folder`` any more, which is being deleted. What was kept before is
        gone. An error only means that less is kept."""
        try:
            self.drop()
            if not is_local(self._root):
                return
            for entry in os.scandir(folder):
                if _is_fit(entry.stat(follow_symlinks=False)):
                    self._take_out(Path(entry.path))
        except OSError as error:
            _log.debug("%s: not all of it can be written over: %s", folder, error)

    def put_in_place_of(self, fd: int, place: Path) -> int:
        """The file to write ``place`` with, from its start: the spare for it, which has its name and is as a new file
        would be, but for its bytes; else ``fd``, as it was.

        Args:
            fd: the file at ``place``, which is new and empty. Closed if it is not returned.
        """
        spare = self._kept.pop(place.name, None) or self._of_another(place.name)
        if spare is None:
            return fd
        try:
            found = os.open(spare, _SPARE)
        except OSError as error:  # a newer attempt may have swept it
            _log.debug("%s: nothing to write it over: %s", place, error)
            return fd
        try:
            if _is_fit(os.fstat(found)) and _is_alike(found, fd):
                _refuse_shared(found)
                _replace(fd, place, spare)
                with suppress(OSError):  # it has no name any more, and nothing was written to it
                    os.close(fd)
                return found
        except OSError as error:
            _log.debug("%s: %s cannot be written over: %s", place, spare.name, error)
        with suppress(OSError):  # a later sweep takes it
            spare.unlink(missing_ok=True)
        os.close(found)
        return fd

    def drop(self) -> None:
        """Nothing is kept any more."""
        for name in list(self._kept):
            if (spare := self._kept.pop(name, None)) is not None:
                spare.unlink(missing_ok=True)

    def _of_another(self, name: str) -> Path | None:
        if not self._takes or not is_local(self._root):
            return None
        start = f"{layout.SPARE_PREFIX}{name}-"
        return next((place for place in self._root.iterdir() if place.name.startswith(start)), None)

    def _take_out(self, place: Path) -> None:
        spare = self._root / f"{layout.SPARE_PREFIX}{place.name}-{secrets.token_hex(4)}"
        self._kept[place.name] = spare  # before it is there, or a sweep on another thread could see it
        place.rename(spare)


def is_local(folder: Path) -> bool:
    """Whether the kernel knows of everybody who uses a file there, on this machine."""
    told = (ctypes.c_long * 64)()  # struct statfs has less, and begins with the type
    return _libc.statfs(os.fsencode(folder), told) == 0 and told[0] in _LOCAL


def _is_fit(status: os.stat_result) -> bool:
    """Whether it is a large file of ours that has one name. Users keep a checkpoint by linking it: ``cp -al``."""
    is_ours = status.st_uid == os.geteuid()
    return stat.S_ISREG(status.st_mode) and is_ours and status.st_nlink == 1 and status.st_size >= LEAST_BYTES


def _is_alike(fd: int, new: int) -> bool:
    """Whether the same people may do the same with both."""
    one, other = os.fstat(fd), os.fstat(new)
    has_same_rights = (one.st_mode, one.st_uid, one.st_gid) == (other.st_mode, other.st_uid, other.st_gid)
    return has_same_rights and sorted(os.listxattr(fd)) == sorted(os.listxattr(new))


def _refuse_shared(fd: int) -> None:
    """Nobody else has the file open or mapped.

    Raises:
        OSError: where somebody has, or the kernel does not tell.
    """
    # Whoever opens it while the lease is held makes the kernel send a signal: that of default would end the process.
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def _replace(fd: int, place: Path, spare: Path) -> None:
    """The file ``spare`` is at ``place``, where that of ``fd`` was.

    Raises:
        OSError: where it was there no more.
    """
    folder = os.open(place.parent, _FOLDER)
    try:
        # A newer attempt may have moved our folder away, and have one of that name: in ours nobody else makes files.
        if not os.path.samestat(os.stat(place.name, dir_fd=folder, follow_symlinks=False), os.fstat(fd)):
            raise FileNotFoundError(f"{place} is another file by now")
        os.rename(spare, place.name, dst_dir_fd=folder)
    finally:
        os.close(folder)

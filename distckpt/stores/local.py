"""Checkpoints in a directory of a POSIX file system.

Correct under POSIX alone: bytes are durable after ``fsync`` of the file, names after ``fsync`` of the directory,
and neither implies the other.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path, PurePosixPath

from distckpt import layout, strict_json
from distckpt.stores.direct import Direct
from distckpt.stores.file_sink import PIECE_BYTES, FileSink
from distckpt.stores.file_source import FileSource
from distckpt.stores.naming import naming
from distckpt.stores.spares import Spares

_log = logging.getLogger("distckpt")

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_ANY = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

# Some network and FUSE mounts refuse these calls; every other error is an error.
_NO_FSYNC_OF_FOLDERS = {errno.EINVAL, errno.ENOTSUP}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}


class LocalStore:
    """A directory of a POSIX file system; see `distckpt.stores.Store` for what each method promises.

    Args:
        recycles: whether `recycle_folder` keeps files to be written over.
    """

    def __init__(self, root: str | os.PathLike[str], *, recycles: bool = False) -> None:
        self.root = Path(root).absolute()
        self.url = str(root)
        self._direct = Direct(self.url)
        self._recycles = recycles
        self._spares = Spares(self.root, takes=recycles)
        self._locks: dict[str, int] = {}
        self._has_warned = False
        self.neighbours = 1

    def make_root(self) -> None:
        """The directory exists and can be written, its own name and its parents' durable.

        Raises:
            NotADirectoryError, PermissionError, OSError: naming the path that is in the way.
        """
        missing = [self.root]
        while not missing[-1].exists():
            missing.append(missing[-1].parent)
        if not missing[-1].is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a directory, so no checkpoint can go there", str(missing[-1]))
        self._settle_name_of(missing[-1])
        for folder in reversed(missing[:-1]):
            folder.mkdir(exist_ok=True)
            self._fsync_folder(folder.parent)
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission to write checkpoints there", str(self.root))

    def list(self, folder: str = "") -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self._at(folder)) if entry.name not in self._spares)
        except FileNotFoundError:
            return []

    def read(self, path: str) -> bytes:
        with self.open(path) as source:
            if source.size_bytes > strict_json.LIMIT_BYTES:
                raise OSError(errno.EFBIG, f"{source.size_bytes} bytes are too many for a file of ours", str(path))
            data = bytearray(source.size_bytes)
            source.read_into(data)
            return bytes(data)

    @contextmanager
    def open(self, path: str) -> Iterator[FileSource]:
        place = self._at(path)
        fd = os.open(place, _READ)
        try:
            size_bytes = _regular(fd, place).st_size
            with closing(FileSource(fd, place, size_bytes, self._direct, neighbours=self.neighbours)) as source:
                yield source
        finally:
            os.close(fd)

    @contextmanager
    def create(self, path: str) -> Iterator[FileSink]:
        place = self._at(path)
        fd = self._spares.put_in_place_of(os.open(place, _NEW, 0o666), place)
        own = os.fstat(fd)
        is_open = True
        try:
            sink = FileSink(fd, place, self._direct)
            yield sink
            with naming(place):
                if own.st_size > sink.size_bytes:
                    os.ftruncate(fd, sink.size_bytes)  # what it was written over was longer
                os.fsync(fd)
                is_open = False
                os.close(fd)
        except BaseException:
            # After a failed write or fsync the kernel may have dropped the bytes: the file is lost, never retried.
            _remove(place, own)
            if is_open:
                os.close(fd)
            with suppress(OSError):  # they may be what the disk is full of
                self._spares.drop()
            raise

    def put(self, path: str, data: bytes) -> None:
        with self._draft(path, data) as draft:
            draft.rename(self._at(path))
        self._fsync_folder(self._at(path).parent)

    def publish(self, path: str, data: bytes) -> None:
        place = self._at(path)
        with self._draft(path, data) as draft:
            try:
                os.link(draft, place)
            except FileExistsError:
                # On NFS a link that succeeded can say so when the first reply was lost.
                if not place.exists() or not draft.samefile(place):
                    raise
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if place.exists():
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place)) from None
                draft.rename(place)
        self._fsync_folder(place.parent)

    def append(self, path: str, data: bytes) -> None:
        place = self._at(path)
        fd = os.open(place, _ANY | os.O_WRONLY | os.O_APPEND, 0o666)
        try:
            _regular(fd, place)
            FileSink(fd, place, Direct(self.url, is_refused=True)).write(data)
        finally:
            os.close(fd)

    def make_folder(self, path: str) -> None:
        self._at(path).mkdir()

    def settle(self, folder: str = "") -> None:
        self._fsync_folder(self._at(folder))

    def move(self, source: str, target: str) -> None:
        self._at(source).rename(self._at(target))

    def link(self, source: str, target: str) -> None:
        place, draft = self._at(target), self._draft_of(target)
        try:
            try:
                os.link(self._at(source), draft)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                self._copy(source, draft)
            draft.rename(place)
        finally:
            # Where both names are one file already, rename does nothing and leaves the draft.
            draft.unlink(missing_ok=True)
        self._fsync_folder(place.parent)

    def point(self, label: str, target: str | None) -> None:
        place = self._at(label)
        if target is None:
            if place.is_symlink():
                place.unlink(missing_ok=True)
            return
        if place.exists() and not place.is_symlink():
            raise FileExistsError(errno.EEXIST, "a file that is no label of ours has its name", str(place))
        if place.is_symlink() and str(place.readlink()) == target:
            return
        draft = self._draft_of(label)
        draft.symlink_to(target)
        draft.rename(place)

    def delete(self, path: str) -> None:
        self._at(path).unlink(missing_ok=True)

    def delete_folder(self, path: str) -> None:
        place = self._at(path)
        if place.is_symlink():
            place.unlink(missing_ok=True)  # what it leads to is not ours
        elif place.exists():
            shutil.rmtree(place)

    def recycle_folder(self, path: str) -> None:
        place = self._at(path)
        if self._recycles and not place.is_symlink():
            self._spares.keep(place)
        self.delete_folder(path)

    def drop_spares(self) -> None:
        self._spares.drop()

    def exists(self, path: str) -> bool:
        return os.path.lexists(self._at(path))

    def hold(self, path: str) -> bool:
        if path in self._locks:
            return True
        # POSIX record locks: unlike flock they are not inherited by the forked workers of a data loader, which
        # would hold it on for a while after the trainer was killed.
        fd = os.open(self._at(path), _ANY | os.O_RDWR, 0o666)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in _NO_LOCKS:
                return True
            if error.errno in {errno.EACCES, errno.EAGAIN}:
                return False
            raise
        self._locks[path] = fd
        return True

    def release(self, path: str) -> None:
        fd = self._locks.pop(path, None)
        if fd is not None:
            os.close(fd)

    def free_bytes(self) -> int | None:
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    def _settle_name_of(self, folder: Path) -> None:
        """Whoever made the folder may not have made its name durable."""
        try:
            self._fsync_folder(folder.parent)
        except PermissionError as error:
            _log.debug("%s: its name cannot be made durable: %s", folder, error)

    def _at(self, path: str) -> Path:
        parts = PurePosixPath(path).parts
        if "\0" in path or ".." in parts or path.startswith("/"):
            raise ValueError(f"{ascii(path)[:200]} leaves the directory {self.url}")
        return self.root.joinpath(*parts)

    def _draft_of(self, path: str) -> Path:
        # In the same directory: a rename to another one is two changes, to another mount none.
        place = self._at(path)
        return place.with_name(f"{layout.DRAFT_PREFIX}{place.name}-{secrets.token_hex(4)}")

    @contextmanager
    def _draft(self, path: str, data: bytes) -> Iterator[Path]:
        draft = self._draft_of(path)
        with self.create(str(draft.relative_to(self.root))) as sink:
            sink.write(data)
        try:
            yield draft
        finally:
            try:
                draft.unlink(missing_ok=True)
            except OSError as error:
                # What was to be published is, and a sweep takes drafts.
                _log.warning("%s: a draft could not be removed: %s", draft, error)

    def _copy(self, source: str, target: Path) -> None:
        with self.open(source) as old, self.create(str(target.relative_to(self.root))) as new:
            left = old.size_bytes
            while left:
                piece = bytearray(min(left, PIECE_BYTES))
                old.read_into(piece)
                new.write(piece)
                left -= len(piece)

    def _fsync_folder(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with naming(folder):
                os.fsync(fd)
        except OSError as error:
            if error.errno not in _NO_FSYNC_OF_FOLDERS:
                raise
            if not self._has_warned:
                _log.warning("%s: this file system cannot make names durable: fsync says %s", self.url, error)
            self._has_warned = True
        finally:
            os.close(fd)


def _regular(fd: int, place: Path) -> os.stat_result:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(place))
    return status


def _remove(place: Path, own: os.stat_result) -> None:
    """The file is gone, unless the name is another file's by now: one that a newer attempt has committed, perhaps."""
    with suppress(OSError):  # what is left is no checkpoint, and the error that led here says more
        if os.path.samestat(place.lstat(), own):
            place.unlink()

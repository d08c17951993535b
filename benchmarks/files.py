"""The files that a contender left: which are new, whether they are durable, whether they lie in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PIECE_BYTES = 1 << 24
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class File:
    """A file as it was found; one that was written into since is another."""

    path: Path
    inode: int
    size_bytes: int
    modified_ns: int


def files_in(directory: Path) -> Iterator[File]:
    """All regular files below ``directory``; links are not followed."""
    for folder, _, files in os.walk(directory):
        for name in files:
            path = Path(folder, name)
            if not path.is_symlink():
                status = path.stat()
                yield File(path, status.st_ino, status.st_size, status.st_mtime_ns)


def bytes_in(files: Iterable[File]) -> int:
    """Their sizes, each inode once."""
    return sum({file.inode: file.size_bytes for file in files}.values())


def fsync(path: Path) -> None:
    """The bytes of a file, or the names in a folder, are durable on return."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_durable(directory: Path, files: Iterable[File]) -> None:
    """Fsync these files and every folder. What was durable already takes no time worth counting."""
    for file in files:
        fsync(file.path)
    for folder, _, _ in os.walk(directory, topdown=False):
        fsync(Path(folder))


def drop_from_cache(directory: Path) -> None:
    """No byte of the files below ``directory`` is in the page cache, as far as the kernel does as it is told."""
    for file in files_in(directory):
        descriptor = os.open(file.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is dirty stays
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def bring_into_cache(directory: Path) -> None:
    """All files below ``directory`` were read, through the page cache."""
    piece = bytearray(PIECE_BYTES)
    for file in files_in(directory):
        with file.path.open("rb", buffering=0) as opened:
            while opened.readinto(piece):
                pass


def cached_share(directory: Path) -> float:
    """Which share of the pages of the files below ``directory`` is in the page cache."""
    sizes = {file.path: file.size_bytes for file in files_in(directory) if file.size_bytes}
    pages = sum(-(-size // mmap.PAGESIZE) for size in sizes.values())
    return sum(_cached_pages(path, size) for path, size in sizes.items()) / max(1, pages)


def _cached_pages(path: Path, size_bytes: int) -> int:
    told = (ctypes.c_ubyte * -(-size_bytes // mmap.PAGESIZE))()
    # A private mapping may be written to, which is what ctypes asks for; nothing is read or written through it.
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), size_bytes, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(first))
        failed = _libc.mincore(address, ctypes.c_size_t(size_bytes), told)
        del first  # else the mapping could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore of {path.name}")
    return sum(byte & 1 for byte in bytes(told))

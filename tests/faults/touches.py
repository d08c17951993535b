"""What processes do to files in the tests of the shim itself."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import shim


def put(root: Path) -> None:
    """One careful small file, in the calls that the tests below expect."""
    draft = os.open(root / "draft", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(draft, b"0123456789")
    os.fsync(draft)
    os.close(draft)
    (root / "draft").rename(root / "name")
    folder = os.open(root, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def read(root: Path) -> None:
    sorted(root.iterdir())
    (root / "name").read_bytes()


def report_errors(root: Path) -> None:
    try:
        put(root)
    except OSError as error:
        shim.say(f"{errno.errorcode[error.errno or 0]} {error.filename}")


def touch_in_every_way(root: Path) -> None:
    """Each way in which Python can change a file or a name, with absolute and relative names and descriptors."""
    os.chdir(root)
    at = os.open(".", os.O_RDONLY)
    (root / "one").write_bytes(b"a" * 100_000)
    with open("one", "r+b", buffering=0) as file:  # noqa: PTH123 - what is tested is open itself
        os.pwrite(file.fileno(), b"bcd", 50)
        os.writev(file.fileno(), [b"ef", b"gh"])
        os.pwritev(file.fileno(), [b"ij", b"kl"], 99_998)
        os.posix_fallocate(file.fileno(), 0, 120_000)
        file.truncate(110_000)
        os.fdatasync(file.fileno())
    with open("one", "ab") as file:  # noqa: PTH123
        file.write(b"the end")
    os.truncate("one", 110_003)
    shutil.copy("one", "two")
    os.mkdir("folder", dir_fd=at)
    inside = os.open("folder", os.O_RDONLY, dir_fd=at)
    os.rename("two", "three", src_dir_fd=at, dst_dir_fd=inside)
    with open("one", "rb") as source, open("copied", "wb") as target:  # noqa: PTH123
        os.copy_file_range(source.fileno(), target.fileno(), 1000)
        os.sendfile(target.fileno(), source.fileno(), 5, 1000)
    os.link("one", "folder/../four")
    os.link("four", "five", src_dir_fd=at, dst_dir_fd=inside)
    os.symlink("folder", "way", dir_fd=at)
    Path("way/five").unlink()
    Path("four").replace("way/three")
    (root / "gone").mkdir()
    os.rmdir("gone", dir_fd=at)
    (root / "one").write_bytes(b"anew")
    shutil.copytree("folder", "tree")
    shutil.rmtree("folder")
    nameless = os.open(".", os.O_TMPFILE | os.O_WRONLY)
    os.write(nameless, b"now it has a name")
    os.link(f"/proc/self/fd/{nameless}", "named", src_dir_fd=at, follow_symlinks=True)


def put_in_turns(root: Path, *, name: str) -> None:
    """Files of others are replaced, which do the same."""
    for number in range(1000):
        (root / name).write_bytes(f"{name} {number}".encode() * 300)
        (root / name).replace(root / "name")


def put_beside(root: Path) -> None:
    put(root.parent)

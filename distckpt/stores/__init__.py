"""The contract of a store: where the bytes of checkpoints lie."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Sink(Protocol):
    """A new file that is being written from its start to its end."""

    def write(self, data: Buffer) -> None:
        """Append all of ``data``. It costs least where data and their place in the file begin on 4 KiB boundaries: a
        store may then write them without a copy."""
        ...


class Source(Protocol):
    """A file that is read from its start to its end."""

    size_bytes: int

    def read_into(self, target: Buffer) -> None:
        """Fill all of ``target`` with the next bytes; ``EOFError`` where the file ends before. A large file may be read
        ahead, in the background, until the context is left."""
        ...

    def skip(self, count: int) -> None:
        """Go on with what comes so many bytes later."""
        ...

    def expect(self, ranges: Sequence[tuple[int, int]], *, by_all: bool = False) -> None:
        """Of what comes, these will be read, in order, from where to where in the file, and the rest skipped: nothing
        else need be read ahead.

        Args:
            by_all: whether all `Store.neighbours` read the same about now, so that one could bring it in for all.
        """
        ...


class Store(Protocol):
    """A directory, wherever it lies. Paths are relative to it, with ``/``, and never leave it.

    *Durable* means: still there after the power was cut. Errors are ``OSError`` with the path in them.
    """

    url: str
    neighbours: int
    """How many processes of this machine restore from it together; 1 as long as nobody says otherwise."""

    def list(self, folder: str = "") -> list[str]:
        """The names in ``folder``, sorted, without those of files that `recycle_folder` kept. A folder that is not
        there has none."""
        ...

    def read(self, path: str) -> bytes:
        """The bytes of a small file. ``OSError`` if it is larger than JSON of ours can be."""
        ...

    def open(self, path: str) -> AbstractContextManager[Source]:
        """A file to read. Only a regular file: a pipe or a link raises ``OSError`` instead of hanging."""
        ...

    def create(self, path: str) -> AbstractContextManager[Sink]:
        """A new file; ``FileExistsError`` if there is one. Leaving the context without an error makes its bytes
        durable, its name only after `settle`. Leaving it with an error removes the file."""
        ...

    def put(self, path: str, data: bytes) -> None:
        """``data`` under that name, whole or not at all, replacing what was there. Durable on return."""
        ...

    def publish(self, path: str, data: bytes) -> None:
        """As `put`, but ``FileExistsError`` if the name is taken: of two callers one wins."""
        ...

    def append(self, path: str, data: bytes) -> None:
        """Add ``data`` to the end of a log. Not durable, and after a crash its last line may be torn."""
        ...

    def make_folder(self, path: str) -> None:
        """A new, empty folder; ``FileExistsError`` if the name is taken: of two callers one wins."""
        ...

    def settle(self, folder: str = "") -> None:
        """Make the names in ``folder`` durable."""
        ...

    def move(self, source: str, target: str) -> None:
        """Give a file or folder another name at once; a file replaces a file. Durable after `settle`."""
        ...

    def link(self, source: str, target: str) -> None:
        """A second name for the file ``source``, at once, replacing ``target``: no byte is written again where the
        store can do that, else it is a copy. Durable on return."""
        ...

    def point(self, label: str, target: str | None) -> None:
        """A link for people from ``label`` to ``target``; ``None`` removes it. Best effort; nobody reads it."""
        ...

    def delete(self, path: str) -> None:
        """The file is gone; it is fine if it was not there. Durable after `settle`."""
        ...

    def delete_folder(self, path: str) -> None:
        """The folder and all in it is gone; it is fine if it was not there. Durable after `settle`."""
        ...

    def recycle_folder(self, path: str) -> None:
        """As `delete_folder`, but a store may keep large files of it until `drop_spares`, and write those over that
        `create` makes next under the same names in other folders: where that is faster, and nobody can see it."""
        ...

    def drop_spares(self) -> None:
        """What `recycle_folder` kept is gone."""
        ...

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder of that name."""
        ...

    def hold(self, path: str) -> bool:
        """Hold the lock ``path`` until `release` or the end of the process; ``False`` if another live process holds
        it. A courtesy for people, not a fence: some file systems know locks of one host only."""
        ...

    def release(self, path: str) -> None:
        """Hold that lock no longer. It is fine if it was not held."""
        ...

    def free_bytes(self) -> int | None:
        """How many bytes still fit; ``None`` if nobody knows."""
        ...

"""What a run has at another place, too: copies of its files under the same names, and nothing else.

The directory of the run stays the one that counts: a file is copied once it is committed there, and what was deleted
there is deleted at the other place after the newer is safe at both. A small file in the directory says what is up: no
question is asked of the other place to find that out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from distckpt import layout, strict_json
from distckpt.errors import DistckptError
from distckpt.manifest import Record
from distckpt.stores import Store
from distckpt.strict_json import take

_log = logging.getLogger("distckpt")

_UNKNOWN = ""  # in place of the digest of a copy that another directory knew of, which is lost


class Files(Protocol):
    """A place to which files can be copied."""

    def upload(self, source: Path, path: str) -> None:
        """The bytes of the local file ``source`` are at ``path``; replaces what was there."""
        ...

    def put(self, obj: bytes, filepath: str) -> None:
        """So are these few."""
        ...

    def download(self, path: str) -> Iterator[bytes]:
        """The bytes of a file, in pieces."""
        ...

    def isfile(self, filepath: str) -> bool:
        """Whether there is such a file."""
        ...

    def remove(self, filepath: str) -> None:
        """It is gone."""
        ...

    def join_path(self, root: str, name: str) -> str:
        """The path of ``name`` below ``root``."""
        ...


@dataclass(frozen=True)
class Held:
    """What is up at ``root``, as far as the directory knows.

    Attributes:
        run: whose it is.
        files: the digests of the copies, by their names.
        pointed: the file that ``last_checkpoint`` says there.
    """

    run: str
    root: str
    files: Mapping[str, str] = field(default_factory=dict)
    pointed: str = ""


class Mirror:
    """The copies of one run. Leader only, but for `path`.

    Attributes:
        is_behind: whether the last `copy` failed, or there was none yet.

    Args:
        store: the directory of the run, which is at the path ``directory``.
        root: the place of the copies.
    """

    def __init__(self, store: Store, directory: str, files: Files, root: str) -> None:
        self.files = files
        self.root = root
        self._store = store
        self._directory = Path(directory)
        self._held = Held("", root)
        self.is_behind = True

    def path(self, name: str) -> str:
        """Where the copy of the file ``name`` is, or will be. Not collective."""
        return self.files.join_path(self.root, name)

    def start(self, run: str) -> None:
        """It goes on with what is known to be up of ``run``. What other runs have there is not its own."""
        held = self._read()
        self._held = held if held is not None and (held.run, held.root) == (run, self.root) else Held(run, self.root)

    def copy(self, records: Sequence[Record], pointed: str | None) -> None:
        """The files of ``records``, newest first, and then the ``last_checkpoint`` that says ``pointed``, are up: what
        is so already costs nothing.

        Raises:
            DistckptError: naming what is not. It is copied with the next call.
        """
        self.is_behind = True
        for record in reversed(records):
            if self._held.files.get(record.name) != record.content_xxh3_128 and self._store.exists(record.name):
                self.send(record.name)
                self._note(files={**self._held.files, record.name: record.content_xxh3_128})
        if pointed is not None and pointed in self._held.files and pointed != self._held.pointed:
            self._tried(
                layout.LAST_CHECKPOINT,
                lambda path: self.files.put(os.fsencode(self.path(pointed)), path),
            )
            self._note(pointed=pointed)
        self.is_behind = False

    def send(self, name: str) -> None:
        """The file ``name`` is up; nobody remembers it.

        Raises:
            DistckptError: where it is not.
        """
        self._tried(name, lambda path: self.files.upload(self._directory / name, path))

    def let_go(self, kept: Collection[str]) -> None:
        """Copies of files that are not among ``kept`` are gone: unless the last `copy` failed. One that cannot be
        removed is warned of, and tried again. Where a record is here that cannot be read, the copy may be all that is
        left."""
        if self.is_behind:
            return
        for name in [one for one in self._held.files if one not in kept and one != self._held.pointed]:
            if self._store.exists(layout.record_of(name)):
                continue
            path = self.path(name)
            try:
                if self.files.isfile(path):
                    self.files.remove(path)
            except Exception as error:  # of whatever library
                _log.warning("%s could not be removed, and will be tried again: %s", path, error)
            else:
                self._note(files={one: digest for one, digest in self._held.files.items() if one != name})

    def said(self) -> str | None:
        """The file that this directory itself had ``last_checkpoint`` there say last."""
        held = self._read()
        return held.pointed if held is not None and held.root == self.root else None

    def is_up(self, name: str) -> bool:
        """Whether that file is known to be there."""
        return name in self._held.files

    def inherited(self) -> list[str]:
        """The files there that no file of this directory is behind: another directory had them, which is lost."""
        return [name for name, digest in self._held.files.items() if digest == _UNKNOWN]

    def inherit(self, record: Record, others: Sequence[str]) -> None:
        """Of the run of ``record``, which was fetched, is there what ``last_checkpoint`` says, and maybe ``others``."""
        self.start(record.run)
        files = {**dict.fromkeys(others, _UNKNOWN), **self._held.files, record.name: record.content_xxh3_128}
        self._note(files=files, pointed=record.name)

    def _tried(self, name: str, work: Callable[[str], None]) -> None:
        path = self.path(name)
        try:
            work(path)
        except Exception as error:  # of whatever library
            raise DistckptError(
                f"{path} could not be written: {type(error).__name__}: {error}. What it is a copy of is safe at "
                f"{self._directory / name}, and is copied at the next save or start"
            ) from error

    def _note(self, *, files: Mapping[str, str] | None = None, pointed: str | None = None) -> None:
        self._held = Held(
            self._held.run,
            self.root,
            self._held.files if files is None else files,
            self._held.pointed if pointed is None else pointed,
        )
        fields = {"run": self._held.run, "root": self.root, "files": dict(self._held.files), "last": self._held.pointed}
        self._store.put(layout.COPIES, strict_json.dump(fields))

    def _read(self) -> Held | None:
        try:
            fields = strict_json.load(self._store.read(layout.COPIES), layout.COPIES)
            files = take(fields, "files", dict, layout.COPIES)
            words = [take(fields, key, str, layout.COPIES) for key in ("run", "root", "last")]
            if not all(type(one) is str for one in files.values()):
                raise ValueError(f"{layout.COPIES}: 'files' should be digests")
        except FileNotFoundError:
            return None
        except (OSError, EOFError, ValueError) as error:
            _log.warning("%s: all is copied again, as it is not known what is up: %s", self._store.url, error)
            return None
        run, root, pointed = words
        return Held(run, root, files, pointed)

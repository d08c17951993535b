"""The pth format: the whole checkpoint is one file of ``torch.save``, which plain ``torch.load`` opens.

Nothing is ever unpickled by more than the restricted reader of ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distckpt import layout
from distckpt.errors import DamagedCheckpoint, NoCheckpoint
from distckpt.formats import Image, Opened, Snapshot, Written, joined
from distckpt.formats.hashing import Hash
from distckpt.formats.pth_reading import PthFile
from distckpt.formats.pth_unpickling import to_plain
from distckpt.formats.pth_whole import PthInMemory
from distckpt.formats.stand_ins import NewMemory
from distckpt.formats.zip_image import ZipLayout
from distckpt.manifest import FileEntry, Manifest, Record, TensorGroup
from distckpt.ranks import LEADER
from distckpt.stores import Sink, Store
from distckpt.stores.local import LocalStore

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BUFFER_BYTES = 1024 * 1024  # joins the many small pieces of a zip file; larger ones pass without a copy

_log = logging.getLogger("distckpt")


class Pth:
    """See the module, and `distckpt.formats.Format` for what each method promises.

    The parts of a snapshot are the top-level keys of the file. A rank has nothing of its own there. Whoever saves again
    and again does so faster with an instance of his own.
    """

    name = "pth"
    planner = None
    is_folder = False
    read_with = "torch.load(path, weights_only=True)"

    def __init__(self) -> None:
        self._layout = ZipLayout()

    def lay_out(self, snapshot: Snapshot, rank: int) -> list[Image]:
        return [self._layout.lay_out(dict(snapshot.shared))] if rank == LEADER else []

    def tensors_of(self, written: Sequence[Written]) -> tuple[TensorGroup, ...]:
        return joined(written)

    def open(self, store: Store, path: str, manifest: Manifest, rank: int, parts: Collection[str] | None) -> Opened:
        (entry,) = manifest.files
        return OpenedPth(_open(store, path, entry), parts)


FORMAT = Pth()


class OpenedPth:
    """See `distckpt.formats.Opened`. Whatever is asked for, all of the file is read, as only that proves its bytes."""

    def __init__(self, file: PthFile | PthInMemory, parts: Collection[str] | None) -> None:
        self.snapshot = Snapshot(
            shared={key: value for key, value in file.value.items() if parts is None or key in parts}
        )
        self.fill = file.fill
        self.pieces = file.pieces


def write_stream(value: object, sink: Sink, digest: Hash) -> int:
    """``value``, as ``torch.save`` writes it, is in ``sink``, its bytes in ``digest``; how many there are.

    Tensors on the CPU pass through without a copy.
    """
    raw = _Raw(sink, digest)
    with io.BufferedWriter(raw, _BUFFER_BYTES) as stream:
        torch.save(value, stream)
    return raw.size_bytes


def read_pth(path: str | os.PathLike[str]) -> Any:
    """What the file ``path`` of ``torch.save`` holds, on the CPU, without unpickling it: no code of it ever runs.

    Where a record of ours lies beside it, every byte is checked against that; else against the checksums in the file.
    A file of stock MMEngine is read, too: its arrays of NumPy, and its histories of logs as plain dicts.

    Raises:
        NoCheckpoint: where there is nothing of that name.
        DamagedCheckpoint: where it is empty, cut off, changed, no file, or holds what only unpickling could read.
    """
    file = open_pth(path)
    memory = NewMemory()
    value = memory.replaced(file.value)
    try:
        file.fill(memory.targets)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error
    return value


def open_pth(path: str | os.PathLike[str]) -> PthFile | PthInMemory:
    """As `read_pth`, with stand-ins for the tensors, which are still to be read.

    Raises:
        NoCheckpoint, DamagedCheckpoint: as there, as far as that is known without reading all of it.
    """
    place = Path(path).resolve()
    store = LocalStore(place.parent)
    try:
        file = _open(store, place.name, _entry_of(store, place.name))
    except FileNotFoundError as error:
        raise NoCheckpoint(f"{path}: there is no such file") from error
    except (OSError, EOFError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error
    file.value = to_plain(file.value)
    return file


def _open(store: Store, path: str, entry: FileEntry | None) -> PthFile | PthInMemory:
    try:
        return PthFile(store, path, entry)
    except OSError:
        raise
    except Exception as error:  # of the many ways in which a file can be another than we write
        _log.debug("%s is read whole: %s", path, error)
    return PthInMemory(store, path, entry)


def _entry_of(store: Store, name: str) -> FileEntry | None:
    record_name = layout.record_of(name)
    try:
        record = Record.from_json(store.read(record_name), record_name)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedCheckpoint(f"{record_name} cannot be read: {error}") from error
    return FileEntry(name, record.content_bytes, record.content_xxh3_128)


class _Raw(io.RawIOBase):
    """A sink as the file that `io.BufferedWriter` asks for."""

    def __init__(self, sink: Sink, digest: Hash) -> None:
        self._sink = sink
        self._digest = digest
        self.size_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._sink.write(view)
        self.size_bytes += len(view)
        return len(view)

"""The pth format: the whole checkpoint is one file of ``torch.save``, which plain ``torch.load`` opens.

Nothing is ever unpickled by more than the restricted reader of ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
import torch
import xxhash
from torch import Tensor

from distckpt import layout
from distckpt.errors import DamagedCheckpoint, NoCheckpoint
from distckpt.formats import Image, Opened, Piece, Snapshot, Written, joined
from distckpt.formats.hashing import Hash
from distckpt.formats.streaming import whole
from distckpt.formats.zip_image import ZipLayout
from distckpt.manifest import FileEntry, Manifest, Record, TensorGroup
from distckpt.ranks import LEADER
from distckpt.stores import Sink, Source, Store
from distckpt.stores.local import LocalStore

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BUFFER_BYTES = 1024 * 1024  # joins the many small pieces of a zip file; larger ones pass without a copy
_PIECE_BYTES = 16 * 1024 * 1024


class Pth:
    """See the module, and `distckpt.formats.Format` for what each method promises.

    The parts of a snapshot are the top-level keys of the file. A rank has nothing of its own there. Opening a file
    reads all of it: the stand-ins are the tensors themselves. Whoever saves again and again does so faster with an
    instance of his own.
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
        with store.open(path) as source:
            held = _load(_verified(source, entry, path), path)
        return _Loaded(Snapshot(shared={key: value for key, value in held.items() if parts is None or key in parts}))


FORMAT = Pth()


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
    place = Path(path).resolve()
    store = LocalStore(place.parent)
    entry = _entry_of(store, place.name)
    try:
        with store.open(place.name) as source:
            data = _verified(source, entry, str(path)) if entry else _whole(source, str(path))
    except FileNotFoundError as error:
        raise NoCheckpoint(f"{path}: there is no such file") from error
    except (OSError, EOFError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error
    if entry is None:
        _check_sums(data, str(path))
    return _plain(_load(data, str(path)))


class _Loaded:
    """A checkpoint that was read whole, and checked, when it was opened."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def fill(self, targets: Sequence[tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            for held, target in targets:
                target.copy_(held)

    def pieces(self, standing: Sequence[Tensor]) -> Iterator[Piece]:
        return (whole(held, held) for held in standing if held.numel())


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


class _History:
    """What ``HistoryBuffer`` of MMEngine holds, without its code."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.told = {
            "log_history": torch.as_tensor(state["_log_history"]),
            "count_history": torch.as_tensor(state["_count_history"]),
            "max_length": state["max_length"],
        }


def _no_function(*_: object) -> None:
    """A history of MMEngine names its statistics, which are code."""


# Names that files of stock MMEngine use, and what is built instead.
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_History, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_no_function, "builtins.getattr"),
    np.dtype,
    np.ndarray,
    *((np._core.multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),  # type: ignore[attr-defined]
    *((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # type: ignore[attr-defined]
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDSU"),
]


def _entry_of(store: Store, name: str) -> FileEntry | None:
    record_name = layout.record_of(name)
    try:
        record = Record.from_json(store.read(record_name), record_name)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedCheckpoint(f"{record_name} cannot be read: {error}") from error
    return FileEntry(name, record.content_bytes, record.content_xxh3_128)


def _verified(source: Source, entry: FileEntry, path: str) -> memoryview:
    if source.size_bytes != entry.size_bytes:
        raise DamagedCheckpoint(f"{path} has {source.size_bytes} bytes, {entry.size_bytes} were committed")
    digest = xxhash.xxh3_128()
    data = _whole(source, path, digest)
    if digest.hexdigest() != entry.xxh3_128:
        raise DamagedCheckpoint(f"{path}: its bytes changed after the commit (the size is right, the xxh3-128 is not)")
    return data


def _whole(source: Source, path: str, digest: Hash | None = None) -> memoryview:
    if source.size_bytes == 0:
        raise DamagedCheckpoint(f"{path} is empty")
    data = memoryview(bytearray(source.size_bytes))
    for start in range(0, len(data), _PIECE_BYTES):
        piece = data[start : start + _PIECE_BYTES]
        source.read_into(piece)
        if digest is not None:
            digest.update(piece)
    return data


def _check_sums(data: memoryview, path: str) -> None:
    """``torch.load`` does not look at the checksums that are in a zip file."""
    stream = _Memory(data)
    if not zipfile.is_zipfile(stream):
        return  # the format before torch 1.6 has none; and if it is cut off, its reader will say so
    try:
        with zipfile.ZipFile(stream) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
        raise DamagedCheckpoint(f"{path} is no whole file of torch.save: {error}") from error
    if broken is not None:
        raise DamagedCheckpoint(f"{path}: its bytes changed; the checksum of {ascii(broken)} in it does not match")


def _load(data: memoryview, path: str) -> Any:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(cast(IO[bytes], _Memory(data)), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        why = _reason(error)
        raise DamagedCheckpoint(f"{path} cannot be read without running code that it names: {why}") from error
    except Exception as error:  # whatever its reader makes of bytes that are no file of torch.save
        raise DamagedCheckpoint(f"{path} is no whole file of torch.save: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What is wrong, without what torch says of how to unpickle it all the same."""
    text = str(error)
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {named[1]}"
    return f"{type(error).__name__}: {text.splitlines()[0].split('. ')[0]}" if text else type(error).__name__


def _plain(value: Any) -> Any:
    """``value`` with histories as the plain dicts that they hold."""
    if isinstance(value, _History):
        return value.told
    if isinstance(value, dict):
        for key, one in value.items():
            value[key] = _plain(one)
        return value
    if type(value) in (list, tuple):
        return type(value)(_plain(one) for one in value)
    return value


class _Memory(io.RawIOBase):
    """Memory as a file to read, without a copy of it."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._data)}[whence]
        if start + offset < 0:
            raise ValueError(f"{offset} lies before the start")
        self._at = start + offset
        return self._at

    def readinto(self, target: Buffer) -> int:
        view = memoryview(target).cast("B")
        piece = self._data[self._at : self._at + len(view)]
        view[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

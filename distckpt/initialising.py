"""Modules found in whatever a run may start from: a checkpoint, of ours or of others, or a file of weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from distckpt import foreign, layout
from distckpt.catalog import read_record, scan
from distckpt.errors import NoCheckpoint
from distckpt.formats import Format, Snapshot
from distckpt.formats.dcp_native import NativeFolder
from distckpt.formats.dcp_reading import Folder, OpenedFolder
from distckpt.formats.dcp_safetensors import SafetensorsFolder
from distckpt.formats.pth_folder import PthFolder
from distckpt.manifest import Manifest
from distckpt.prefixes import BESIDE, assign
from distckpt.selection import Selection
from distckpt.stores.local import LocalStore


class Readable(Protocol):
    """What was opened, and is not read yet; see `distckpt.formats.Opened`."""

    snapshot: Snapshot

    def fill(self, targets: Sequence[tuple[Tensor, Tensor]]) -> None: ...


@dataclass(frozen=True)
class Source:
    """Modules that are ready to be read.

    Attributes:
        left: what else lies there, by name.
        unread: what of the modules only unpickling could read, and why.
    """

    opened: Readable
    left: Collection[str] = ()
    unread: Mapping[str, str] = field(default_factory=dict)


def committed(source: str) -> tuple[str, str | None] | None:
    """The run's directory, and the checkpoint in it; ``None`` for its newest. Nothing, where ``source`` is none of ours
    that is in its place.

    Raises:
        DamagedCheckpoint, NewerVersion, OSError: where a record cannot be read.
    """
    path = Path(source).resolve()
    if not path.is_dir():
        return None
    if (path / layout.MANIFEST).exists():
        try:
            read_record(LocalStore(path.parent), path.name)
        except FileNotFoundError:
            return None  # copied away, or not committed: it proves itself
        return str(path.parent), path.name
    listing = scan(LocalStore(path))
    return (str(path), None) if listing.records or listing.unreadable else None


def open_modules(
    source: str, modules: Mapping[str, nn.Module], selection: Selection, get_format: Callable[[str], Format]
) -> Source:
    """The modules in ``source``, which is not `committed`. Names of a foreign checkpoint were found to be theirs as
    `distckpt.prefixes.assign` says.

    Raises:
        NoCheckpoint: where there is none.
        DamagedCheckpoint: where it is not whole, or not what it should be.
        OSError: where it cannot be read.
        ValueError: where it does not say for which of several modules it is.
    """
    path = Path(source).resolve()
    wanted = {name: module for name, module in modules.items() if selection.takes_part(name)}
    if path.is_dir() and (path / layout.MANIFEST).exists():
        return Source(_open_copy(path, list(wanted), get_format))
    if path.is_dir():
        try:
            folder = foreign.find(path)
        except NoCheckpoint as error:
            raise NoCheckpoint(f"init_from: {error}") from error
        return _open_foreign(source, folder, wanted, selection)
    if not path.is_file():
        raise NoCheckpoint(f"init_from: {source} is neither a checkpoint nor a file")
    if len(wanted) > 1:
        raise ValueError(f"init_from: {source} is one file, and state has {len(wanted)} modules: {', '.join(wanted)}")
    if path.suffix == ".safetensors":
        return _open_foreign(source, SafetensorsFolder(LocalStore(path.parent), {path.name: None}), wanted, selection)
    return _open_foreign(source, PthFolder(path.parent, {path.name: None}), wanted, selection)


@dataclass
class _Found:
    """Modules found in files of ``torch.save``."""

    snapshot: Snapshot
    fill: Callable[[Sequence[tuple[Tensor, Tensor]]], None]


def _open_copy(path: Path, names: Collection[str], get_format: Callable[[str], Format]) -> Readable:
    """A checkpoint that was copied away, which proves itself by its manifest."""
    store = LocalStore(path.parent)
    data = store.read(f"{path.name}/{layout.MANIFEST}")
    manifest = Manifest.from_json(data, f"{path.name}/{layout.MANIFEST}")
    return get_format(manifest.format).open(store, path.name, manifest, 0, names)


def _open_foreign(
    source: str, folder: Folder | PthFolder, modules: Mapping[str, nn.Module], selection: Selection
) -> Source:
    names = [*folder.tensors, *folder.values]
    beside = BESIDE if isinstance(folder, NativeFolder) else ()
    try:
        assigned = assign(names, modules, loose=folder.values, beside=beside, renamed=selection.renamed)
    except ValueError as error:
        raise ValueError(f"init_from: {source} {error}") from error
    if isinstance(folder, PthFolder):
        return Source(_Found(folder.snapshot(assigned.names), folder.fill), assigned.left)
    opened = OpenedFolder(folder, assigned.names)
    return Source(opened, assigned.left, opened.unread)

"""Modules read from whatever a run may start from: a checkpoint, a run's directory, a ``.safetensors``, a ``.pth``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from distckpt import layout
from distckpt.catalog import read_record
from distckpt.errors import DamagedCheckpoint, NoCheckpoint
from distckpt.formats import Format, Snapshot
from distckpt.formats.pth import read_pth
from distckpt.formats.safetensors_reading import read_tensors
from distckpt.formats.stand_ins import Whole, read_whole
from distckpt.manifest import Manifest
from distckpt.ranks import Solo
from distckpt.restoring import restore_newest
from distckpt.state import Parts
from distckpt.stores.local import LocalStore


def read_modules(source: str, modules: Parts, get_format: Callable[[str], Format]) -> Snapshot:
    """The state of the modules in ``source``, in new host memory.

    A file of one module's weights is for the only module in ``modules``.

    Raises:
        NoCheckpoint: where there is no checkpoint.
        DamagedCheckpoint: where it is not whole, or not what was committed.
        ValueError: where a file does not say for which of several modules it is.
    """
    path = Path(source).resolve()
    names = list(modules.shared)
    if path.is_dir() and (path / layout.MANIFEST).exists():
        return _read_folder(path, names, get_format)
    if path.is_dir():
        return _read_run(LocalStore(path), names, get_format, f"{source} holds no committed checkpoint")
    if not path.is_file():
        raise NoCheckpoint(f"init_from: {source} is neither a checkpoint nor a file")
    if len(names) != 1:
        raise ValueError(f"init_from: {source} is one file, and state has {len(names)} modules: {', '.join(names)}")
    store = LocalStore(path.parent)
    weights: Any = read_tensors(store, path.name) if path.suffix == ".safetensors" else _weights(read_pth(path))
    return Snapshot(shared={names[0]: weights})


def _read_folder(path: Path, names: list[str], get_format: Callable[[str], Format]) -> Snapshot:
    """A checkpoint in its place is bound by its record; one that was copied away proves itself by its manifest."""
    store = LocalStore(path.parent)
    try:
        read_record(store, path.name)
    except FileNotFoundError:
        data = store.read(f"{path.name}/{layout.MANIFEST}")
        manifest = Manifest.from_json(data, f"{path.name}/{layout.MANIFEST}")
        return read_whole(get_format(manifest.format).open(store, path.name, manifest, 0, names))
    return _read_run(store, names, get_format, f"{path.name} is not committed", name=path.name)


def _read_run(
    store: LocalStore, names: list[str], get_format: Callable[[str], Format], else_told: str, name: str | None = None
) -> Snapshot:
    """The newest that verifies, or the one called ``name``."""
    restored = restore_newest(
        Solo(), lambda snapshot, _: Whole(snapshot), store=store, get_format=get_format, parts=names, name=name
    )
    if restored is None:
        raise NoCheckpoint(f"init_from: {else_told}")
    return restored.fitted.snapshot


def _weights(saved: Any) -> Any:
    """The weights in what a ``.pth`` file holds: MMEngine and others keep them under ``state_dict``."""
    if not isinstance(saved, dict):
        raise DamagedCheckpoint(f"init_from: the file holds a {type(saved).__name__}, no weights by name")
    return saved.get("state_dict", saved)

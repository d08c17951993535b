"""The full format: the leader writes one safetensors file for each part, every rank a file of what is its own.

Keys in ``model.safetensors`` are those of the model's own ``state_dict``, so ``load_file`` of safetensors is all that
inference needs. What is no tensor lies in ``state.json`` and ``rank-00000.json``, which refer to the tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from distckpt import layout, strict_json
from distckpt.errors import DamagedCheckpoint
from distckpt.formats import Image, Snapshot
from distckpt.formats import tree as trees
from distckpt.formats.full_layout import FullLayouts
from distckpt.formats.safetensors_file import read_tensors
from distckpt.manifest import FileEntry, Manifest, digest
from distckpt.stores import Store


class Full:
    """See the module, and `distckpt.formats.Format` for what each method promises."""

    name = "full"
    is_folder = True
    read_with = "safetensors.torch.load_file('model.safetensors')"

    def __init__(self) -> None:
        self._layouts = FullLayouts()

    def lay_out(self, snapshot: Snapshot, rank: int) -> list[Image]:
        return self._layouts.lay_out(snapshot, rank)

    def read(self, store: Store, path: str, manifest: Manifest, rank: int, parts: Collection[str] | None) -> Snapshot:
        files = {entry.path: entry for entry in manifest.files}
        shared = _read_group(store, path, layout.STATE, files, parts)
        # Another world size has other ranks: nothing of what was a rank's own belongs to any of them.
        is_same_world = layout.rank_file(rank) in files
        own = _read_group(store, path, layout.rank_file(rank), files, parts) if is_same_world else {}
        return Snapshot(shared, own)


FORMAT = Full()


def _read_group(
    store: Store, path: str, index: str, files: Mapping[str, FileEntry], parts: Collection[str] | None
) -> dict[str, Any]:
    told = _read_index(store, path, index, files)
    wanted = {part: one for part, one in told.items() if parts is None or part in parts}
    needed = {one["file"] for one in wanted.values() if one["file"] in files}
    tensors = {file: read_tensors(store, f"{path}/{file}", files[file]) for file in sorted(needed)}
    state: dict[str, Any] = {}
    for part, one in wanted.items():
        prefix = one["prefix"]
        found = tensors.get(one["file"], {}).items()
        mine = {key[len(prefix) :]: tensor for key, tensor in found if key.startswith(prefix)}
        try:
            state[part] = trees.decode(one["state"], mine)
        except ValueError as error:
            raise DamagedCheckpoint(f"{path}/{index}, {part}: {error}") from error
    return state


def _read_index(store: Store, path: str, index: str, files: Mapping[str, FileEntry]) -> dict[str, Any]:
    place = f"{path}/{index}"
    if index not in files:
        raise DamagedCheckpoint(f"{place} is not in the manifest")
    data = store.read(place)
    if len(data) != files[index].size_bytes or digest(data) != files[index].xxh3_128:
        raise DamagedCheckpoint(f"{place}: its bytes changed after the commit")
    try:
        told = strict_json.load(data, place)
        for part, one in told.items():
            is_placed = type(one) is dict and all(type(one.get(key)) is str for key in ("file", "prefix"))
            if not is_placed or "state" not in one:
                raise ValueError(f"{place}: {ascii(part)[:80]} has no place, or no state")
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from error
    return told

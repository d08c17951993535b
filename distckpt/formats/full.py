"""The full format: the leader writes one safetensors file for each part, every rank a file of what is its own.

Keys in ``model.safetensors`` are those of the model's own ``state_dict``, so ``load_file`` of safetensors is all that
inference needs. What is no tensor lies in ``state.json`` and ``rank-00000.json``, which refer to the tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from distckpt.formats import Image, Opened, Snapshot, Written, joined
from distckpt.formats.full_layout import FullLayouts
from distckpt.formats.full_reading import OpenedFull
from distckpt.manifest import Manifest, TensorGroup
from distckpt.stores import Store


class Full:
    """See the module, and `distckpt.formats.Format` for what each method promises."""

    name = "full"
    planner = None
    is_folder = True
    read_with = "safetensors.torch.load_file('model.safetensors')"

    def __init__(self) -> None:
        self._layouts = FullLayouts()

    def lay_out(self, snapshot: Snapshot, rank: int) -> list[Image]:
        return self._layouts.lay_out(snapshot, rank)

    def tensors_of(self, written: Sequence[Written]) -> tuple[TensorGroup, ...]:
        return joined(written)

    def open(self, store: Store, path: str, manifest: Manifest, rank: int, parts: Collection[str] | None) -> Opened:
        return OpenedFull(store, path, manifest, rank, parts)


FORMAT = Full()

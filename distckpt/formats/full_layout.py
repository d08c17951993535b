"""The files of a full checkpoint, before they are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distckpt import layout, strict_json
from distckpt.formats import Image, Snapshot
from distckpt.formats import tree as trees
from distckpt.formats.safetensors_layout import SafetensorsLayouts
from distckpt.ranks import LEADER


class FullLayouts:
    """Lays out what one rank writes, and remembers how."""

    def __init__(self) -> None:
        self._files = SafetensorsLayouts()

    def lay_out(self, snapshot: Snapshot, rank: int) -> list[Image]:
        """See `distckpt.formats.Format.lay_out`."""
        own = self._group(layout.rank_file(rank), {layout.rank_tensors(rank): snapshot.own})
        if rank != LEADER:
            return own
        groups = {layout.part_file(part): {part: state} for part, state in snapshot.shared.items()}
        return self._group(layout.STATE, groups) + own

    def _group(self, index: str, groups: Mapping[str, Mapping[str, Any]]) -> list[Image]:
        """The tensors of each group go to the file that it is named for, the rest to ``index``."""
        images: list[Image] = []
        told: dict[str, Any] = {}
        for file, parts in groups.items():
            tensors: dict[str, Tensor] = {}
            aliases: dict[str, str] = {}
            for part, state in parts.items():
                value, found, tied = trees.encode(state, part)
                # A file of one part is keyed as the part is; a rank's file holds several, told apart by their name.
                prefix = "" if file == layout.part_file(part) else f"{part}."
                told[part] = {"file": file, "prefix": prefix, "state": value}
                tensors.update({prefix + key: tensor for key, tensor in found.items()} if prefix else found)
                aliases.update({prefix + key: prefix + other for key, other in tied.items()})
            if tensors:
                images.append(self._files.lay_out(file, tensors, aliases))
        text = strict_json.dump(told)
        return [*images, Image(index, len(text), texts=((0, text),))]

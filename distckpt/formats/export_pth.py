"""Exports as one file of ``torch.save``, which ``torch.load(weights_only=True)`` reads and ``mmap=True`` maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distckpt.formats import Image
from distckpt.formats.zip_image import lay_out


class PthExport:
    """See `distckpt.exporting.Kind`. What is no tensor is there, too, as a part's ``load_state_dict`` wants it."""

    is_folder = False
    takes_several = True
    names_parts = False
    leaves_out_values = False

    def lay_out(self, state: Any) -> list[Image]:
        return [lay_out(state)]

    def is_one(self, place: Path) -> bool:
        return not place.is_dir()

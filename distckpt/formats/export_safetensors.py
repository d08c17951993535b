"""Exports as one safetensors file, which ``safetensors.torch.load_file`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from distckpt.formats import Image
from distckpt.formats.placeholders import flat
from distckpt.formats.safetensors_file import DTYPES_BY_NAME
from distckpt.formats.safetensors_layout import lay_out

_DTYPES = frozenset(DTYPES_BY_NAME.values())


class SafetensorsExport:
    """See `distckpt.exporting.Kind`."""

    is_folder = False
    takes_several = False
    names_parts = False
    leaves_out_values = True

    def lay_out(self, state: Any) -> list[Image]:
        tensors, tied = keyed(state)
        return [lay_out("", tensors, tied)]

    def is_one(self, place: Path) -> bool:
        return not place.is_dir()


def keyed(state: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in ``state`` by their keys; and for each other key of one, as it is tied, that key.

    Raises:
        ValueError: naming a tensor of a dtype that safetensors does not know.
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    known: dict[int, str] = {}
    for key, tensor in flat(state):
        while key in tensors or key in tied or key == "__metadata__":  # {"a": {"b": t}, "a.b": t}
            key += "'"
        if (other := known.setdefault(id(tensor), key)) != key:
            tied[key] = other
            continue
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{ascii(key)[1:-1][:200]} is of {tensor.dtype}, which safetensors has no word for: export it to "
                '"pth" or "dcp"'
            )
        tensors[key] = tensor
    return tensors, tied

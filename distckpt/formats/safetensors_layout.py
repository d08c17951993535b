"""Where the tensors of a safetensors file lie, before it is written.

The layout is that of https://github.com/huggingface/safetensors: eight bytes of length, a JSON header, the tensors
packed behind it. The header is padded so that tensor data begin on a 4 KiB boundary, and tensors are ordered by the
size of their elements, so that each lies aligned.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distckpt import strict_json
from distckpt.formats import Image
from distckpt.formats.safetensors_file import DTYPES
from distckpt.manifest import TensorEntry

_ALIGNMENT = 4096

Signature = tuple[tuple[str, torch.dtype, torch.Size], ...]


@dataclass(frozen=True)
class _Layout:
    signature: Signature
    aliases: Mapping[str, str]
    header: bytes
    places: tuple[tuple[int, str], ...]
    size_bytes: int
    entries: tuple[TensorEntry, ...]


class SafetensorsLayouts:
    """Lays files out, and remembers how: a state that was saved before has the same layout in the next save."""

    def __init__(self) -> None:
        self._known: dict[str, _Layout] = {}

    def lay_out(self, path: str, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> Image:
        """The file ``path`` of these ``tensors``, of dtypes in `DTYPES`.

        Args:
            aliases: other keys by which a tensor is known, and its key; they go to the metadata of the file, as
                ``safetensors.torch.save_model`` has it and ``load_model`` reads it.
        """
        signature = tuple((key, tensor.dtype, tensor.shape) for key, tensor in tensors.items())
        known = self._known.get(path)
        if known is None or known.signature != signature or known.aliases != aliases:
            known = self._known[path] = _new(path, signature, dict(aliases))
        return Image(
            path,
            known.size_bytes,
            texts=((0, known.header),),
            tensors=[(offset, tensors[key]) for offset, key in known.places],
            entries=known.entries,
        )


def _new(path: str, signature: Signature, aliases: dict[str, str]) -> _Layout:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", **aliases}}
    places: list[tuple[int, str]] = []
    end = 0
    for key, dtype, shape in sorted(signature, key=lambda one: -one[1].itemsize):
        begin, end = end, end + shape.numel() * dtype.itemsize
        fields[key] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        places.append((begin, key))
    text = strict_json.dump(fields)
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    types = {key: (DTYPES[dtype], tuple(shape)) for key, dtype, shape in signature}
    return _Layout(
        signature,
        aliases,
        header,
        tuple((len(header) + begin, key) for begin, key in places),
        len(header) + end,
        tuple(TensorEntry(path, key, *types[key]) for _, key in places),
    )

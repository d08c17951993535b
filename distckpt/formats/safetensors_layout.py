"""Where the tensors of a safetensors file lie, before it is written.

The layout is that of https://github.com/huggingface/safetensors: eight bytes of length, a JSON header, the tensors
packed behind it. The header is padded so that tensor data begin on a 4 KiB boundary, and tensors are ordered by the
size of their elements, so that each lies aligned.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distckpt import strict_json
from distckpt.formats import Image
from distckpt.formats.safetensors_file import DTYPES
from distckpt.manifest import TensorEntry

_ALIGNMENT = 4096


def lay_out(path: str, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> Image:
    """The file ``path`` of these ``tensors``, of dtypes in `DTYPES`. Each has its entry, in the same order.

    Args:
        aliases: other keys by which a tensor is known, and its key; they go to the metadata of the file, as
            ``safetensors.torch.save_model`` has it and ``load_model`` reads it.
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", **aliases}}
    places: list[tuple[int, Tensor]] = []
    entries: list[TensorEntry] = []
    end = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        dtype, shape = DTYPES[tensor.dtype], tuple(tensor.shape)
        fields[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        places.append((begin, tensor))
        entries.append(TensorEntry(path, key, dtype, shape))
    text = strict_json.dump(fields)
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return Image(
        path,
        len(header) + end,
        texts=((0, header),),
        tensors=[(len(header) + begin, tensor) for begin, tensor in places],
        entries=tuple(entries),
    )

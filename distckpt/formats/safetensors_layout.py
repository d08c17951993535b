"""Where the tensors of a safetensors file lie, before it is written.

The layout is that of https://github.com/huggingface/safetensors: eight bytes of length, a JSON header, the tensors
packed behind it. The header is padded so that tensor data begin on a 4 KiB boundary, and tensors are ordered by the
size of their elements, so that each lies aligned.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distckpt import strict_json
from distckpt.formats import Image
from distckpt.formats.safetensors_file import DTYPES_BY_NAME
from distckpt.manifest import TensorGroup

_ALIGNMENT = 4096
_NAMES = {dtype: name for name, dtype in DTYPES_BY_NAME.items()}


def lay_out(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Image:
    """The file ``path`` of these ``tensors``, of dtypes that such a file knows, in the order in which they lie there.

    Args:
        metadata: of the file. For ``safetensors.torch.load_model``, as ``save_model`` has it: other keys by which a
            tensor is known, and its key.
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    begins: list[int] = []
    alike: defaultdict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    end = 0
    for key, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        dtype, shape = _NAMES[tensor.dtype], tuple(tensor.shape)
        fields[key] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
        begins.append(begin)
        alike[dtype, shape].append(key)
    text = strict_json.dump(fields)
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return Image(
        path,
        len(header) + end,
        texts=((0, header),),
        tensors=[tensor for _, tensor in ordered],
        offsets=[len(header) + begin for begin in begins],
        keys=[key for key, _ in ordered],
        groups=tuple(TensorGroup((path,), *kind, tuple(keys)) for kind, keys in alike.items()),
    )

"""What safetensors calls the types of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# Files of others have that, too. In ours it would be a word that safetensors.torch does not know: it, and torch's
# reader of folders, would read nothing of the file that has one such tensor.
DTYPES_BY_NAME: Mapping[str, torch.dtype] = {
    **{name: dtype for dtype, name in DTYPES.items()},
    "F8_E8M0": torch.float8_e8m0fnu,
}

ITEM_BYTES: Mapping[str, int] = {name: dtype.itemsize for name, dtype in DTYPES_BY_NAME.items()}

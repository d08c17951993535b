"""One safetensors file, written from its start to its end and read back without trusting it.

The layout is that of https://github.com/huggingface/safetensors: eight bytes of length, a JSON header, the tensors
packed behind it. The header is padded so that tensor data begin on a 4 KiB boundary, and tensors are ordered by the
size of their elements, so that each lies aligned.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
import xxhash
from torch import Tensor

from distckpt import strict_json
from distckpt.errors import DamagedCheckpoint
from distckpt.manifest import FileEntry
from distckpt.stores import Source, Store

_LONGEST_HEADER_BYTES = 100_000_000  # the limit of safetensors' own readers
_MOST_DIMENSIONS = 64  # the limit of torch's own operators

DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
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
_DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


def read_tensors(store: Store, path: str, entry: FileEntry | None = None) -> dict[str, Tensor]:
    """The tensors of the file at ``path``, in new host memory. Every byte was checked against ``entry``, if given.

    Raises:
        DamagedCheckpoint: naming the file, where it is not what ``entry`` says or no safetensors file.
        OSError: where it cannot be read.
    """
    with store.open(path) as file:
        if entry is not None and file.size_bytes != entry.size_bytes:
            raise DamagedCheckpoint(f"{path} has {file.size_bytes} bytes, {entry.size_bytes} were committed")
        source = _HashedSource(file)
        try:
            places = _read_header(source, path)
            tensors = {key: torch.empty(shape, dtype=dtype) for key, (dtype, shape) in places.items()}
            for tensor in tensors.values():
                if tensor.numel():
                    source.read_into(bytes_of(tensor))
        except (ValueError, EOFError) as error:
            raise DamagedCheckpoint(f"{path} is no whole safetensors file: {error}") from error
        if entry is not None and source.hexdigest() != entry.xxh3_128:
            raise DamagedCheckpoint(
                f"{path}: its bytes changed after the commit (the size is right, the xxh3-128 is not)"
            )
    return tensors


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # numpy does not say that its arrays are buffers
    return memoryview(array)


class _HashedSource:
    def __init__(self, source: Source) -> None:
        self._source = source
        self._hash = xxhash.xxh3_128()
        self.size_bytes = source.size_bytes

    def read_into(self, target: Any) -> None:
        self._source.read_into(target)
        self._hash.update(target)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _read_header(source: _HashedSource, what: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Where each tensor lies, in the order of the file. They fill the rest of it without holes or overlaps."""
    length = bytearray(8)
    source.read_into(length)
    (count,) = struct.unpack("<Q", length)
    rest = source.size_bytes - 8 - count
    if rest < 0 or count > _LONGEST_HEADER_BYTES:
        raise ValueError(f"a header of {count} bytes does not fit")
    text = bytearray(count)
    source.read_into(text)
    fields = strict_json.load(bytes(text), what)
    fields.pop("__metadata__", None)
    places: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    end = 0
    for name, field in sorted(fields.items(), key=lambda item: _offsets(item[1])):
        dtype, shape = _place(name, field, end)
        places[name] = (dtype, shape)
        end = _offsets(field)[1]
    if end != rest:
        raise ValueError(f"its tensors end at {end} of {rest} bytes")
    return places


def _place(name: str, field: dict[str, Any], begin: int) -> tuple[torch.dtype, tuple[int, ...]]:
    dtype = _DTYPES_BY_NAME.get(str(field.get("dtype")))
    shape = field.get("shape")
    if dtype is None or not _is_shape(shape) or dtype.itemsize * math.prod(filter(None, shape)) >= 1 << 63:
        raise ValueError(
            f"{ascii(name)[:80]} has the dtype {ascii(field.get('dtype'))[:80]} and the shape {ascii(shape)[:80]}"
        )
    size = dtype.itemsize * math.prod(shape)
    if _offsets(field) != (begin, begin + size):
        raise ValueError(f"{ascii(name)[:80]} lies at {_offsets(field)}, and should at {(begin, begin + size)}")
    return dtype, tuple(shape)


def _is_shape(shape: Any) -> TypeGuard[list[int]]:
    is_list = type(shape) is list and len(shape) <= _MOST_DIMENSIONS
    return is_list and all(type(one) is int and one >= 0 for one in shape)


def _offsets(field: Any) -> tuple[int, int]:
    offsets = field.get("data_offsets") if type(field) is dict else None
    if type(offsets) is not list or len(offsets) != 2 or not all(type(one) is int and one >= 0 for one in offsets):
        raise ValueError(f"{ascii(field)[:80]} is no place of a tensor")
    return offsets[0], offsets[1]

"""What the ``.metadata`` of ``torch.distributed.checkpoint`` says of its folder, read without unpickling it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from distckpt.formats.dcp_pickle import Made, Table, read_pickle

_MOST_DIMENSIONS = 64  # the limit of torch's own operators
_FILE = re.compile(r"[^/\\\0]{1,255}")

_OF_CHECKPOINT = "torch.distributed.checkpoint.metadata."
_OF_SHARDED_TENSORS = "torch.distributed._shard.sharded_tensor.metadata."  # where some of that once was
_METADATA = f"{_OF_CHECKPOINT}Metadata"
_INDEX = f"{_OF_CHECKPOINT}MetadataIndex"
_TENSOR = f"{_OF_CHECKPOINT}TensorStorageMetadata"
_BYTES = f"{_OF_CHECKPOINT}BytesStorageMetadata"
_CHUNK = f"{_OF_CHECKPOINT}ChunkStorageMetadata"
_PROPERTIES = (f"{_OF_CHECKPOINT}TensorProperties", f"{_OF_SHARDED_TENSORS}TensorProperties")
_PATHS = ("pathlib", "pathlib._local")  # of Python 3.13
_STORAGE = "torch.distributed.checkpoint.filesystem._StorageInfo"


class Place(NamedTuple):
    """Where something lies: in which file of the folder, from where on, and how many bytes it has there."""

    file: str
    offset: int
    size_bytes: int


class Described(NamedTuple):
    """A tensor as the metadata have it: nothing says yet that its parts are all of it.

    Attributes:
        chunks: of each part its offsets and sizes, and its place.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Sequence[tuple[tuple[int, ...], tuple[int, ...], Place]]


class Metadata:
    """What lies in a folder.

    Attributes:
        tensors: the names of the tensors.
        values: where what is no tensor lies, by name.

    Args:
        data: the bytes of the file.

    Raises:
        ValueError: where they are not what PyTorch writes, name what no such file needs, or what lies outside of the
            folder, or is transformed in ways that are not known here.
    """

    def __init__(self, data: bytes) -> None:
        read, end = read_pickle(data, _TABLE)
        if end != len(data):
            raise ValueError(f"{len(data) - end} bytes stand behind its pickle")
        told = _state(read, _METADATA)
        self._described = _field(told, "state_dict_metadata", dict)
        self._places = _places(_field(told, "storage_data", dict))
        self.tensors: list[str] = []
        self.values: dict[str, Place] = {}
        for name, one in self._described.items():
            if type(name) is not str or type(one) is not Made or one.kind not in (_TENSOR, _BYTES):
                raise ValueError("one of its entries is neither of a tensor nor of bytes")
            if one.kind == _TENSOR:
                self.tensors.append(name)
            else:
                self.values[name] = self._place(name, None)

    def tensor(self, name: str) -> Described:
        """That tensor.

        Raises:
            ValueError: where what is said of it makes no sense.
        """
        told = _state(self._described[name], _TENSOR)
        properties = told.get("properties")
        if type(properties) is not Made or properties.kind not in _PROPERTIES or type(properties.state) is not tuple:
            raise ValueError(f"{ascii(name)[:80]} has no properties")
        dtype = properties.state[0] if properties.state else None
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{ascii(name)[:80]} has no dtype")
        shape = _extents(told.get("size"), name)
        chunks = []
        for one in _field(told, "chunks", list):
            chunk = _state(one, _CHUNK)
            offsets, sizes = _extents(chunk.get("offsets"), name), _extents(chunk.get("sizes"), name)
            if len(offsets) != len(shape) or len(sizes) != len(shape):
                raise ValueError(f"{ascii(name)[:80]} has parts of another number of dimensions")
            chunks.append((offsets, sizes, self._place(name, offsets)))
        return Described(dtype, shape, chunks)

    def _place(self, name: str, offsets: tuple[int, ...] | None) -> Place:
        if (place := self._places.get((name, offsets))) is None:
            raise ValueError(f"{ascii(name)[:80]}, or a part of it, has no place")
        return place


def _places(storage: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...] | None], Place]:
    found: dict[tuple[str, tuple[int, ...] | None], Place] = {}
    for one, stored in storage.items():
        index, told = _state(one, _INDEX), _state(stored, _STORAGE)
        name, file = _field(index, "fqn", str), _field(told, "relative_path", str)
        offset, size_bytes = _field(told, "offset", int), _field(told, "length", int)
        if _FILE.fullmatch(file) is None or file in (".", ".."):
            raise ValueError(f"{ascii(name)[:80]} lies in {ascii(file)[:80]}, which is no file of this folder")
        if offset < 0 or size_bytes < 0:
            raise ValueError(f"{ascii(name)[:80]} lies at {offset} and has {size_bytes} bytes")
        if told.get("transform_descriptors"):
            how = _words(told["transform_descriptors"])
            raise ValueError(f"{ascii(name)[:80]} was transformed by {how} when it was saved, which is not known here")
        offsets = index.get("offset")
        key = (name, None if offsets is None else _extents(offsets, name))
        if found.setdefault(key, place := Place(file, offset, size_bytes)) is not place:
            raise ValueError(f"a part of {ascii(name)[:80]} has two places")
    return found


def _words(value: Any) -> str:
    """What a list of words says; it may as well be anything else."""
    texts = [one for one in value if type(one) is str] if type(value) in (list, tuple) else []
    return ascii(", ".join(texts))[1:-1][:80] or "something"


def _state(value: Any, kind: str) -> dict[str, Any]:
    if type(value) is not Made or value.kind != kind or type(value.state) is not dict:
        raise ValueError(f"there should be a {kind.rpartition('.')[2]}, and is none")
    return value.state


def _field(told: Mapping[str, Any], name: str, kind: type) -> Any:
    value = told.get(name)
    if type(value) is not kind:
        raise ValueError(f"{name} should be {kind.__name__}, is {type(value).__name__}")
    return value


def _extents(value: Any, name: str) -> tuple[int, ...]:
    if type(value) is not _Extents:
        raise ValueError(f"{ascii(name)[:80]} has extents that are none")
    return value


class _Extents(tuple[int, ...]):
    """Numbers that were looked at."""

    __slots__ = ()


def _size(values: object = ()) -> _Extents:
    """In the place of ``torch.Size``."""
    if type(values) is not tuple or len(values) > _MOST_DIMENSIONS or not set(map(type, values)) <= {int}:
        raise ValueError("a shape is made of what is no few numbers")
    if values and (min(values) < 0 or max(values) >= 1 << 59):
        raise ValueError("a shape has an extent that no tensor has")
    return _Extents(values)


def _layout(name: object) -> str:
    """In the place of ``torch.serialization._get_layout``."""
    if name != "torch.strided":
        raise ValueError("a tensor is not strided")
    return "torch.strided"


def _nothing(*_: object) -> None:
    """In the place of what nobody here looks at: memory formats, and paths at which the folder once lay."""


def _member(of: object, name: object) -> None:
    """In the place of ``getattr``, by which Python 3.11.0 pickles a member of an enum: of a memory format only."""
    if of is not _nothing:
        raise ValueError("its pickle asks for builtins.getattr, of what no checkpoint needs it for")


def _empty_dict() -> dict[str, Any]:
    """In the place of ``OrderedDict``, as it is pickled."""
    return {}


_TABLE = Table(
    kinds=frozenset(
        {_METADATA, _INDEX, _TENSOR, _BYTES, _CHUNK, _STORAGE, *_PROPERTIES, f"{_OF_CHECKPOINT}StorageMeta"}
    ),
    makers={
        "torch.Size": _size,
        "torch.serialization._get_layout": _layout,
        "collections.OrderedDict": _empty_dict,
        "builtins.getattr": _member,
        f"{_OF_CHECKPOINT}_MEM_FORMAT_ENCODING": _nothing,
        f"{_OF_SHARDED_TENSORS}MEM_FORMAT_ENCODING": _nothing,
        **{f"{module}.{kind}Path": _nothing for module in _PATHS for kind in ("Posix", "Windows")},
    },
    constants={f"torch.{name}": one for name, one in vars(torch).items() if isinstance(one, torch.dtype)},
)

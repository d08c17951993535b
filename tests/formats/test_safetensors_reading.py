"""One safetensors file that anybody may have written: every bit is read, and nothing damaged or hostile passes."""

from __future__ import annotations

import json
import os
import resource
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from every_dtype import of_every_dtype
from torch import Tensor

from distckpt.errors import DamagedCheckpoint
from distckpt.formats.safetensors_reading import SafetensorsFile, read_tensors
from distckpt.manifest import FileEntry, digest
from distckpt.stores.local import LocalStore

NAME = "model.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What allocates more than 200 MB fails in this test."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 200_000_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[str, list[int], list[int]]]:
    return {
        key: (str(one.dtype), list(one.shape), one.contiguous().reshape(-1).view(torch.uint8).tolist())
        for key, one in tensors.items()
    }


def write(store: LocalStore, tensors: dict[str, Tensor]) -> FileEntry:
    """The file, as stock safetensors writes it, and what a manifest would say of it."""
    data = safetensors.torch.save(tensors)
    (store.root / NAME).write_bytes(data)
    return FileEntry(NAME, len(data), digest(data))


def test_we_read_every_bit_of_what_stock_safetensors_wrote(store):
    tensors = of_every_dtype()
    safetensors.torch.save_file(tensors, store.root / NAME, metadata={"format": "pt", "note": "from stock"})
    assert bits(read_tensors(store, NAME)) == bits(tensors)


def header(fields: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: Any, begin: Any, end: Any, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty": b"",
    "half a length": b"\x10\0\0\0",
    "a length over the file": header({}, length=1 << 40),
    "a length over everything": header({}, length=(1 << 64) - 1),
    "a header that is a list": header([]),
    "a header that is no JSON": header(b"{..}"),
    "a header that is no text": header(b'{"\xff\xfe": 1}'),
    "brackets without end": header(b'{"a":' * 100_000),
    "a name twice": header(b'{"a":%s,"a":%s}' % ((json.dumps(tensor([1], 0, 1)).encode(),) * 2), b"1"),
    "an overlap": header({"a": tensor([2], 0, 2), "b": tensor([2], 1, 3)}, b"123"),
    "the same bytes twice": header({"a": tensor([2], 0, 2), "b": tensor([2], 0, 2)}, b"12"),
    "a hole": header({"a": tensor([1], 0, 1), "b": tensor([1], 2, 3)}, b"123"),
    "a hole at the start": header({"a": tensor([1], 1, 2)}, b"12"),
    "bytes left over": header({"a": tensor([1], 0, 1)}, b"12"),
    "too few bytes": header({"a": tensor([3], 0, 3)}, b"12"),
    "a terabyte that is not there": header({"a": tensor([1 << 40], 0, 1 << 40)}, b"12"),
    "more than can be counted": header({"a": tensor([1 << 70], 0, 1 << 70)}, b"12"),
    "nothing, of a size that cannot be counted": header({"a": tensor([0, 1 << 70], 0, 0)}),
    "nothing, of a size that overflows": header({"a": tensor([1 << 40, 1 << 40, 0], 0, 0)}),
    "more dimensions than a tensor has": header({"a": tensor([1] * 100_000, 0, 1)}, b"1"),
    "a number of elements that takes hours to work out": header({"a": tensor([1 << 62] * 500_000, 0, 1)}, b"1"),
    "a shape that does not fit its bytes": header({"a": tensor([3], 0, 2)}, b"12"),
    "offsets turned round": header({"a": tensor([1], 1, 0)}, b"1"),
    "negative offsets": header({"a": tensor([1], -1, 0)}, b"1"),
    "a negative shape": header({"a": tensor([-1, -1], 0, 1)}, b"1"),
    "a shape of truths": header({"a": tensor([True], 0, 1)}, b"1"),
    "truths for a shape like one before": header({"a": tensor([1], 0, 1), "b": tensor([True], 1, 2)}, b"12"),
    "words for a shape like one before": header({"a": tensor([1], 0, 1), "b": tensor("[1]", 1, 2)}, b"12"),
    "a shape of fractions": header({"a": tensor([1.0], 0, 1)}, b"1"),
    "no shape": header({"a": tensor(None, 0, 1)}, b"1"),
    "NaN": header(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"1"),
    "an unknown dtype": header({"a": tensor([1], 0, 1, "Q8")}, b"1"),
    "a dtype that is none": header({"a": tensor([1], 0, 1, ["U8"])}, b"1"),
    "no dtype": header({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"1"),
    "no offsets": header({"a": {"dtype": "U8", "shape": [1]}}, b"1"),
    "three offsets": header({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"1"),
    "a tensor that is a number": header({"a": 1}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_header_is_refused_by_the_name_of_the_file(store, little_memory, what):
    (store.root / NAME).write_bytes(HOSTILE[what])
    with pytest.raises(DamagedCheckpoint, match=f"^{NAME} is no whole safetensors file"):
        read_tensors(store, NAME)


def small() -> dict[str, Tensor]:
    return {"weight": torch.arange(5, dtype=torch.float64), "bias": torch.arange(3, dtype=torch.int8)}


def test_every_truncation_is_found(store):
    entry = write(store, small())
    with (store.root / NAME).open("r+b") as file:
        for size in range(entry.size_bytes - 1, -1, -1):
            file.truncate(size)
            with pytest.raises(DamagedCheckpoint, match=f"{NAME} has {size} bytes"):
                read_tensors(store, NAME, entry)
            with pytest.raises(DamagedCheckpoint, match=f"{NAME} is no whole safetensors file"):
                read_tensors(store, NAME)


def flipped(place: Path, where: Iterable[int]) -> Iterator[None]:
    """Each time that it yields, another bit of the file is not what it was; in the end none."""
    with place.open("r+b", buffering=0) as file:
        for offset in where:
            (right,) = os.pread(file.fileno(), 1, offset)
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([right ^ 1 << bit]), offset)
                yield
            os.pwrite(file.fileno(), bytes([right]), offset)


def test_every_flipped_bit_is_found(store):
    entry = write(store, small())
    for _ in flipped(store.root / NAME, range(entry.size_bytes)):
        with pytest.raises(DamagedCheckpoint, match=NAME):
            read_tensors(store, NAME, entry)
    assert bits(read_tensors(store, NAME, entry)) == bits(small())


def test_a_flipped_bit_that_nobody_has_a_digest_of_still_raises_nothing_else(store):
    write(store, small())
    refused = 0
    for _ in flipped(store.root / NAME, range(150)):
        try:
            read_tensors(store, NAME)
        except DamagedCheckpoint:
            refused += 1
    assert refused > 500


def test_bytes_added_behind_are_found(store):
    entry = write(store, small())
    with (store.root / NAME).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DamagedCheckpoint, match="were committed"):
        read_tensors(store, NAME, entry)
    with pytest.raises(DamagedCheckpoint, match=r"end at 43 of 44 bytes"):
        read_tensors(store, NAME)


def test_what_is_no_file_is_an_error_of_the_system(store):
    with pytest.raises(FileNotFoundError):
        read_tensors(store, NAME)


@pytest.mark.parametrize("is_committed", [True, False])
@pytest.mark.parametrize("weight", [torch.arange(5, dtype=torch.int64), torch.arange(6, dtype=torch.float64)])
def test_a_header_that_is_another_one_when_the_file_is_read_is_found(store, is_committed, weight):
    entry = write(store, small())
    file = SafetensorsFile(store, NAME, entry if is_committed else None)
    write(store, small() | {"weight": weight})
    into = torch.zeros(5, dtype=torch.float64)
    with pytest.raises(DamagedCheckpoint, match=NAME):
        file.fill({"weight": [into]})
    assert not into.any(), "nothing is laid where another header says"


def test_a_file_without_tensors_has_none(store):
    assert read_tensors(store, NAME, write(store, {})) == {}

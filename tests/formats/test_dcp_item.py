"""Tensors of ``torch.save`` among other bytes, read in one pass."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from every_dtype import of_every_dtype
from torch import Tensor, nn
from typing_extensions import Buffer

from distckpt.formats.dcp_item import read_item
from distckpt.formats.filling import SMALL_BYTES
from distckpt.formats.shard_file import Wanted

MORE = b"what lies behind it"


class Memory:
    """A source of bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self.size_bytes = len(data)
        self._stream = io.BytesIO(data)

    def read_into(self, target: Buffer) -> None:
        view = memoryview(target).cast("B")
        if self._stream.readinto(view) != len(view):
            raise EOFError("it ends")

    def skip(self, count: int) -> None:
        self._stream.seek(count, io.SEEK_CUR)


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def read(data: bytes, dtype: torch.dtype, sizes: Sequence[int]) -> Tensor:
    """The tensor that is in ``data``."""
    target = torch.empty(tuple(sizes), dtype=dtype)
    source = Memory(data + MORE)
    read_item(source, len(data), dtype, tuple(sizes), [Wanted(tuple(sizes), (0,) * len(sizes), target)])
    rest = bytearray(len(MORE))
    source.read_into(rest)
    assert rest == MORE, "and all of it was read"
    return target


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).tolist())


LARGE = 3 * SMALL_BYTES // 4 + 100, 3  # so many numbers of four bytes are no small tensor
MADE: dict[str, Callable[[], Any]] = {
    "large": lambda: torch.randn(LARGE),
    "transposed": lambda: torch.randn(5, 4).t(),
    "large and transposed": lambda: torch.randn(LARGE).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "scalar": lambda: torch.tensor(3),
    "conjugated": lambda: torch.randn(7, dtype=torch.complex64).conj(),
    "negated": lambda: torch._neg_view(torch.randn(7)),
    "both": lambda: torch.randn(7, dtype=torch.complex128).conj().imag,
    "of ones": lambda: torch.randn(1, 5, 1).permute(2, 1, 0),
    "a view": lambda: torch.randn(10, 6)[2:7, 1:4],
    "expanded": lambda: torch.randn(1, 6).expand(4, 6),
    "a parameter": lambda: nn.Parameter(torch.randn(4, 3)),
    "half complex": lambda: torch.randint(0, 255, (12,), dtype=torch.uint8).view(torch.complex32),
}


@pytest.mark.parametrize("kind", MADE)
def test_what_torch_saved_is_read_to_the_bit(kind):
    tensor = MADE[kind]()
    assert bits(read(saved(tensor), tensor.dtype, tensor.shape)) == bits(tensor)


def test_every_dtype_is_read_to_the_bit():
    for name, tensor in of_every_dtype().items():
        if tensor.numel():
            assert bits(read(saved(tensor), tensor.dtype, tensor.shape)) == bits(tensor), name


@pytest.mark.parametrize("shape", [(6, 5), (2 * SMALL_BYTES // 20, 5)])
def test_boxes_of_it_go_to_their_targets(shape):
    tensor = torch.randn(shape)
    whole, corner, column = torch.empty(shape), torch.empty(2, 3), torch.empty(shape[0], 4)[:, 1:2]
    wanted = [
        Wanted(shape, (0, 0), whole), Wanted(shape, (1, 2), corner), Wanted(shape, (0, 4), column)
    ]  # fmt: skip
    data = saved(tensor)
    read_item(Memory(data), len(data), tensor.dtype, shape, wanted)
    assert torch.equal(whole, tensor) and torch.equal(corner, tensor[1:3, 2:]) and torch.equal(column, tensor[:, 4:])


@pytest.mark.parametrize("alignment", [1, 4096, 32768])
def test_records_may_be_aligned_to_anything(alignment):
    tensor = torch.randn(1000)
    with torch.utils.serialization.config.patch("save.storage_alignment", alignment):
        assert torch.equal(read(saved(tensor), tensor.dtype, tensor.shape), tensor)


def test_a_file_without_checksums_is_read():
    tensor = torch.randn(50)
    is_summed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        data = saved(tensor)
    finally:
        torch.serialization.set_crc32_options(is_summed)
    assert torch.equal(read(data, tensor.dtype, tensor.shape), tensor)


@pytest.mark.parametrize("kind", ["scalar", "a view", "transposed"])
def test_no_bit_that_flipped_changes_what_is_read(kind):
    """A flipped bit is an error, or of no importance: in padding, in what says on which device a tensor was."""
    tensor = MADE[kind]()
    data = bytearray(saved(tensor))
    refused = 0
    for at in range(len(data)):
        bit = 1 << random.Random(at).randrange(8)
        data[at] ^= bit
        try:
            assert bits(read(bytes(data), tensor.dtype, tensor.shape)) == bits(tensor), f"byte {at}"
        except (ValueError, EOFError):
            refused += 1
        finally:
            data[at] ^= bit
    assert refused > 300, "most of it is of importance"


@pytest.mark.parametrize("kind", ["scalar", "large"])
def test_what_is_cut_off_is_refused(kind):
    tensor = MADE[kind]()
    data = saved(tensor)
    for count in {*range(0, min(len(data), 2000), 7), *range(1, 700, 3)}:
        with pytest.raises((ValueError, EOFError)):
            read(data[:count], tensor.dtype, tensor.shape)
        with pytest.raises((ValueError, EOFError)):
            read(data[: len(data) - count] if count else b"", tensor.dtype, tensor.shape)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_bit_of_a_large_tensor_that_flipped_is_found(place):
    tensor = torch.randn(LARGE)
    data = bytearray(saved(tensor))
    at = data.index(tensor.numpy().tobytes())
    data[at + {"first": 0, "middle": tensor.nbytes // 2, "last": tensor.nbytes - 1}[place]] ^= 16
    with pytest.raises(ValueError, match="the checksum in it does not match"):
        read(bytes(data), tensor.dtype, tensor.shape)


@pytest.mark.parametrize(
    "value, told",
    [
        ({"a": torch.randn(3)}, "holds no tensor"),
        (torch.randn(4), "should torch.float32 of"),
        (torch.randn(3, dtype=torch.float64), "it holds torch.float64"),
        (torch.nn.Linear(1, 1), r"asks for torch\.nn"),
        (torch.randn(3).to_sparse(), "asks for torch._utils._rebuild_sparse"),
        (torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8), "asks for torch._utils._rebuild_qtensor"),
        ("text", "holds no tensor"),
    ],
)
def test_what_is_no_such_tensor_is_refused(value, told):
    with pytest.raises(ValueError, match=told):
        read(saved(value), torch.float32, (3,))


def rewritten(change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """The file of a tensor of three numbers, with other contents of its records, and right checksums."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(torch.ones(3)))) as old, zipfile.ZipFile(stream, "w", method) as new:
        for one in old.infolist():
            new.writestr(one.filename, change(one.filename, old.read(one)))
    return stream.getvalue()


def test_any_zip_file_of_the_right_records_is_read():
    assert torch.equal(read(rewritten(lambda name, data: data), torch.float32, (3,)), torch.ones(3))


@pytest.mark.parametrize(
    "change, told",
    [
        (
            lambda name, data: data.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor"),
            "asks for torch._utils._rebuild_tensor",
        ),
        (lambda name, data: data.replace(b"ctorch._utils\n_rebuild_tensor_v2", b"cos\nsystem"), "asks for os.system"),
        (lambda name, data: data.replace(b"K\x03\x85q\x06", b"K\x04\x85q\x06"), "last element of a tensor is 3 of 3"),
        (lambda name, data: data.replace(b"QK\0", b"QK\1"), "last element of a tensor is 3 of 3"),
        (
            lambda name, data: data.replace(b"K\x03tq\x05", b"J\xff\xff\xff\x7ftq\x05"),
            "bytes of a tensor are not in its",
        ),
        (lambda name, data: data.replace(b"K\x03tq\x05", b"J\xff\xff\xff\xfftq\x05"), "of no size"),
        (lambda name, data: data.replace(b"storage", b"sturage"), "persistent id is none"),
        (lambda name, data: data.replace(b"FloatStorage", b"Floatstorage"), "asks for torch.Floatstorage"),
        (
            lambda name, data: data[:8] if name.endswith("data/0") else data,
            "something else of its tensor|its directory",
        ),
        (lambda name, data: b"big" if name.endswith("byteorder") else data, "another byte order"),
    ],
)
def test_a_file_that_lies_about_its_tensor_is_refused(change, told):
    data = rewritten(change)
    assert data != rewritten(lambda name, data: data)
    with pytest.raises(ValueError, match=told):
        read(data, torch.float32, (3,))


def test_a_compressed_file_is_refused():
    with pytest.raises(ValueError, match=r"no file of torch\.save"):
        read(rewritten(lambda name, data: data, zipfile.ZIP_DEFLATED), torch.float32, (3,))


def test_a_tensor_before_much_else_is_refused():
    data = saved(torch.ones(3))
    with pytest.raises(ValueError, match="bytes follow its tensor"):
        read(data + bytes(2 << 20), torch.float32, (3,))

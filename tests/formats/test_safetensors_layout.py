"""Where the tensors of a safetensors file lie: as stock readers expect, and each aligned."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors.torch
import torch
from every_dtype import of_every_dtype
from torch import Tensor

from distckpt.formats import Image
from distckpt.formats.safetensors_file import DTYPES
from distckpt.formats.safetensors_layout import lay_out


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[str, list[int], bytes]]:
    flat = {key: one.reshape(-1).view(torch.uint8).numpy().tobytes() for key, one in tensors.items()}
    return {key: (str(one.dtype), list(one.shape), flat[key]) for key, one in tensors.items()}


def to_bytes(image: Image) -> bytes:
    data = bytearray(image.size_bytes)
    pieces = [
        *image.texts,
        *((offset, bits({"": one})[""][2]) for offset, one in zip(image.offsets, image.tensors, strict=True)),
    ]
    end = 0
    for offset, piece in sorted(pieces, key=lambda one: (one[0], len(one[1]))):
        assert offset == end, "there are no holes and no overlaps"
        data[offset : offset + len(piece)] = piece
        end += len(piece)
    assert end == len(data)
    return bytes(data)


def test_stock_safetensors_reads_every_bit_of_ours(tmp_path):
    tensors = of_every_dtype()
    image = lay_out("model.safetensors", tensors, {})
    (tmp_path / "model.safetensors").write_bytes(to_bytes(image))
    assert bits(safetensors.torch.load_file(tmp_path / "model.safetensors")) == bits(tensors)


@pytest.mark.parametrize("count", [0, 1, 2, 60, 61, 62, 200])
def test_tensor_data_begin_on_a_4_kib_boundary_and_each_tensor_is_aligned(count):
    dtypes = list(DTYPES)
    tensors = {f"layer.{nth}.weight": torch.zeros(nth % 4, dtype=dtypes[nth % len(dtypes)]) for nth in range(count)}
    data = to_bytes(lay_out("model.safetensors", tensors, {}))
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    assert begin % 4096 == 0
    for key, field in json.loads(data[8:begin]).items():
        if key != "__metadata__":
            assert (begin + field["data_offsets"][0]) % tensors[key].element_size() == 0

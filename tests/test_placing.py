"""Pieces in any order make the files that were laid out."""

from __future__ import annotations

import random
import zipfile
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distckpt.formats import Chunk, Image, Piece, Sum
from distckpt.formats.placeholders import Placeholders
from distckpt.formats.safetensors_layout import lay_out
from distckpt.formats.streaming import all_of, whole
from distckpt.formats.zip_image import ZipLayout
from distckpt.placing import place


def in_pieces(tensor: Tensor, elements: int) -> list[Piece]:
    flat = tensor.reshape(-1)
    return [Piece(all_of(tensor), at, flat[at : at + elements]) for at in range(0, len(flat), elements)]


def by_columns(tensor: Tensor) -> list[Piece]:
    rows, columns = tensor.shape
    return [Piece(Chunk(tensor, (0, at), (rows, 1)), 0, tensor[:, at].contiguous()) for at in range(columns)]


@pytest.mark.parametrize("seed", range(5))
def test_pieces_in_any_order_make_a_file_with_the_right_checksums(tmp_path, seed):
    tensors = {"a": torch.randn(100), "b": torch.arange(60).view(12, 5), "c": torch.tensor(3)}
    placeholders = Placeholders()
    image = ZipLayout().lay_out(placeholders.replaced(tensors))
    pieces = [*in_pieces(tensors["a"], 7), *by_columns(tensors["b"]), whole(tensors["c"], tensors["c"])]
    random.Random(seed).shuffle(pieces)
    place(tmp_path / "one.pth", [image], pieces, placeholders.standing)
    found = torch.load(tmp_path / "one.pth", weights_only=True)
    assert all(torch.equal(found[key], one) for key, one in tensors.items())
    assert zipfile.ZipFile(tmp_path / "one.pth").testzip() is None


def test_a_tensor_goes_to_each_of_its_places_in_the_dtype_it_has_there(tmp_path):
    tensor = torch.randn(10)
    narrow, wide = Placeholders(torch.bfloat16), Placeholders()
    images = [lay_out(name, one.replaced({"w": tensor, "n": tensor}), {}) for name, one in [("1", narrow), ("2", wide)]]
    place(tmp_path, images, in_pieces(tensor, 3), narrow.standing | wide.standing)
    for name, expected in [("1", tensor.bfloat16()), ("2", tensor)]:
        found = safetensors.torch.load_file(tmp_path / name)
        assert torch.equal(found["w"], expected) and torch.equal(found["n"], expected)


def test_a_file_of_texts_alone_and_one_of_nothing_are_files(tmp_path):
    place(tmp_path, [Image("text", 4, [(0, b"text")]), Image("nothing", 0, [])], [], {})
    assert (tmp_path / "text").read_bytes() == b"text" and (tmp_path / "nothing").read_bytes() == b""


def test_a_sum_of_what_nobody_wrote_is_that_of_zeros(tmp_path):
    place(tmp_path / "one", [Image("", 9, [], sums=[Sum(0, 5, (5,))])], [], {})
    data = Path(tmp_path / "one").read_bytes()
    assert int.from_bytes(data[5:], "little") == zlib.crc32(bytes(5))


def test_what_the_pieces_raise_is_raised(tmp_path):
    def failing():
        raise ZeroDivisionError
        yield

    with pytest.raises(ZeroDivisionError):
        place(tmp_path / "one", [Image("", 1, [])], failing(), {})

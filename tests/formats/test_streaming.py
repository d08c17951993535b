"""Tensors are handed on in pieces, each element once, in memory that does not grow with them."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import xxhash
from every_dtype import of_every_dtype
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distckpt.formats import Chunk, Piece
from distckpt.formats.filling import Span
from distckpt.formats.hashing import CheckedBlocks
from distckpt.formats.stand_ins import stand_in
from distckpt.formats.streaming import PIECE_BYTES, all_of, runs, stream, whole


class Memory:
    """Bytes as a file to read."""

    def __init__(self, data: bytes) -> None:
        self.size_bytes = len(data)
        self._data = io.BytesIO(data)

    def read_into(self, target: Any) -> None:
        if self._data.readinto(target) != len(target):
            raise EOFError("no more")

    def skip(self, count: int) -> None:
        self._data.seek(count, io.SEEK_CUR)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def put_together(pieces, tensors: list[Tensor]) -> list[Tensor]:
    """What the pieces make of such tensors, by the ranges that they lie in."""
    found = [torch.full([one.numel() * one.element_size()], 7, dtype=torch.uint8).view(one.dtype) for one in tensors]
    places = {id(one): nth for nth, one in enumerate(tensors)}
    for piece in pieces:
        for at, begin, count in runs(piece):
            found[places[id(piece.chunk.standing)]][at : at + count] = piece.elements[begin : begin + count]
    return [flat.view(one.shape) for flat, one in zip(found, tensors, strict=True)]


extents = st.integers(1, 5).flatmap(
    lambda extent: st.integers(0, extent - 1).flatmap(
        lambda low: st.tuples(st.just(extent), st.just(low), st.integers(1, extent - low))
    )
)


@settings(max_examples=300, deadline=None)
@given(box=st.lists(extents, max_size=4), data=st.data())
def test_the_ranges_of_a_piece_are_where_its_elements_lie_in_the_tensor(box, data):
    shape, offsets, sizes = ([one[nth] for one in box] for nth in range(3))
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    part = tensor[tuple(slice(low, low + size) for low, size in zip(offsets, sizes, strict=True))].reshape(-1)
    begin = data.draw(st.integers(0, len(part) - 1))
    end = data.draw(st.integers(begin + 1, len(part)))
    piece = Piece(Chunk(stand_in(tuple(shape), torch.int64), tuple(offsets), tuple(sizes)), begin, part[begin:end])
    found = list(runs(piece))
    for at, first, count in found:
        assert torch.equal(tensor.view(-1)[at : at + count], piece.elements[first : first + count])
    assert [first for _, first, _ in found] == [0, *torch.tensor([count for _, _, count in found]).cumsum(0)[:-1]]
    assert sum(count for _, _, count in found) == end - begin


def test_rows_and_whole_tensors_are_one_range():
    tensor = torch.arange(24).view(4, 3, 2)
    assert list(runs(whole(tensor, tensor))) == [(0, 0, 24)]
    assert list(runs(Piece(Chunk(tensor, (1, 0, 0), (2, 3, 2)), 0, tensor[1:3].reshape(-1)))) == [(6, 0, 12)]


def test_every_kind_of_tensor_comes_out_as_it_lies_there():
    tensors = [*of_every_dtype().values(), torch.tensor([1 + 2j], dtype=torch.complex128)]
    data = b"".join(map(bytes_of, tensors))
    digest = xxhash.xxh3_128()
    spans = [Span(one.nbytes, chunks=[all_of(one)]) for one in tensors]
    for found, tensor in zip(put_together(stream(Memory(data), spans, digest), tensors), tensors, strict=True):
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and bytes_of(found) == bytes_of(tensor)
    assert digest.digest() == xxhash.xxh3_128_digest(data)


def test_a_large_tensor_comes_in_pieces_of_the_same_few_bytes_of_memory():
    tensor = torch.arange(2 * PIECE_BYTES + 10, dtype=torch.int32)
    standing = stand_in(tuple(tensor.shape), torch.int32)
    places, sizes, checked = set(), [], 0
    for piece in stream(Memory(bytes_of(tensor)), [Span(tensor.nbytes, chunks=[all_of(standing)])], xxhash.xxh3_128()):
        assert torch.equal(piece.elements, tensor[piece.begin : piece.begin + len(piece.elements)])
        places.add(piece.elements.data_ptr())
        sizes.append(piece.elements.nbytes)
        checked += len(piece.elements)
    assert len(places) == 1 and max(sizes) == PIECE_BYTES and checked == len(tensor)


def test_what_nobody_wants_is_hashed_and_what_is_skipped_is_not():
    data = bytes(range(256)) * (PIECE_BYTES // 128)  # two blocks
    blocks = [xxhash.xxh3_128_hexdigest(data[at : at + PIECE_BYTES]) for at in (0, PIECE_BYTES)]
    wanted = stand_in((4,), torch.uint8)
    spans = [
        Span(PIECE_BYTES, is_skipped=True),
        Span(8),
        Span(4, chunks=[all_of(wanted)]),
        Span(PIECE_BYTES - 12),
    ]
    checked = CheckedBlocks(len(data), PIECE_BYTES, ["not looked at", blocks[1]], ValueError("damaged"))
    (piece,) = [(one.begin, one.elements.tolist()) for one in stream(Memory(data), spans, checked)]
    assert piece == (0, [8, 9, 10, 11])
    damaged = CheckedBlocks(len(data), PIECE_BYTES, ["not looked at", blocks[0][::-1]], ValueError("damaged"))
    with pytest.raises(ValueError, match="damaged"):
        list(stream(Memory(data), spans, damaged))


def test_a_file_that_ends_too_early_raises():
    with pytest.raises(EOFError):
        list(stream(Memory(b"123"), [Span(4, chunks=[all_of(stand_in((4,), torch.uint8))])], xxhash.xxh3_128()))


@pytest.mark.parametrize(
    "make", [lambda one: one.t(), lambda one: one.conj(), lambda one: one.imag, lambda one: one[1]]
)
def test_a_tensor_in_memory_is_one_piece_in_the_order_of_its_elements(make):
    tensor = make(torch.randn(3, 4, dtype=torch.complex64))
    piece = whole(tensor, tensor)
    assert piece.begin == 0 and piece.elements.tolist() == tensor.reshape(-1).tolist()
    assert not piece.elements.is_conj() and not piece.elements.is_neg()

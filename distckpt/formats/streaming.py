"""Tensors of a file that are handed on in pieces while it is read, so that none of them is ever in memory whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from distckpt.formats import Chunk, Piece
from distckpt.formats.filling import Span
from distckpt.formats.hashing import Hash
from distckpt.stores import Source

PIECE_BYTES = 4 * 1024 * 1024  # whole elements of every dtype


def stream(source: Source, spans: Iterable[Span], digest: Hash) -> Iterator[Piece]:
    """The elements of all chunks that the spans have, piece by piece. Once that has ended, all bytes of the spans but
    the skipped ones are in ``digest``.

    Raises:
        EOFError, OSError: where the source does.
        What the digest does.
    """
    memory = memoryview(bytearray(PIECE_BYTES))
    scratch = torch.frombuffer(memory, dtype=torch.uint8)
    for span in spans:
        if span.is_skipped:
            digest.skip(span.size_bytes)  # type: ignore[attr-defined]  # none but those that know how are told to
            source.skip(span.size_bytes)
            continue
        for begin in range(0, span.size_bytes, PIECE_BYTES):
            count = min(PIECE_BYTES, span.size_bytes - begin)
            source.read_into(memory[:count])
            digest.update(memory[:count])
            for chunk in span.chunks:
                dtype = chunk.standing.dtype
                yield Piece(chunk, begin // dtype.itemsize, scratch[:count].view(dtype))


def all_of(standing: Tensor) -> Chunk:
    """The chunk that is a whole tensor."""
    return Chunk(standing, (0,) * standing.ndim, tuple(standing.shape))


def whole(standing: Tensor, tensor: Tensor) -> Piece:
    """All elements of ``tensor``, which ``standing`` stands for."""
    return Piece(all_of(standing), 0, tensor.detach().resolve_conj().resolve_neg().reshape(-1).cpu())


def runs(piece: Piece) -> Iterator[tuple[int, int, int]]:
    """Where in its tensor the elements of a piece lie: range after range, as few as there can be. Of each, how many
    elements of the tensor come before it, how many of the piece, and how many there are in it."""
    (standing, offsets, sizes), begin, elements = piece
    shape = tuple(standing.shape)
    strides = list(accumulate(reversed(shape[1:]), mul, initial=1))[::-1] if shape else []
    # A range goes through all dimensions that the chunk has whole, and through one that it does not.
    inner = len(shape)
    while inner and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    outer = sizes[: max(inner - 1, 0)]
    length = math.prod(sizes[len(outer) :])
    first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    done, end = 0, len(elements)
    while done < end:
        number, within = divmod(begin + done, length)
        at = first + within
        for extent, stride in zip(reversed(outer), reversed(strides[: len(outer)]), strict=True):
            number, coordinate = divmod(number, extent)
            at += coordinate * stride
        count = min(length - within, end - done)
        yield at, done, count
        done += count

"""One pass through a file, from its start to its end: its bytes are hashed, and laid into the tensors they are for."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distckpt.formats import Chunk
from distckpt.formats.hashing import Behind, Hash, behind
from distckpt.formats.shards import boxes_of, bytes_of, is_spread, narrowed, view_of
from distckpt.stores import Source

# One call reads what is this small together with its neighbours; larger tensors are read into where they lie.
SMALL_BYTES = 256 * 1024
_SCRATCH_BYTES = 8 * 1024 * 1024
_PIECE_BYTES = 4 * 1024 * 1024  # what was read is hashed before it has left the cache

_move = ctypes.PyDLL(None).memmove  # keeps the GIL, which would cost more to get back than so few bytes take
_move.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_move.restype = ctypes.c_void_p


class Cut(NamedTuple):
    """A tensor that holds a box of what a span does, from ``begins`` on."""

    begins: tuple[int, ...]
    target: Tensor


class Span(NamedTuple):
    """So many bytes, one after another: the elements of a tensor, or of some slices of it.

    Attributes:
        targets: tensors, of one shape and dtype and so many bytes, that hold them afterwards.
        cuts: tensors that hold a part of them.
        dtype, shape: what they are, where there are cuts.
        chunks: what they are handed on as, see `distckpt.formats.streaming`; then there are neither targets nor cuts.
        is_skipped: whether nobody wants them: they are neither read nor hashed.
    """

    size_bytes: int
    targets: Sequence[Tensor] = ()
    cuts: Sequence[Cut] = ()
    dtype: torch.dtype = torch.uint8
    shape: tuple[int, ...] = ()
    is_skipped: bool = False
    chunks: Sequence[Chunk] = ()


def span_of(dtype: torch.dtype, shape: tuple[int, ...], size_bytes: int, targets: Sequence[Tensor]) -> Span:
    """All elements of a tensor. A target of its shape holds them afterwards; one that is spread over ranks, what this
    rank has of them. What safetensors has no word for lies there as bytes."""
    spread = [one if one.dtype is dtype else bytes_of(one) for one in targets if is_spread(one)]
    if not spread:
        return Span(size_bytes, targets)
    cuts = [Cut(box.offsets, view_of(one, box)) for one in spread for box in boxes_of(one)]
    whole = [one for one in targets if not is_spread(one)]
    return Span(size_bytes, whole, cuts, dtype, shape)


def fill(source: Source, spans: Iterable[Span], digest: Hash) -> None:
    """The next bytes of ``source`` are in ``digest`` and, span after span, in the tensors that are given with each.

    Takes a few MiB of memory, and as much as the largest tensor whose elements do not lie in order. Bytes are hashed by
    a thread of their own, meanwhile: nobody else may change the tensors.

    Raises:
        EOFError, OSError: where the source does.
        What the digest does.
    """
    with torch.no_grad(), behind(digest) as hashed:
        one_pass = _Pass(source, hashed)
        for span in spans:
            if span.is_skipped:
                one_pass.skip(span.size_bytes)
            elif span.size_bytes <= SMALL_BYTES:
                one_pass.take_small(span)
            else:
                one_pass.take_large(span)
        one_pass.flush()


class _Pass:
    def __init__(self, source: Source, digest: Behind) -> None:
        self._source = source
        self._digest = digest
        self._scratch = torch.empty(_SCRATCH_BYTES, dtype=torch.uint8)
        self._small: list[tuple[int, Span]] = []
        self._count = 0

    def skip(self, count: int) -> None:
        self.flush()
        self._digest.skip(count)
        self._source.skip(count)

    def take_small(self, span: Span) -> None:
        if self._count + span.size_bytes > _SCRATCH_BYTES:
            self.flush()
        if span.targets or span.cuts:
            self._small.append((self._count, span))
        self._count += span.size_bytes

    def flush(self) -> None:
        """What is small was read and handed out."""
        small, count = self._small, self._count
        self._small, self._count = [], 0
        self._read_scratch(count)
        base = self._scratch.data_ptr()
        moved: list[Tensor] = []
        others: defaultdict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
        for begin, span in small:
            for target in span.targets:
                if target.is_cpu and _is_flat(target):
                    _move(target.data_ptr(), base + begin, span.size_bytes)
                    moved.append(target)
                else:
                    others[target.device].append((begin, target))
            if span.cuts:
                piece = self._scratch[begin : begin + span.size_bytes]
                piece = piece.clone() if begin % span.dtype.itemsize else piece
                _hand_out(piece.view(span.dtype).view(span.shape), span.cuts)
        torch.autograd.graph.increment_version(moved)
        for device, placed in others.items():
            _scatter(self._scratch[:count], device, placed)

    def take_large(self, span: Span) -> None:
        self.flush()
        if not span.targets and not span.cuts:
            for begin in range(0, span.size_bytes, _PIECE_BYTES):
                self._read_scratch(min(_PIECE_BYTES, span.size_bytes - begin))
            return
        fitting = [*filter(_is_plain, span.targets), *filter(_is_flat, span.targets)]
        first = fitting[0] if fitting else _memory_for(span)
        if _is_plain(first):
            self._read(first)
        else:
            self._carry(first)
        for target in span.targets:
            if target is not first:
                target.copy_(first)
        _hand_out(first, span.cuts)
        if not fitting:
            self._digest.drain()  # before the memory is gone that none of them has

    def _carry(self, target: Tensor) -> None:
        """``target``, on a device, is read through memory that the device copies from fast."""
        if target.is_cuda and not self._scratch.is_pinned():
            self._digest.drain()
            self._scratch = torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, pin_memory=True)
        elements = target.reshape(-1).view(torch.uint8)
        for begin in range(0, len(elements), _SCRATCH_BYTES):
            piece = elements[begin : begin + _SCRATCH_BYTES]
            self._read_scratch(len(piece))
            piece.copy_(self._scratch[: len(piece)])

    def _read_scratch(self, count: int) -> None:
        """The next bytes are in the scratch memory, where those before are hashed by now."""
        self._digest.drain()
        self._read(self._scratch[:count])

    def _read(self, target: Tensor) -> None:
        """``target``, on the host and in order, holds the next bytes."""
        if not target.nbytes:
            return
        memory = memoryview((ctypes.c_ubyte * target.nbytes).from_address(target.data_ptr())).cast("B")
        for begin in range(0, len(memory), _PIECE_BYTES):
            piece = memory[begin : begin + _PIECE_BYTES]
            self._source.read_into(piece)
            self._digest.update(piece)
        torch.autograd.graph.increment_version(target)


def _scatter(scratch: Tensor, device: torch.device, placed: Sequence[tuple[int, Tensor]]) -> None:
    """The targets, all on ``device``, hold what stands at their offsets in ``scratch``: one transfer, and few kernels
    for all."""
    there = scratch.to(device)
    alike: defaultdict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for begin, target in placed:
        piece = there[begin : begin + target.nbytes]
        if begin % target.element_size():
            piece = piece.clone()
        piece = piece.view(target.dtype).view(target.shape)
        if target.is_conj() or target.is_neg():
            target.copy_(piece)
        else:
            targets, pieces = alike[target.dtype]
            targets.append(target)
            pieces.append(piece)
    for targets, pieces in alike.values():
        torch._foreach_copy_(targets, pieces)


def _hand_out(piece: Tensor, cuts: Sequence[Cut]) -> None:
    for begins, target in cuts:
        target.copy_(narrowed(piece, begins, tuple(target.shape)))


def _memory_for(span: Span) -> Tensor:
    if span.targets:
        return torch.empty(span.targets[0].shape, dtype=span.targets[0].dtype)
    return torch.empty(span.shape, dtype=span.dtype)


def _is_flat(tensor: Tensor) -> bool:
    """Whether its elements lie in memory one after another, as they stand in a file."""
    return tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and _is_flat(tensor)

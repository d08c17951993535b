"""What is copied where, how and when: the tensors of a save sorted for the copy into the arena."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from distckpt.engine.copying import SMALL_BYTES, Piece, move
from distckpt.engine.guard import Place
from distckpt.engine.witness import Witnesses, is_there
from distckpt.errors import DistckptError
from distckpt.formats import Image

_PAGE_BYTES = 4096


class Name(NamedTuple):
    """What people call a tensor: the file that it goes to, and its key there."""

    file: str
    key: str

    def __str__(self) -> str:
        return f"{self.key} of {self.file}"


@dataclass
class Plan:
    """Where everything goes, by its offset in the arena.

    Attributes:
        starts: where each image begins; the last is where the next one would.
        texts, small: copied first, and by one thread: a call for each costs less than to share them.
        odd: what torch has to copy: it lies on an accelerator, or not contiguous.
        now, late: large ones in host memory; those that may be copied beside training are late.
        late_odd: those on an accelerator that may.
        witnesses: of all that is late.
    """

    starts: list[int] = field(default_factory=list)
    texts: list[tuple[int, bytes]] = field(default_factory=list)
    small: list[Tensor] = field(default_factory=list)
    small_offsets: list[int] = field(default_factory=list)
    odd: list[tuple[int, Tensor]] = field(default_factory=list)
    now: list[Piece] = field(default_factory=list)
    late: list[Piece] = field(default_factory=list)
    late_odd: list[tuple[int, Tensor]] = field(default_factory=list)
    witnesses: Witnesses = field(default_factory=Witnesses)
    _witnessed: list[tuple[Image, int]] = field(default_factory=list)

    @classmethod
    def of(cls, images: Sequence[Image], *, may_be_late: Callable[[Place, Image, int], bool]) -> Plan:
        """The plan of a copy that has memory for everything at once.

        Args:
            may_be_late: of the tensor that lies there, the how-manieth of an image.
        """
        plan = cls(starts=starts(images))
        for image, start in zip(images, plan.starts, strict=False):
            plan.texts += [(start + offset, text) for offset, text in image.texts]
            for nth, (tensor, offset) in enumerate(zip(image.tensors, image.offsets, strict=True)):
                size = tensor.nbytes
                if 0 < size < SMALL_BYTES and tensor.is_cpu and _lies_as_it_reads(tensor):
                    plan.small.append(tensor)
                    plan.small_offsets.append(start + offset)
                elif size:
                    plan._place(start + offset, tensor, image, nth, may_be_late)
        plan.witnesses.look()
        return plan

    @classmethod
    def in_order(cls, images: Sequence[Image]) -> Plan:
        """The plan of a copy that has memory for a part of it at a time: everything in pieces."""
        plan = cls(starts=starts(images))
        for image, start in zip(images, plan.starts, strict=False):
            plan.now += [Piece(start + offset, len(text), _Text(text)) for offset, text in image.texts if text]
            for tensor, offset in zip(image.tensors, image.offsets, strict=True):
                if tensor.nbytes:
                    plan.now.append(Piece(start + offset, tensor.nbytes, _Contiguous(tensor)))
        return plan

    def name(self, nth: int) -> Name:
        """What that one of the witnessed is called."""
        return _name(*self._witnessed[nth])

    def scatter(self, arena: Tensor) -> None:
        """Texts and small tensors are in ``arena``, and what in host memory is not contiguous."""
        base = arena.data_ptr()
        for offset, text in self.texts:
            move(base + offset, text, len(text))
        for tensor, offset in zip(self.small, self.small_offsets, strict=True):
            move(base + offset, tensor.data_ptr(), tensor.nbytes)
        odd = [(view(arena, offset, tensor), tensor) for offset, tensor in self.odd if tensor.device.type == "cpu"]
        if odd:
            torch._foreach_copy_([target for target, _ in odd], [tensor for _, tensor in odd])

    def _place(
        self, offset: int, tensor: Tensor, image: Image, nth: int, may_be_late: Callable[[Place, Image, int], bool]
    ) -> None:
        is_late = False
        if (is_flat := _lies_as_it_reads(tensor)) and image.keys and not tensor.is_inference():
            place = (tensor.data_ptr(), tensor.nbytes)
            is_late = tensor.nbytes >= SMALL_BYTES and may_be_late(place, image, nth)
        if is_late:
            self._witnessed.append((image, nth))
            self.witnesses.add(tensor, offset)
        if is_flat and tensor.is_cpu:
            source = partial(_live_address, tensor, tensor.shape, image, nth) if is_late else tensor.data_ptr
            (self.late if is_late else self.now).append(Piece(offset, tensor.nbytes, source))
        else:
            (self.late_odd if is_late else self.odd).append((offset, tensor))


def starts(images: Sequence[Image]) -> list[int]:
    """Where each image begins in the arena, on a page of its own; and last, where the next one would."""
    found = [0]
    for image in images:
        end = found[-1] + image.size_bytes
        found.append(-(-end // _PAGE_BYTES) * _PAGE_BYTES)
    return found


def _lies_as_it_reads(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def view(arena: Tensor, offset: int, tensor: Tensor) -> Tensor:
    """The place of ``tensor`` in the arena."""
    place = arena[offset : offset + tensor.nbytes]
    return place.view(tensor.dtype).view(tensor.shape)


class _Text:
    def __init__(self, text: bytes) -> None:
        self._text = text

    def __call__(self) -> int:
        return ctypes.cast(ctypes.c_char_p(self._text), ctypes.c_void_p).value or 0


def _live_address(tensor: Tensor, shape: torch.Size, image: Image, nth: int) -> int:
    """Where a tensor lies, while training may give it other memory."""
    if tensor.shape != shape or not is_there(tensor):
        raise DistckptError(
            f"{_name(image, nth)} was given other memory while it was being copied: wait_staged() is to be called "
            "before"
        )
    return tensor.data_ptr()


def _name(image: Image, nth: int) -> Name:
    return Name(image.path, image.keys[nth])


class _Contiguous:
    """A tensor that is brought into contiguous host memory when its first piece is copied."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._changing = threading.Lock()

    def __call__(self) -> int:
        with self._changing:
            self._tensor = self._tensor.cpu().contiguous().resolve_conj().resolve_neg()
            return self._tensor.data_ptr()

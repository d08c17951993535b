"""What is copied where, how and when: the tensors of a save sorted for the copy into the arena."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distckpt.engine.copying import SMALL_BYTES, Piece, cut, move
from distckpt.engine.guard import Place
from distckpt.engine.witness import Witness, is_there
from distckpt.errors import DistckptError
from distckpt.formats import Image
from distckpt.manifest import TensorEntry

_PAGE_BYTES = 4096


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
    small: list[tuple[int, Tensor]] = field(default_factory=list)
    odd: list[tuple[int, Tensor]] = field(default_factory=list)
    now: list[Piece] = field(default_factory=list)
    late: list[Piece] = field(default_factory=list)
    late_odd: list[tuple[int, Tensor]] = field(default_factory=list)
    witnesses: list[Witness] = field(default_factory=list)

    @classmethod
    def of(cls, images: Sequence[Image], *, may_be_late: Callable[[TensorEntry, Place], bool]) -> Plan:
        """The plan of a copy that has memory for everything at once."""
        plan = cls(starts=starts(images))
        for image, start in zip(images, plan.starts, strict=False):
            plan.texts += [(start + offset, text) for offset, text in image.texts]
            for nth, (offset, tensor) in enumerate(image.tensors):
                plan._place(start + offset, tensor, image, nth, may_be_late)
        return plan

    @classmethod
    def in_order(cls, images: Sequence[Image]) -> Plan:
        """The plan of a copy that has memory for a part of it at a time: everything in pieces, from the first to the
        last."""
        plan = cls(starts=starts(images))
        for image, start in zip(images, plan.starts, strict=False):
            for offset, text in image.texts:
                plan.now += cut(start + offset, len(text), _Text(text))
            for offset, tensor in image.tensors:
                if tensor.numel():
                    plan.now += cut(start + offset, tensor.nbytes, _Contiguous(tensor))
        plan.now.sort(key=lambda piece: piece.offset)
        return plan

    def scatter(self, arena: Tensor) -> None:
        """Texts and small tensors are in ``arena``, and what in host memory is not contiguous."""
        base = arena.data_ptr()
        for offset, text in self.texts:
            move(base + offset, text, len(text))
        for offset, tensor in self.small:
            move(base + offset, tensor.data_ptr(), tensor.nbytes)
        odd = [(view(arena, offset, tensor), tensor) for offset, tensor in self.odd if tensor.device.type == "cpu"]
        if odd:
            torch._foreach_copy_([target for target, _ in odd], [tensor for _, tensor in odd])

    def _place(
        self, offset: int, tensor: Tensor, image: Image, nth: int, may_be_late: Callable[[TensorEntry, Place], bool]
    ) -> None:
        count = tensor.nbytes
        is_contiguous = tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
        is_plain = is_contiguous and tensor.is_cpu
        if count < SMALL_BYTES and (is_plain or not count):
            if count:
                self.small.append((offset, tensor))
            return
        is_late = False
        if is_contiguous and count >= SMALL_BYTES and nth < len(image.entries) and not tensor.is_inference():
            address, entry = tensor.data_ptr(), image.entries[nth]
            if is_late := may_be_late(entry, (address, count)):
                self.witnesses.append(Witness.of(entry, offset, tensor, address, count))
        if is_plain and is_late:
            self.late += cut(offset, count, _Live(tensor, image.entries[nth]))
        elif is_plain:
            self.now += cut(offset, count, tensor.data_ptr)
        else:
            (self.late_odd if is_late else self.odd).append((offset, tensor))


def starts(images: Sequence[Image]) -> list[int]:
    """Where each image begins in the arena, on a page of its own; and last, where the next one would."""
    found = [0]
    for image in images:
        end = found[-1] + image.size_bytes
        found.append(-(-end // _PAGE_BYTES) * _PAGE_BYTES)
    return found


def view(arena: Tensor, offset: int, tensor: Tensor) -> Tensor:
    """The place of ``tensor`` in the arena."""
    place = arena[offset : offset + tensor.nbytes]
    return place.view(tensor.dtype).view(tensor.shape)


class _Text:
    def __init__(self, text: bytes) -> None:
        self._text = text

    def __call__(self) -> int:
        return ctypes.cast(ctypes.c_char_p(self._text), ctypes.c_void_p).value or 0


class _Live:
    """Where a tensor lies, while training may give it other memory."""

    def __init__(self, tensor: Tensor, entry: TensorEntry) -> None:
        self._tensor = tensor
        self._shape = tensor.shape
        self._entry = entry

    def __call__(self) -> int:
        if self._tensor.shape != self._shape or not is_there(self._tensor):
            raise DistckptError(
                f"{self._entry.key} of {self._entry.file} was given other memory while it was being copied: "
                "wait_staged() is to be called before"
            )
        return self._tensor.data_ptr()


class _Contiguous:
    """A tensor that is brought into contiguous host memory when its first piece is copied."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._changing = threading.Lock()

    def __call__(self) -> int:
        with self._changing:
            self._tensor = self._tensor.cpu().contiguous().resolve_conj().resolve_neg()
            return self._tensor.data_ptr()

"""The contract of a format: how the state of all ranks becomes the files of one checkpoint, and back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from distckpt.manifest import FileEntry, Manifest, TensorGroup
from distckpt.stores import Store

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """One rank's state, by part.

    The value of a part is a tree of dicts, lists, tuples, tensors and plain values, as ``state_dict`` returns it.

    Attributes:
        shared: items of the job, equal on every rank. A rank that need not write them may leave them out.
        own: items of this rank alone: its RNG, its data loader.
    """

    shared: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sum:
    """A CRC-32 (of zip files) that a file holds of its own bytes from ``begin`` to ``end``: four bytes, the lowest
    first, at each of ``places``, all of which lie behind ``end``."""

    begin: int
    end: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class Image:
    """One file of a checkpoint: what will stand where, before the bytes of its tensors are there.

    Texts and tensors fill the file without holes and overlaps, in any order.

    Attributes:
        path: its path in the checkpoint's folder; ``""`` where the checkpoint is this one file.
        texts: bytes that are known already, by their offset.
        tensors: whose elements stand there contiguous and in this machine's byte order. They are the live ones that
            training goes on with: nothing was copied.
        offsets: where each of them begins.
        keys: what each is called; there are none where nobody could tell them apart, which is how none of them is
            copied beside training.
        groups: what the manifest says of them; ``None`` where that is what the ranks agreed on, see `Planner`.
        gone: some of what the ranks agreed that this one has of the job's state, and it has no more.
        sums: what is filled in as the bytes pass by on their way to the store.
        digests: the file beside it that is to hold the digests of its blocks, so that parts of it can be checked.
    """

    path: str
    size_bytes: int
    texts: Sequence[tuple[int, bytes]]
    tensors: Sequence[Tensor] = ()
    offsets: Sequence[int] = ()
    keys: Sequence[str] = ()
    groups: tuple[TensorGroup, ...] | None = ()
    gone: Sequence[str] = ()
    sums: Sequence[Sum] = ()
    digests: str = ""


@dataclass(frozen=True)
class Written:
    """What one rank wrote: its files, and the tensors in them.

    Attributes:
        tensors: ``None`` where they are those that the ranks agreed on, see `Planner`.
        gone: of all images, see `Image`.
        measures: ``stage_seconds`` of the training thread, ``waited_seconds`` of optimizers; of the writer's threads
            ``fill_seconds``, in which one waited for the copy, ``hash_seconds``, and beside these ``write_seconds``,
            ``fsync_seconds``; ``arena_bytes``; ``retakes``, of what somebody changed too early.
    """

    files: tuple[FileEntry, ...] = ()
    tensors: tuple[TensorGroup, ...] | None = ()
    gone: tuple[str, ...] = ()
    measures: Mapping[str, float] = field(default_factory=dict)


def joined(written: Sequence[Written]) -> tuple[TensorGroup, ...]:
    """The tensors of all ranks."""
    return tuple(group for one in written for group in one.tensors or ())


class Staged(Protocol):
    """One rank's files of a checkpoint, cut at one step, on their way to a store."""

    def stage(self) -> None:
        """Training may go on. What it may change before the optimizer's next step was copied; the rest is copied
        beside it, and the optimizer waits for that. On the training thread, once. What goes wrong, `write` raises."""
        ...

    def settle(self) -> None:
        """All of it was copied, or is given up. On the training thread."""
        ...

    def write(self, store: Store, path: str) -> Written:
        """The files are written, and their bytes durable, below the folder ``path``, or as the file ``path``.

        Raises:
            what went wrong while it was staged, or ``OSError``. What was written is no part of a checkpoint then.
        """
        ...

    def release(self) -> None:
        """Nothing of it is needed any more: its memory may be used for the next. Safe to call twice."""
        ...


class Chunk(NamedTuple):
    """A box of a tensor.

    Attributes:
        standing: what stands for the tensor, in the snapshot of what was opened.
        offsets, sizes: of the box in it.
    """

    standing: Tensor
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class Piece(NamedTuple):
    """Some elements of a chunk, one after another.

    Attributes:
        begin: how many elements of the chunk come before these.
        elements: in one dimension, on the host. Whoever asks for the next piece gets it in the same memory.
    """

    chunk: Chunk
    begin: int
    elements: Tensor


class Opened(Protocol):
    """A checkpoint whose indexes one rank has read and checked, and whose tensors it has not read yet.

    Attributes:
        snapshot: its state; each tensor that is still to be read is one of its shape and dtype on the meta device.
    """

    snapshot: Snapshot

    def fill(self, targets: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Each second tensor, of the same shape and dtype and on any device, holds what the first, of `snapshot`,
        stands for; one that is spread over ranks, what this rank has of that. What was read for it was read once, and
        checked against the manifest.

        Raises:
            DamagedCheckpoint: naming the file whose bytes are not those that were committed; some targets may hold
                them.
            OSError: where it cannot be read; some targets may have changed.
        """
        ...

    def pieces(self, standing: Sequence[Tensor]) -> Iterator[Piece]:
        """All elements of what each of these, of `snapshot`, stands for, in the order of the files. It takes a few MiB
        of memory, whatever there is. Each byte is read once; it is checked by the time that the last piece was asked
        for, and not sooner.

        Raises:
            DamagedCheckpoint, OSError: as `fill`, while they are asked for.
        """
        ...


class Planner(Protocol):
    """How ranks come to know who writes what, before they write alone. Of what each of these returns all is told that
    `distckpt.planning` says; none of them waits for anybody.

    Attributes:
        is_due: whether they have to: nothing was agreed on yet, or it is not what some rank wrote by. The same on all.
    """

    is_due: bool

    def look(self, snapshot: Snapshot, rank: int) -> str:
        """What this rank knows of the job's state, as a digest."""
        ...

    def tell(self, *, is_first: bool) -> Any:
        """What this rank holds of it, as JSON. Of those that know the same, the first one tells what that is."""
        ...

    def plan(self, told: Sequence[Any]) -> Any:
        """Who writes what, as JSON, from what all ranks told. On the leader.

        Raises:
            ValueError: naming a tensor that the ranks do not hold whole, or not alike.
        """
        ...

    def take(self, rank: int, answer: Any) -> None:
        """From now on this rank writes by that plan."""
        ...


class Format(Protocol):
    """How a checkpoint lies on a store. A rank writes and reads alone: there is no peer here to hang on.

    Attributes:
        name: the word in records and manifests.
        is_folder: whether a checkpoint is a folder with a manifest in it, or one file.
        read_with: plain Python that opens the files without distckpt.
    """

    name: str
    is_folder: bool
    read_with: str

    @property
    def planner(self) -> Planner | None:
        """What the ranks agree through; ``None`` where they need not, as the leader writes all that is the job's."""
        ...

    def lay_out(self, snapshot: Snapshot, rank: int) -> list[Image]:
        """This rank's files for that state. Costs no copy of a tensor; what is no tensor is copied.

        Raises:
            TypeError: naming the place of a value that cannot be stored: no plain value, or a tensor that is sharded,
                sparse or without data.
        """
        ...

    def tensors_of(self, written: Sequence[Written]) -> tuple[TensorGroup, ...]:
        """What the manifest says of all tensors, from what each rank wrote. On the leader.

        Raises:
            ValueError: naming a tensor that was not written whole, or what else of the job's state nobody wrote.
        """
        ...

    def open(self, store: Store, path: str, manifest: Manifest, rank: int, parts: Collection[str] | None) -> Opened:
        """This rank's state in the checkpoint at ``path``; of ``shared``, and of ``own``, only ``parts`` if given.

        Raises:
            DamagedCheckpoint: naming the file whose bytes are not those that were committed.
        """
        ...

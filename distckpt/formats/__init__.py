"""The contract of a format: how the state of all ranks becomes the files of one checkpoint, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from distckpt.manifest import FileEntry, Manifest, TensorEntry
from distckpt.stores import Store


@dataclass(frozen=True)
class Snapshot:
    """One rank's state in host memory, cut at one step, by part.

    The value of a part is a tree of dicts, lists, tuples, tensors and plain values, as ``state_dict`` returns it.

    Attributes:
        shared: items of the job, equal on every rank. A rank that need not write them may leave them out.
        own: items of this rank alone: its RNG, its data loader.
    """

    shared: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """What one rank wrote: its files, and the tensors in them."""

    files: tuple[FileEntry, ...] = ()
    tensors: tuple[TensorEntry, ...] = ()


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

    def write(self, snapshot: Snapshot, store: Store, path: str, rank: int) -> Written:
        """This rank's files are written and their bytes durable. ``path`` is the folder, or the draft of the file."""
        ...

    def read(self, store: Store, path: str, manifest: Manifest, rank: int, parts: Collection[str] | None) -> Snapshot:
        """This rank's state from the checkpoint at ``path``; of ``shared``, and of ``own``, only ``parts`` if given.

        Every byte that is used was checked against the manifest.

        Raises:
            DamagedCheckpoint: naming the file whose bytes are not those that were committed.
        """
        ...

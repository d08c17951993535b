"""Tensors in a folder that another library wrote, on their way into parts of this program's state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from distckpt.formats import Snapshot
from distckpt.formats.dcp_chunks import Chunked
from distckpt.formats.dcp_metadata import Place
from distckpt.formats.shard_file import Wanted
from distckpt.formats.shards import boxes_of, narrowed, view_of
from distckpt.formats.stand_ins import stand_in


class Folder(Protocol):
    """A folder whose indexes were read.

    Attributes:
        url: where it is.
        tensors: what its tensors are called.
        values: what all else in it is called.
    """

    url: str

    @property
    def tensors(self) -> Collection[str]: ...

    @property
    def values(self) -> Collection[str]: ...

    def tensor(self, name: str) -> Chunked:
        """Where that tensor lies, of which all parts are there, and lie in files that can hold them.

        Raises:
            DamagedCheckpoint: naming the file, where that is not so.
            OSError: where it cannot be read.
        """
        ...

    def value(self, name: str) -> Any:
        """What is no tensor.

        Raises:
            ValueError: where only unpickling could read it.
            DamagedCheckpoint, OSError: as `tensor`.
        """
        ...

    def fill(self, file: str, wanted: Mapping[Place, Sequence[Wanted]]) -> None:
        """The targets hold what is wanted of each place in that file.

        Raises:
            DamagedCheckpoint, OSError: as `tensor`; some targets may have changed.
        """
        ...


class OpenedFolder:
    """See `distckpt.formats.Opened`. Each rank reads for itself, and only what it needs: of a ``.distcp`` file whole
    parts of tensors, as they were saved, as only these have checksums; of a safetensors file rows.

    Attributes:
        unread: the values that only unpickling could read, and why each is not in the snapshot.

    Args:
        names: by part and key, what each is called in the folder. Two keys of one name are one tensor.

    Raises:
        DamagedCheckpoint, OSError: as `Folder.tensor`.
    """

    def __init__(self, folder: Folder, names: Mapping[str, Mapping[str, str]]) -> None:
        self._folder = folder
        self._standing: dict[str, Tensor] = {}
        self._lying: dict[int, Chunked] = {}
        self.unread: dict[str, str] = {}
        self.snapshot = Snapshot({part: self._part(keys) for part, keys in names.items()})

    def fill(self, targets: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See `distckpt.formats.Opened.fill`. There is no manifest that it could be checked against: it is checked
        against the checksums in ``.distcp`` files; in safetensors files there are none."""
        wanted: defaultdict[str, defaultdict[Place, list[Wanted]]] = defaultdict(lambda: defaultdict(list))
        for standing, target in targets:
            lying = self._lying.get(id(standing))
            if lying is None or target.dtype is not lying.dtype or tuple(target.shape) != lying.shape:
                raise ValueError(f"a {target.dtype} of {tuple(target.shape)} is no place for any tensor there")
            for box in boxes_of(target):
                view = view_of(target, box)
                for piece in lying.pieces_in(box.offsets, box.sizes):
                    one = Wanted(piece.sizes, piece.low, narrowed(view, piece.begins, piece.shared))
                    wanted[piece.place.file][piece.place].append(one)
        for file in sorted(wanted):
            self._folder.fill(file, wanted[file])

    def _part(self, names: Mapping[str, str]) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for key, name in names.items():
            if name in self._folder.tensors:
                state[key] = self._stand_in(name)
            else:
                try:
                    state[key] = self._folder.value(name)
                except ValueError as error:
                    self.unread[name] = str(error)
        return state

    def _stand_in(self, name: str) -> Tensor:
        if name not in self._standing:
            lying = self._folder.tensor(name)
            self._standing[name] = standing = stand_in(lying.shape, lying.dtype)
            self._lying[id(standing)] = lying
        return self._standing[name]

"""Checkpoints turned into files for others to use: ``.pth``, safetensors, Hugging Face, DCP."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch

from distckpt import layout
from distckpt.candidates import Candidate, Source, candidates_of, damage_in
from distckpt.errors import DamagedCheckpoint, NoCheckpoint
from distckpt.formats import Image, Opened, Piece
from distckpt.formats.export_dcp import DcpExport
from distckpt.formats.export_hf import HuggingFaceExport
from distckpt.formats.export_pth import PthExport
from distckpt.formats.export_safetensors import SafetensorsExport
from distckpt.formats.known import get_format
from distckpt.formats.placeholders import Placeholders, flat, without_tensors
from distckpt.formats.streaming import whole
from distckpt.placing import place
from distckpt.ranks import LEADER
from distckpt.retention import parse_bytes
from distckpt.stores.appearing import appearing, refuse_taken
from distckpt.stores.local import LocalStore
from distckpt.words import check_choice, check_flags

_log = logging.getLogger("distckpt")

_PICKLED = {".pth", ".pt", ".bin"}
_KINDS = ("pth", "safetensors", "hf", "dcp")
_MAX_SHARD_BYTES = "5GB"
_MODEL_IN_PTH = "state_dict"  # MMEngine's word


class Kind(Protocol):
    """What a checkpoint is exported to.

    Attributes:
        is_folder: whether that is a folder, or one file.
        takes_several: whether all parts can be exported at once.
        names_parts: whether the name of a part is in the keys of its tensors, also if it is the only one.
        leaves_out_values: whether only tensors are exported.
    """

    is_folder: bool
    takes_several: bool
    names_parts: bool
    leaves_out_values: bool

    def lay_out(self, state: Any) -> list[Image]:
        """The files for ``state``, a tree with placeholders.

        Raises:
            ValueError: naming what cannot be exported so.
        """
        ...

    def is_one(self, place: Path) -> bool:
        """Whether what is there looks like such an export, and like nothing else: then it may be replaced."""
        ...


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        checkpoint: the folder or file of the checkpoint.
        step: of which it is.
        target: where it was exported to.
        tensors: how many.
        total_bytes: of all files that were written.
        left_out: what is no tensor, and has no place in such an export; the keys.
    """

    checkpoint: str
    step: int
    target: str
    tensors: int
    total_bytes: int
    left_out: tuple[str, ...]


def export(
    checkpoint: Source,
    target: Source,
    *,
    to: str | None = None,
    part: str | None = "model",
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int | str | None = None,
    config_from: Source | None = None,
) -> Exported:
    """``target`` is what others read, made from a checkpoint, of which every byte that was read was checked. It appears
    whole and durable, or not at all; what exports that were killed have left in its folder is removed.

    It needs a few MiB of memory, and neither a model nor a process group.
    Values are exact to the last bit, but for ``dtype``.

    Args:
        checkpoint: a checkpoint (``runs/gpt/step-00012000``, ``runs/gpt/latest``, a copy of one, a ``.pth``), or the
            directory of a run: then the newest that verifies.
        to: ``"pth"``: one file, for ``torch.load(weights_only=True)``, with what is no tensor, too;
            ``"safetensors"``: one file, for ``safetensors.torch.load_file``;
            ``"hf"``: a folder, for ``from_pretrained`` of Hugging Face;
            ``"dcp"``: a folder, for ``torch.distributed.checkpoint.load({part: state}, checkpoint_id=target)``.
            None: ``"pth"`` where ``target`` ends in ``.pth``, ``.pt`` or ``.bin``, else ``"safetensors"``.
        part: which part of the state; ``None``: all of them, for ``"pth"`` and ``"dcp"``.
        dtype: what floating tensors become: ``"bfloat16"``.
        overwrite: whether an export that is there already is replaced. A folder that is anything else never is.
        max_shard_bytes: for ``"hf"``: how large one file becomes, ``"5GB"`` if nothing is said.
        config_from: for ``"hf"``: a folder the config and tokenizer of which are copied; a ``dtype`` is noted in it.
            None: the folder ``pretrained`` in the run's directory, if it is there.

    Raises:
        NoCheckpoint: where there is none, or none that verifies.
        DamagedCheckpoint: naming the file, where that checkpoint is not what was committed.
        NewerVersion: where a newer distckpt wrote it.
        FileExistsError: where ``target`` is there and is not to be replaced.
        ValueError, TypeError: for words that make no sense: a part that is not there, among others.
        OSError: where it cannot be written, as when the disk is full. What was written is gone then.
    """
    if to is None:
        to = "pth" if Path(target).suffix in _PICKLED else "safetensors"
    check_choice("to", to, _KINDS)
    check_flags(overwrite=overwrite)
    cast = _dtype_of(dtype)
    if to == "hf" and part == "model" and config_from is None:
        config_from = _pretrained_of(checkpoint)
    kind = _kind(to, cast, max_shard_bytes, config_from)
    if part is None and not kind.takes_several:
        raise ValueError(f"part=None, which is all parts, is for to='pth' and to='dcp'; to={to!r} takes one")
    place = Path(target).absolute()
    may_replace = kind.is_one if overwrite else None
    _refuse_in_checkpoint(place)
    refuse_taken(place, may_replace)
    candidates, is_choice = candidates_of(checkpoint)
    skipped: list[str] = []
    for one in candidates:
        try:
            return _Export(one, kind, part, cast).write(place, may_replace)
        except DamagedCheckpoint as error:
            if not is_choice:
                raise
            skipped.append(one.name)
            _log.warning("%s is damaged and passed over; it is left for inspection. %s", one.name, error)
    raise NoCheckpoint(f"{checkpoint}: none of the committed checkpoints can be read ({', '.join(skipped)})")


def _pretrained_of(checkpoint: Source) -> Path | None:
    """Where config and tokenizer are, in the directory of the run that ``checkpoint`` is, or is of."""
    path = Path(checkpoint).resolve()
    places = (path / layout.PRETRAINED, path.parent / layout.PRETRAINED)
    return next((place for place in places if (place / "config.json").is_file()), None)


class _Export:
    """One checkpoint, on its way to one target."""

    def __init__(self, one: Candidate, kind: Kind, part: str | None, dtype: torch.dtype | None) -> None:
        self._one = one
        self._kind = kind
        self._placeholders = Placeholders(dtype)
        with damage_in(one.name):
            self._manifest = one.manifest()
            self._opened, found = self._open(part)
        parts = {name: self._placeholders.replaced(state) for name, state in found.items()}
        self._state = parts if part is None or kind.names_parts else parts[next(iter(parts))]

    def write(self, target: Path, may_replace: Callable[[Path], bool] | None) -> Exported:
        """See `export`."""
        images = self._kind.lay_out(self._state)
        total_bytes = sum(image.size_bytes for image in images)
        with appearing(target, may_replace) as draft:
            _refuse_full(target, total_bytes)
            if self._kind.is_folder:
                draft.mkdir()
            with closing(self._pieces(images)) as pieces:
                place(draft, images, pieces, self._placeholders.standing)
        left_out = tuple(without_tensors(self._state)) if self._kind.leaves_out_values else ()
        if left_out:
            _log.info("%s: no tensors, and so not exported: %s", target, ", ".join(left_out)[:400])
        count = sum(1 for _ in flat(self._state))
        return Exported(str(self._one.place), self._manifest.progress.step, str(target), count, total_bytes, left_out)

    def _open(self, part: str | None) -> tuple[Opened, Mapping[str, Any]]:
        """The checkpoint, and its parts that are meant. No other part of it needs to be whole."""
        one, manifest = self._one, self._manifest
        wanted = None if part is None else {part}
        if part == "model" and manifest.format == "pth":
            wanted = {part, _MODEL_IN_PTH}
        opened = self._open_parts(wanted)
        found = opened.snapshot.shared
        if part is not None and part in found:
            found = {part: found[part]}
        if not found:
            known = ", ".join(self._open_parts(None).snapshot.shared) or "none"
            raise ValueError(f"{one.place} has no part {part!r}; its parts are {known}")
        return opened, found

    def _open_parts(self, parts: Collection[str] | None) -> Opened:
        one, manifest = self._one, self._manifest
        return get_format(manifest.format).open(one.store, one.name, manifest, LEADER, parts)

    def _pieces(self, images: list[Image]) -> Generator[Piece]:
        """All that is to be written."""
        wanted = {id(tensor): tensor for image in images for tensor in image.tensors}
        standing = {id(one): one for one in map(self._placeholders.standing.__getitem__, wanted)}
        arrays = [one for one in self._placeholders.arrays if id(one) in standing]
        with damage_in(self._one.name):
            if arrays:
                self._opened.fill([])  # which fills them
            others = [one for key, one in standing.items() if key not in set(map(id, arrays))]
            yield from chain(self._opened.pieces(others), (whole(one, one) for one in arrays))


def _refuse_in_checkpoint(target: Path) -> None:
    """``target`` is no checkpoint, nor a file of one: to replace that would damage it."""
    for one in (target, target.parent):
        is_checkpoint = one.with_name(layout.record_of(one.name)).exists() if one.name else False
        if is_checkpoint or (one / layout.MANIFEST).exists():
            raise ValueError(f"{target}: {one} is a checkpoint, where nothing else belongs; export to another place")


def _refuse_full(target: Path, total_bytes: int) -> None:
    """Better told before than after hours."""
    free = LocalStore(target.parent).free_bytes()
    if free is not None and free < total_bytes:
        raise OSError(
            errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: it takes {total_bytes} bytes, {free} are free", str(target)
        )


def _kind(to: str, dtype: torch.dtype | None, max_shard_bytes: int | str | None, config_from: Source | None) -> Kind:
    if to == "hf":
        most_bytes = parse_bytes(_MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes, "max_shard_bytes")
        return HuggingFaceExport(most_bytes, None if config_from is None else Path(config_from), dtype)
    for word, value in (("max_shard_bytes", max_shard_bytes), ("config_from", config_from)):
        if value is not None:
            raise ValueError(f"{word} is for to='hf', not for to={to!r}")
    kinds: dict[str, Kind] = {"pth": PthExport(), "safetensors": SafetensorsExport(), "dcp": DcpExport()}
    return kinds[to]


def _dtype_of(told: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, told.removeprefix("torch."), None) if isinstance(told, str) else told
    if found is None and told is None:
        return None
    try:
        if isinstance(found, torch.dtype) and found.is_floating_point:
            torch.empty(1).to(found)  # not every dtype holds single numbers
            return found
    except RuntimeError:
        pass
    raise ValueError(f"dtype should be a floating one such as 'bfloat16', is {told!r}")

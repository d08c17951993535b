"""The files of one rank's part of a sharded checkpoint, before they are written."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlanner

from distckpt import layout, strict_json
from distckpt.chunks import Chunks
from distckpt.formats import Image, Snapshot
from distckpt.formats import tree as trees
from distckpt.formats.dcp_planner import planned
from distckpt.formats.form import Form
from distckpt.formats.held import Holding
from distckpt.formats.merging import Place, places_in
from distckpt.formats.safetensors_file import DTYPES
from distckpt.formats.safetensors_layout import lay_out
from distckpt.formats.sharded_plan import Part, parts_of
from distckpt.formats.shards import boxes_of, local_of, narrowed, spread_of, view_of
from distckpt.manifest import TensorGroup, digest
from distckpt.ranks import LEADER

_Likeness = tuple[Any, ...]

_MOST_TOLD = 8


@dataclass(frozen=True)
class Seen:
    """What a rank has of the state that is the job's.

    Attributes:
        tensors: by key; by each of its keys where it has several, so that any reader finds it.
        texts: of each part, the JSON of the rest.
        is_as_before: whether tensors are of the same kinds, and spread over ranks in the same way, as the last time.
        is_growing: whether an optimizer has no state yet, and will have some.
    """

    tensors: Mapping[str, Tensor]
    texts: Mapping[str, str]
    is_as_before: bool
    is_growing: bool


@dataclass(frozen=True)
class _Piece:
    """What is written of a tensor: a part of the how-manieth of its boxes here, and where that lies in the whole.

    Attributes:
        is_all: whether it is all that this rank has of it.
    """

    key: str
    nth: int
    begins: tuple[int, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    is_all: bool

    def view(self, tensor: Tensor) -> Tensor:
        """Its elements, in the memory of ``tensor``."""
        return narrowed(view_of(tensor, boxes_of(tensor)[self.nth]), self.begins, self.sizes)


@dataclass(frozen=True)
class _File:
    """A file of tensors as it was in the save before: the image without them, and what they are."""

    image: Image
    own: Sequence[str]
    pieces: Sequence[_Piece]
    places: Sequence[int]  # where each tensor of the image stands among its own and the pieces

    def filled(self, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Image:
        found = [own[key] for key in self.own]
        for piece in self.pieces:
            tensor = tensors[piece.key]
            found.append(local_of(tensor) if piece.is_all else piece.view(tensor))
        return replace(self.image, tensors=[found[nth] for nth in self.places])


class ShardedLayouts:
    """Lays out what one rank writes, and remembers how.

    Args:
        planner: what makes of the tensors what is saved of them; ``None``: that is what they are.

    Attributes:
        holding: what this rank held when it last looked.
        schema: what it knew of the job's tensors then, as a digest.
        outline: that, and which keys there are in the state.
        is_first: whether no rank before this one knew the same.
    """

    def __init__(self, planner: SavePlanner | None = None) -> None:
        self._planner = planner
        self._forms: dict[str, tuple[Form, Sequence[tuple[str, int]]]] = {}
        self._parts: Sequence[str] = ()
        self.holding = Holding((), ())
        self._planned: Mapping[tuple[str, int], Part] = {}
        self._known: Mapping[str, _Likeness] | None = None
        self._files: Sequence[_File] | None = None
        self._are_planned = False
        self._own_kinds: Mapping[str, _Likeness] = {}
        self._places: frozenset[Place] = frozenset()
        self._places_agreed: frozenset[Place] = frozenset()
        self._is_as_agreed = False
        self.schema = self.outline = ""
        self.is_first = True

    def see(self, snapshot: Snapshot, rank: int) -> Seen:
        """The job's state, taken apart. Costs no copy of a tensor.

        Raises:
            TypeError: naming the place of a value that cannot be stored.
        """
        seen = self._see(snapshot)
        if self._planner is not None:
            seen = _planned(self._planner, seen, is_leader=rank == LEADER)
        if not seen.is_as_before:
            self._files = None
            self._places = frozenset(places_in(snapshot.shared))
        return seen

    def _see(self, snapshot: Snapshot) -> Seen:
        tensors: dict[str, Tensor] = {}
        texts: dict[str, str] = {}
        is_as_before = self._parts == (parts := tuple(snapshot.shared))
        for part, state in snapshot.shared.items():
            if (matched := self._match(part, state)) is None:
                matched = self._take_apart(part, state)
                is_as_before = False
            tensors |= matched[0]
            texts[part] = matched[1]
        self._parts = parts
        return Seen(tensors, texts, is_as_before, any(map(_is_growing, snapshot.shared.values())))

    def look(self, seen: Seen) -> None:
        """What this rank holds is known."""
        self.holding = Holding.of(seen.tensors)
        self.schema = digest(self.holding.schema())
        self.outline = digest(strict_json.dump([self.schema, sorted(map(repr, self._places))]))

    def plan(self, rank: int, answer: Mapping[str, Any], seen: Seen) -> None:
        """What this rank writes of what it held when it looked is known."""
        kinds = self.holding.kinds
        parts = parts_of(self.holding, rank, answer, self.schema)
        self._planned = {(kinds[part.nth].key, kinds[part.nth].nth): part for part in parts}
        self._known = {key: _likeness(tensor) for key, tensor in seen.tensors.items()}
        self._places_agreed = self._places
        self._files = None

    def lay_out(self, snapshot: Snapshot, rank: int) -> list[Image]:
        """See `distckpt.formats.Format.lay_out`. A rank whose tensors have become others since the plan was made
        writes all that it has, and tells: nobody knows whether others still hold, and so write, what it shares with
        them. One that has other keys of what is no tensor writes that, and tells, too."""
        seen = self.see(snapshot, rank)
        own, told = _own(snapshot.own, rank)
        own_kinds = {key: _likeness(tensor) for key, tensor in own.items()}
        if self._files is None or own_kinds != self._own_kinds:
            self._are_planned = self._known == {key: _likeness(tensor) for key, tensor in seen.tensors.items()}
            self._is_as_agreed = self._are_planned and self._places == self._places_agreed
            self._files, self._own_kinds = self._make_files(seen, own, rank), own_kinds
        images = [file.filled(own, seen.tensors) for file in self._files]
        images.append(self._text(layout.rank_file(rank), strict_json.dump(told).decode()))
        if rank == LEADER:
            images.append(self._text(layout.STATE, _joined(seen.texts)))
        elif seen.texts and (self.is_first or not self._is_as_agreed):
            images.append(self._text(layout.rank_state(rank), _joined(seen.texts)))
        if gone := self._places_agreed - self._places:
            images[-1] = replace(images[-1], gone=sorted(".".join(map(str, place)) for place in gone)[:_MOST_TOLD])
        return images

    def _text(self, path: str, text: str) -> Image:
        data = text.encode("ascii")
        return Image(path, len(data), texts=((0, data),), groups=None if self._is_as_agreed else ())

    def _match(self, part: str, state: Any) -> tuple[dict[str, Tensor], str] | None:
        if part not in self._forms:
            return None
        form, keys = self._forms[part]
        if (matched := form.match(state)) is None:
            return None
        tensors, text = matched
        return {key: tensors[nth] for key, nth in keys}, text

    def _take_apart(self, part: str, state: Any) -> tuple[dict[str, Tensor], str]:
        value, found, tied = trees.encode(state, part, may_be_spread=True)
        keys = {key: key for key in found} | tied
        self._forms.pop(part, None)
        if (form := Form.of(state, found, part, may_be_spread=True)) is not None:
            self._forms[part] = form, [(f"{part}.{key}", form.keys[other]) for key, other in keys.items()]
        return {f"{part}.{key}": found[other] for key, other in keys.items()}, strict_json.dump(value).decode()

    def _make_files(self, seen: Seen, own: Mapping[str, Tensor], rank: int) -> list[_File]:
        pieces: defaultdict[int, list[_Piece]] = defaultdict(list)
        if own:
            pieces[0] = []
        for key, tensor in seen.tensors.items():
            for piece in self._pieces(key, tensor):
                pieces[piece.nth].append(piece)
        return [
            self._make_file(layout.shard_file(rank, nth), of, {} if nth else own, seen)
            for nth, of in sorted(pieces.items())
        ]

    def _pieces(self, key: str, tensor: Tensor) -> list[_Piece]:
        boxes = boxes_of(tensor)
        is_one = len(boxes) == 1
        if not self._are_planned:
            nowhere = (0,) * tensor.ndim
            return [_Piece(key, nth, nowhere, box.sizes, box.offsets, is_one) for nth, box in enumerate(boxes)]
        planned = [(nth, box, self._planned.get((key, nth))) for nth, box in enumerate(boxes)]
        return [
            _Piece(
                key, nth, part.begins, part.sizes, _sum(box.offsets, part.begins), is_one and part.sizes == box.sizes
            )
            for nth, box, part in planned
            if part is not None
        ]

    def _make_file(self, path: str, pieces: Sequence[_Piece], own: Mapping[str, Tensor], seen: Seen) -> _File:
        tensors = dict(own) | {piece.key: piece.view(seen.tensors[piece.key]) for piece in pieces}
        offsets = {key: (0,) * tensor.ndim for key, tensor in own.items()} | {one.key: one.offsets for one in pieces}
        image = replace(
            lay_out(path, tensors, _sharding_info(offsets)),
            digests=layout.digests_file(path),
            groups=None if self._is_as_agreed else _groups(path, pieces, seen),
        )
        places = {key: nth for nth, key in enumerate(tensors)}
        return _File(replace(image, tensors=()), [*own], pieces, [places[key] for key in image.keys])


def _planned(planner: SavePlanner, seen: Seen, *, is_leader: bool) -> Seen:
    """What ``planner`` makes of it: nobody knows whether that is as before."""
    tensors = planned(planner, seen.tensors, is_leader=is_leader)
    texts = dict(seen.texts)
    for part, text in seen.texts.items():
        prefix = f"{part}."
        if left := {key.removeprefix(prefix) for key in seen.tensors.keys() - tensors.keys() if key.startswith(prefix)}:
            texts[part] = strict_json.dump(trees.without(json.loads(text), left, part)).decode()
    return replace(seen, tensors=tensors, texts=texts, is_as_before=False)


def _is_growing(state: Any) -> bool:
    """Whether it is of an optimizer that took no step yet."""
    if not isinstance(state, dict) or state.get("state") != {}:
        return False
    groups = state.get("param_groups")  # by name, where they are known by the names of their parameters
    found = [*groups.values()] if isinstance(groups, dict) else groups
    return isinstance(found, list) and any(isinstance(one, dict) and one.get("params") for one in found)


def _likeness(tensor: Tensor) -> _Likeness:
    """What it has in common with others that are written alike."""
    return tensor.dtype, tuple(tensor.shape), spread_of(tensor)


def _sum(offsets: tuple[int, ...], begins: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(sum, zip(offsets, begins, strict=True)))


def _groups(path: str, pieces: Sequence[_Piece], seen: Seen) -> tuple[TensorGroup, ...]:
    alike: defaultdict[tuple[str, tuple[int, ...], Chunks], list[str]] = defaultdict(list)
    for one in pieces:
        tensor = seen.tensors[one.key]
        chunks = Chunks((path,), one.offsets, one.sizes)
        alike[DTYPES[tensor.dtype], tuple(tensor.shape), chunks].append(one.key)
    return tuple(TensorGroup.of(dtype, shape, chunks, tuple(keys)) for (dtype, shape, chunks), keys in alike.items())


def _sharding_info(offsets: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """What ``HuggingFaceStorageReader`` of torch looks for in a file."""
    told = {key: {"saved_offsets": offset} for key, offset in offsets.items()}
    return {"DCP_SHARDING_INFO": strict_json.dump(told).decode(), "DCP_VERSION": "1.0"}


def _own(parts: Mapping[str, Any], rank: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is this rank's alone: its tensors, by keys that no other rank has, and the rest."""
    tensors: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    for part, state in parts.items():
        told[part], found, _ = trees.encode(state, part)
        tensors |= {layout.own_key(rank, part, key): tensor for key, tensor in found.items()}
    return tensors, told


def _joined(texts: Mapping[str, str]) -> str:
    return "{" + ",".join(f"{strict_json.dump(part).decode()}:{text}" for part, text in texts.items()) + "}"

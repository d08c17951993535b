"""The files of a full checkpoint, before they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from distckpt import layout, strict_json
from distckpt.formats import Image, Snapshot
from distckpt.formats import tree as trees
from distckpt.formats.form import Form
from distckpt.formats.safetensors_layout import lay_out
from distckpt.ranks import LEADER


@dataclass(frozen=True)
class _Part:
    """A part that has a file of its own, as it was in the save before."""

    form: Form
    image: Image | None
    places: Sequence[int]  # where each tensor of the image stands among those that the form finds

    def image_of(self, tensors: list[Tensor]) -> list[Image]:
        if self.image is None:
            return []
        return [replace(self.image, tensors=[tensors[nth] for nth in self.places])]


class FullLayouts:
    """Lays out what one rank writes, and remembers how: most of a state has the same form in every save."""

    def __init__(self) -> None:
        self._known: dict[str, _Part] = {}

    def lay_out(self, snapshot: Snapshot, rank: int) -> list[Image]:
        """See `distckpt.formats.Format.lay_out`."""
        own = _own(snapshot.own, rank)
        if rank != LEADER:
            return own
        shared: list[Image] = []
        told: list[str] = []
        for part, state in snapshot.shared.items():
            images, text = self._part(part, state)
            shared += images
            place = strict_json.dump({"file": layout.part_file(part), "prefix": ""}).decode()
            told.append(f'{strict_json.dump(part).decode()}:{place[:-1]},"state":{text}}}')
        return [*shared, _text(layout.STATE, "{" + ",".join(told) + "}"), *own]

    def _part(self, part: str, state: Any) -> tuple[list[Image], str]:
        """The file of the tensors of ``part``, if it has any, and the JSON of the rest."""
        known = self._known.get(part)
        if known is not None and (matched := known.form.match(state)) is not None:
            tensors, text = matched
            return known.image_of(tensors), text
        value, found, tied = trees.encode(state, part)
        image = lay_out(layout.part_file(part), found, tied) if found else None
        if (form := Form.of(state, found, part)) is not None:
            places = [form.keys[key] for key in image.keys] if image else []
            self._known[part] = _Part(form, image and replace(image, tensors=()), places)
        else:
            self._known.pop(part, None)
        return [image] if image else [], strict_json.dump(value).decode()


def _own(parts: Mapping[str, Any], rank: int) -> list[Image]:
    """One file of all tensors, as there are few: a key begins with the name of its part."""
    file = layout.rank_tensors(rank)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    told: dict[str, Any] = {}
    for part, state in parts.items():
        value, found, tied = trees.encode(state, part)
        prefix = f"{part}."
        told[part] = {"file": file, "prefix": prefix, "state": value}
        tensors |= {prefix + key: tensor for key, tensor in found.items()}
        aliases |= {prefix + key: prefix + other for key, other in tied.items()}
    text = _text(layout.rank_file(rank), strict_json.dump(told).decode())
    return [lay_out(file, tensors, aliases), text] if tensors else [text]


def _text(path: str, text: str) -> Image:
    data = text.encode("ascii")
    return Image(path, len(data), texts=((0, data),))

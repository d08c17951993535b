"""Exports in the format of ``torch.distributed.checkpoint``, which its ``FileSystemReader`` reads."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from distckpt.formats import Image, Sum
from distckpt.formats.placeholders import flat
from distckpt.formats.zip_image import ZipLayout

_METADATA, _DATA = ".metadata", "__0_0.distcp"


class DcpExport:
    """See `distckpt.exporting.Kind`. Keys begin with the name of the part, so that each part is loaded as
    ``dcp.load({"model": model.state_dict()}, checkpoint_id=target)``. Weights that are tied are there under each name,
    as that asks for each. A tuple that holds tensors becomes a list, which is what can be loaded in place."""

    is_folder = True
    takes_several = True
    names_parts = True
    leaves_out_values = False

    def lay_out(self, state: Any) -> list[Image]:
        metadata, items = as_torch_sees(state)
        data = _Data()
        for item, value in items:
            data.add(item, value)
        metadata.storage_data = data.places
        metadata.storage_meta = StorageMeta()
        metadata.version = CURRENT_DCP_VERSION
        told = pickle.dumps(metadata)
        return [data.image(), Image(_METADATA, len(told), texts=((0, told),))]

    def is_one(self, place: Path) -> bool:
        if not place.is_dir():
            return False
        names = {one.name for one in place.iterdir()}
        return not names or (
            _METADATA in names and all(name == _METADATA or name.endswith(".distcp") for name in names)
        )


def as_torch_sees(state: Any) -> tuple[Metadata, list[tuple[WriteItem, Tensor | io.BytesIO]]]:
    """What a planner of torch makes of it, so that keys and metadata are those that its loading expects: each tensor is
    that of ``state``, and of what is none there are the bytes that it would write.

    Raises:
        ValueError: naming what has no place there.
    """
    planner = DefaultSavePlanner()
    planner.set_up_planner(_listed(state), is_coordinator=True)
    ([plan], metadata) = planner.create_global_plan([planner.create_local_plan()])
    return metadata, [(item, planner.resolve_data(item)) for item in planner.finish_plan(plan).items]


@dataclass
class _Data:
    """The file that grows by a file of ``torch.save`` for each item."""

    size_bytes: int = 0
    places: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)
    texts: list[tuple[int, bytes]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sums: list[Sum] = field(default_factory=list)
    layout: ZipLayout = field(default_factory=ZipLayout)

    def add(self, item: WriteItem, value: Tensor | io.BytesIO) -> None:
        begin = self.size_bytes
        if item.type is WriteItemType.BYTE_IO:
            assert isinstance(value, io.BytesIO)
            self.texts.append((begin, value.getvalue()))
            self.size_bytes += len(value.getvalue())
        else:
            assert isinstance(value, Tensor)
            image = self.layout.lay_out(value)
            self.texts += [(begin + at, text) for at, text in image.texts]
            self.tensors += image.tensors
            self.offsets += [begin + at for at in image.offsets]
            self.sums += [
                Sum(begin + one.begin, begin + one.end, tuple(begin + at for at in one.places)) for one in image.sums
            ]
            self.size_bytes += image.size_bytes
        self.places[item.index] = _StorageInfo(_DATA, begin, self.size_bytes - begin)

    def image(self) -> Image:
        return Image(_DATA, self.size_bytes, self.texts, self.tensors, self.offsets, sums=self.sums)


def _listed(value: Any) -> Any:
    """``value`` with lists for tuples that hold tensors: torch would pickle such a tuple whole."""
    if isinstance(value, dict):
        return {key: _listed(one) for key, one in value.items()}
    if isinstance(value, list) or (type(value) is tuple and any(True for _ in flat(value))):
        return [*map(_listed, value)]
    if isinstance(value, set) and any(isinstance(one, Tensor) for one in value):
        raise ValueError("a set of tensors cannot be exported to DCP: its elements have no names")
    return value

"""What ``.metadata`` says, read without unpickling it."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import metadata as stock
from torch.distributed.checkpoint.filesystem import _StorageInfo

from distckpt.formats.dcp_metadata import Metadata, Place

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

HERE = torch.Size((0, 0))


def folder(**words: Any) -> stock.Metadata:
    """The metadata of one tensor of two parts, and of a number; ``words`` say what is another."""
    size = torch.Size((4, 3))
    chunks = [stock.ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((2, 3))) for row in (0, 2)]
    storage = {
        stock.MetadataIndex("w", one.offsets, nth): _StorageInfo(f"__{nth}_0.distcp", nth, 9)
        for nth, one in enumerate(chunks)
    }
    storage[stock.MetadataIndex("step")] = _StorageInfo("__0_0.distcp", 20, 5)
    tensors: dict[str, Any] = {
        "w": stock.TensorStorageMetadata(stock.TensorProperties(), size, chunks),
        "step": stock.BytesStorageMetadata(),
    }
    told = {"state_dict_metadata": tensors, "storage_data": storage, "storage_meta": stock.StorageMeta(Path("there"))}
    return stock.Metadata(**(told | words))


def read(metadata: Any) -> Metadata:
    return Metadata(pickle.dumps(metadata))


def test_it_is_what_torch_says_of_a_folder_that_it_wrote(tmp_path):
    state = {
        "model": {
            **{
                f"w{nth}": torch.zeros(nth + 1, 3, dtype=dtype)
                for nth, dtype in enumerate((torch.bfloat16, torch.int8))
            },
            "scalar": torch.tensor(1.0),
            "empty": torch.empty(0, 3),
            "last": torch.nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)),
            "long name" * 40: torch.zeros(1),
        },
        "lr": 0.1,
        "ordered": OrderedDict(a=1),
        "path": Path("somewhere"),
    }
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path, thread_count=2), no_dist=True)
    theirs = pickle.loads((tmp_path / ".metadata").read_bytes())
    ours = Metadata((tmp_path / ".metadata").read_bytes())
    told = {
        name: (
            one.properties.dtype,
            one.size,
            [
                (chunk.offsets, chunk.sizes, theirs.storage_data[stock.MetadataIndex(name, chunk.offsets)])
                for chunk in one.chunks
            ],
        )
        for name, one in theirs.state_dict_metadata.items()
        if isinstance(one, stock.TensorStorageMetadata)
    }
    assert set(ours.tensors) == set(told)
    for name, (dtype, size, chunks) in told.items():
        places = [(at, of, Place(info.relative_path, info.offset, info.length)) for at, of, info in chunks]
        assert ours.tensor(name) == (dtype, size, places)
    values = {index.fqn: info for index, info in theirs.storage_data.items() if index.offset is None}
    assert {name: (*place,) for name, place in ours.values.items()} == {
        name: (info.relative_path, info.offset, info.length) for name, info in values.items()
    }


def test_metadata_of_older_versions_are_read():
    """They name classes that lived elsewhere, and have fewer fields."""
    metadata = folder()
    for field in ("storage_meta", "version", "planner_data"):
        del vars(metadata)[field]
    written = pickle.dumps(metadata)
    older = _renamed(written, "TensorProperties", "TensorProperties")
    older = _renamed(older, "_MEM_FORMAT_ENCODING", "MEM_FORMAT_ENCODING")
    assert Metadata(older).tensor("w") == read(folder()).tensor("w")


def _renamed(written: bytes, name: str, older: str) -> bytes:
    """A pickle in which that name of torch is one of another module."""
    modules = "torch.distributed.checkpoint.metadata", "torch.distributed._shard.sharded_tensor.metadata"
    asks = b"\x8c" + bytes([len(name)]) + name.encode()
    at = written.index(asks)
    before, behind = written[:at], written[at + len(asks) :]
    # The module is what was pushed before: a name in the memo, and two bytes long.
    assert before[-2:-1] == b"h", "the module is not fetched from the memo"
    return (
        before[:-2]
        + b"\x8c" + bytes([len(modules[1])]) + modules[1].encode()
        + b"\x8c" + bytes([len(older)]) + older.encode()
        + behind
    )  # fmt: skip


def test_a_member_of_an_enum_may_be_asked_for_by_name_and_nothing_else():
    class Member:
        def __reduce__(self) -> Any:
            return getattr, (stock._MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")

    class Attribute:
        def __reduce__(self) -> Any:
            return getattr, (stock.Metadata, "__init__")

    assert read(folder(planner_data=Member())).tensor("w") == read(folder()).tensor("w")
    with pytest.raises(ValueError, match=r"asks for builtins\.getattr"):
        read(folder(planner_data=Attribute()))


class Runs:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._path}",)


@pytest.mark.parametrize("field", ["planner_data", "storage_meta", "state_dict_metadata", "storage_data"])
def test_code_in_any_field_is_refused_and_not_run(field, tmp_path):
    with pytest.raises(ValueError, match=r"asks for posix\.system"):
        read(folder(**{field: Runs(tmp_path / "made")}))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "called", [eval, torch.load, stock.TensorStorageMetadata.__init__, torch.nn.Linear, set, Path.cwd]
)
def test_names_that_look_harmless_are_refused_too(called):
    class Named:
        def __reduce__(self) -> Any:
            return called, ()

    with pytest.raises(ValueError, match="asks for"):
        read(folder(planner_data=Named()))


@pytest.mark.parametrize(
    "file", ["../secret", "/etc/passwd", "sub/file", "..", ".", "", "a\0b", "..\\secret", "x" * 300]
)
def test_a_file_outside_of_the_folder_is_refused(file):
    storage = folder().storage_data
    storage[stock.MetadataIndex("step")] = _StorageInfo(file, 0, 1)
    with pytest.raises(ValueError, match="is no file of this folder"):
        read(folder(storage_data=storage))


@pytest.mark.parametrize("how, told", [(["zstd"], "by zstd"), (("a", "b"), "by a, b"), ("zstd", "by something")])
def test_what_was_transformed_is_refused_by_the_name_of_how(how, told):
    storage = folder().storage_data
    storage[stock.MetadataIndex("step")] = _StorageInfo("__0_0.distcp", 0, 1, how)
    with pytest.raises(ValueError, match=told):
        read(folder(storage_data=storage))


def test_no_transformation_is_none():
    storage = folder().storage_data
    storage[stock.MetadataIndex("step")] = _StorageInfo("__0_0.distcp", 0, 1, [])
    assert read(folder(storage_data=storage)).values == {"step": Place("__0_0.distcp", 0, 1)}


def with_tensor(*, size: Any = None, chunks: Any = None, **properties: Any) -> stock.Metadata:
    told = stock.TensorProperties(**properties)
    whole = folder().state_dict_metadata["w"]
    tensor = stock.TensorStorageMetadata(told, size or whole.size, whole.chunks if chunks is None else chunks)
    return folder(state_dict_metadata={"w": tensor})


@pytest.mark.parametrize(
    "metadata, told",
    [
        (with_tensor(layout=torch.sparse_coo), "not strided"),
        (with_tensor(dtype="torch.float32"), "no dtype"),
        (with_tensor(size=(4, 3)), "extents"),
        (with_tensor(size=torch.Size((1 << 60,))), "no tensor has"),
        (with_tensor(size=torch.Size((1,) * 65)), "no few numbers"),
        (with_tensor(size=torch.Size((4,))), "number of dimensions"),
        (with_tensor(chunks=[stock.ChunkStorageMetadata(torch.Size((1, 0)), torch.Size((3, 3)))]), "has no place"),
        (with_tensor(chunks=[None]), "should be a ChunkStorageMetadata"),
        (with_tensor(chunks=()), "chunks should be list"),
        (folder(storage_data=None), "storage_data should be dict"),
        (folder(storage_data={}), "has no place"),
        (folder(state_dict_metadata=[]), "state_dict_metadata should be dict"),
        (folder(state_dict_metadata={"w": 1}), "neither of a tensor nor of bytes"),
        (folder(state_dict_metadata={1: stock.BytesStorageMetadata()}), "neither of a tensor nor of bytes"),
        (folder(storage_data={stock.MetadataIndex("step"): _StorageInfo("a", -1, 1)}), "lies at -1"),
        (folder(storage_data={stock.MetadataIndex("step"): _StorageInfo("a", 0, "1")}), "length should be int"),  # type: ignore[arg-type]
        (folder(storage_data={stock.MetadataIndex("step"): _StorageInfo("a", True, 1)}), "offset should be int"),
        (folder(storage_data={"step": _StorageInfo("a", 0, 1)}), "MetadataIndex"),
        ({"state_dict_metadata": {}}, "should be a Metadata"),
        (stock.StorageMeta(), "should be a Metadata"),
    ],
)  # fmt: skip
def test_metadata_that_make_no_sense_are_refused(metadata, told):
    with pytest.raises(ValueError, match=told):
        found = read(metadata)
        for name in found.tensors:
            found.tensor(name)


def test_two_places_of_one_part_are_refused():
    storage = folder().storage_data | {stock.MetadataIndex("v", HERE): _StorageInfo("a", 0, 1)}
    written = pickle.dumps(folder(storage_data=storage))
    assert written.count(b"\x8c\x01v") == 1
    with pytest.raises(ValueError, match="a part of 'w' has two places"):
        Metadata(written.replace(b"\x8c\x01v", b"\x8c\x01w"))


def test_bytes_behind_the_pickle_are_refused():
    with pytest.raises(ValueError, match="3 bytes stand behind"):
        Metadata(pickle.dumps(folder()) + b"...")

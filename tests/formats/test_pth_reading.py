"""A file of torch.save that is read straight into tensors: as torch.load reads it, checked, and in no more memory."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from every_dtype import of_every_dtype
from flows import write_now
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distckpt.errors import DamagedCheckpoint
from distckpt.formats import Snapshot
from distckpt.formats.pth import Pth, open_pth, read_pth
from distckpt.formats.pth_reading import PthFile
from distckpt.formats.pth_whole import PthInMemory
from distckpt.formats.stand_ins import NewMemory
from distckpt.formats.zip_image import lay_out
from distckpt.manifest import FileEntry
from distckpt.stores.local import LocalStore

BIG = torch.arange(500_000.0)


def written(folder: Path, state: dict[str, Any]) -> FileEntry:
    """``state`` is in a file of ours."""
    (file,) = write_now(Pth(), Snapshot(shared=state), LocalStore(folder), "ours.pth").files
    return FileEntry("ours.pth", file.size_bytes, file.xxh3_128)


def opened(folder: Path, state: dict[str, Any]) -> PthFile:
    return PthFile(LocalStore(folder), "ours.pth", written(folder, state))


def read(file: PthFile | PthInMemory) -> Any:
    memory = NewMemory()
    value = memory.replaced(file.value)
    file.fill(memory.targets)
    return value


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        return
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for each, same in zip(one, other, strict=True):
            assert_same(each, same)
    else:
        assert one == other


tensors = st.builds(
    lambda shape, dtype: torch.randint(0, 100, tuple(shape)).to(dtype),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]),
)
trees = st.recursive(
    st.one_of(tensors, st.integers(), st.text(max_size=5), st.none(), st.floats(allow_nan=False)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=5), inner, max_size=4),
        st.dictionaries(st.text(max_size=5), inner, max_size=4).map(OrderedDict),
        st.lists(inner, max_size=3).map(tuple),
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=60)
@given(value=trees)
def test_what_stock_torch_wrote_is_read_as_stock_torch_reads_it(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("stock") / "x.pth"
    torch.save(value, path)
    file = open_pth(path)
    assert isinstance(file, PthFile)
    assert_same(read(file), torch.load(path, weights_only=True))


@settings(deadline=None, max_examples=30)
@given(state=st.dictionaries(st.text(max_size=5), trees, max_size=4))
def test_what_was_saved_is_read_as_stock_torch_reads_it(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("ours")
    assert_same(read(opened(folder, state)), torch.load(folder / "ours.pth", weights_only=True))


def test_tensors_of_every_dtype_are_read(tmp_path):
    state = of_every_dtype()
    assert_same(read(opened(tmp_path, state)), state)


def test_large_and_small_ones_are_read(tmp_path):
    state = {"big": BIG, "many": [torch.full((3,), float(n)) for n in range(2000)], "bigger": torch.rand(3, 700_000)}
    assert_same(read(opened(tmp_path, state)), state)


def test_what_is_tied_is_tied_again(tmp_path):
    layer = nn.Linear(3, 3)
    state = {"one": layer.weight.detach(), "other": layer.weight.detach(), "none": layer.bias.detach()}
    for file in (opened(tmp_path, state), open_pth(saved(tmp_path, state))):
        value = read(file)
        assert value["one"] is value["other"] and value["one"] is not value["none"]


def saved(folder: Path, state: Any, **words: Any) -> Path:
    torch.save(state, folder / "stock.pth", **words)
    return folder / "stock.pth"


def test_parameters_are_read_as_tensors(tmp_path):
    value = read(open_pth(saved(tmp_path, {"weight": nn.Parameter(BIG)})))
    assert torch.equal(value["weight"], BIG)


@pytest.mark.parametrize(
    "value",
    [
        {"view": BIG[10:20]},
        {"transposed": torch.rand(3, 4).t()},
        {"two": (BIG, BIG.view(1000, 500))},
        {"conjugated": torch.rand(3, dtype=torch.complex64).conj()},
        {"spread": torch.eye(3).to_sparse()},
    ],
    ids=lambda value: next(iter(value)),
)
def test_tensors_that_do_not_fill_their_records_are_read_in_the_other_way(tmp_path, caplog, value):
    caplog.set_level(logging.DEBUG, "distckpt")
    file = open_pth(saved(tmp_path, value))
    assert isinstance(file, PthInMemory)
    assert "stock.pth is read whole: " in caplog.text
    (held,), (meant,) = file.value.values(), value.values()
    for one, same in zip(held, meant, strict=True) if isinstance(meant, tuple) else [(held, meant)]:
        assert torch.equal(one.to_dense() if one.is_sparse else one, same.to_dense() if same.is_sparse else same)


def test_only_the_tensors_that_are_wanted_are_touched(tmp_path):
    file = opened(tmp_path, {"big": BIG, "small": torch.ones(3)})
    target = torch.zeros(3)
    file.fill([(file.value["small"], target)])
    assert torch.equal(target, torch.ones(3))


def test_pieces_are_all_that_there_is(tmp_path):
    file = opened(tmp_path, {"big": torch.rand(1500, 1000), "small": torch.ones(3), "none": torch.empty(0)})
    wanted = [file.value["big"], file.value["small"]]
    got: dict[int, list[Tensor]] = {id(one): [] for one in wanted}
    for piece in file.pieces(wanted):
        got[id(piece.chunk.standing)].append(piece.elements.clone())
    whole = read(file)
    for one, meant in zip(wanted, [whole["big"], whole["small"]], strict=True):
        assert torch.equal(torch.cat(got[id(one)]), meant.reshape(-1))


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        (byte,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


def test_a_bit_that_flips_after_it_was_opened_is_found(tmp_path):
    entry = written(tmp_path, {"big": BIG})
    file = PthFile(LocalStore(tmp_path), "ours.pth", entry)
    flip(tmp_path / "ours.pth", entry.size_bytes // 2)
    with pytest.raises(DamagedCheckpoint, match=r"ours\.pth: its bytes changed after the commit"):
        read(file)


def test_a_file_that_gives_way_to_another_after_it_was_opened_is_found(tmp_path):
    file = open_pth(saved(tmp_path, {"big": BIG, "step": 1}))
    saved(tmp_path, {"big": BIG, "step": 2})
    with pytest.raises(DamagedCheckpoint, match=r"stock\.pth changed while it was read"):
        read(file)


def test_a_file_that_is_cut_off_after_it_was_opened_is_found(tmp_path):
    file = open_pth(saved(tmp_path, {"big": BIG}))
    os.truncate(tmp_path / "stock.pth", 1000)
    with pytest.raises(DamagedCheckpoint, match=r"stock\.pth changed while it was read"):
        read(file)


def test_each_flipped_bit_of_a_small_stock_file_is_found_or_means_nothing(tmp_path):
    value = {"weights": torch.arange(40), "step": 3}
    whole = saved(tmp_path, value).read_bytes()
    found = 0
    for at in range(0, len(whole), 7):
        data = bytearray(whole)
        data[at] ^= 1
        (tmp_path / "flipped.pth").write_bytes(data)
        try:
            assert_same(read_pth(tmp_path / "flipped.pth"), value)
        except DamagedCheckpoint:
            found += 1
    assert found > 50


def test_a_file_without_checksums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path, {"big": BIG, "step": 3})
    finally:
        torch.serialization.set_crc32_options(before)
    assert {one.CRC for one in zipfile.ZipFile(path).infolist()} == {0}
    assert_same(read(open_pth(path)), {"big": BIG, "step": 3})


def test_where_tensors_lie_in_a_file_of_many_gigabytes_is_known(tmp_path):
    # Nothing but the text is there: records that begin beyond 4 GiB, and one that is longer, are spelled otherwise.
    long = torch.empty(1, dtype=torch.int8).expand(5 << 30)
    image = lay_out({"first": BIG, "long": long, "after": torch.ones(3), "last": torch.ones(5, 7)})
    with (tmp_path / "large.pth").open("wb") as stream:
        stream.truncate(image.size_bytes)
        for at, text in image.texts:
            stream.seek(at)
            stream.write(text)
        texts = dict(image.texts)
        for one in image.sums:
            for place in one.places if one.begin in texts else ():
                stream.seek(place)
                stream.write(zlib.crc32(texts[one.begin]).to_bytes(4, "little"))
    file = PthFile(LocalStore(tmp_path), "large.pth", None)
    assert [one.begin for one in file._tensors] == [*image.offsets]
    assert file.value["long"].shape == (5 << 30,)


MEASURED = """
import sys
from pathlib import Path
import torch
from distckpt.formats.pth import open_pth
def memory(of):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(of)]
    return int(line.split()[1]) // 1024
target = torch.zeros(25_000_000)
before = memory("VmRSS")
file = open_pth(sys.argv[1])
file.fill([(file.value["big"], target)])
assert target[-1] == 24_999_999
print(memory("VmHWM") - before)
"""


def test_it_is_read_in_little_memory(tmp_path):
    state = {"big": torch.arange(25_000_000, dtype=torch.float32)}
    written(tmp_path, state)
    for path in (tmp_path / "ours.pth", saved(tmp_path, state)):
        run = subprocess.run([sys.executable, "-c", MEASURED, path], check=True, capture_output=True, text=True)
        assert int(run.stdout) < 60, f"{run.stdout} MiB for 95"

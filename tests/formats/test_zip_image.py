"""The image of a file of torch.save: what torch.save would have written, and what every reader reads."""

from __future__ import annotations

import copy
import io
import itertools
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.serialization import config

from distckpt.formats import Image
from distckpt.formats.savable import identity
from distckpt.formats.zip_image import ZipLayout, lay_out
from distckpt.runner_state import to_plain

SERIAL = "archive/.data/serialization_id"
GIB = 1 << 30


def placed(image: Image) -> list[tuple[int, Tensor]]:
    """Its tensors, and where they begin."""
    return list(zip(image.offsets, image.tensors, strict=True))


def bytes_of_image(image: Image) -> bytes:
    """The file, once it is filled in."""
    data = bytearray(image.size_bytes)
    for at, text in image.texts:
        data[at : at + len(text)] = text
    for at, tensor in placed(image):
        elements = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        data[at : at + tensor.nbytes] = elements.view(-1).view(torch.uint8).numpy().tobytes()
    for one in image.sums:
        for place in one.places:
            data[place : place + 4] = zlib.crc32(data[one.begin : one.end]).to_bytes(4, "little")
    return bytes(data)


def by_torch(value: object) -> bytes:
    """What torch.save writes of ``value`` with its tensors copied, contiguous, to the host, and tied as they are."""
    made: dict[Any, Tensor] = {}
    copies: dict[int, Any] = {}
    for tensor in tensors_in(value):
        key = identity(tensor) if tensor.numel() else id(tensor)
        if key not in made:
            made[key] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        plain = made[key].detach()
        if isinstance(tensor, nn.Parameter):
            plain = nn.Parameter(plain, requires_grad=tensor.requires_grad)
        copies[id(tensor)] = plain.requires_grad_(tensor.requires_grad)
    sizes = [one.nbytes for one in made.values()]
    file = io.BytesIO()
    with config.patch("save.storage_alignment", 4096 if sizes and sum(sizes) / len(sizes) >= 256 * 1024 else 64):
        torch.save(copy.deepcopy(value, copies), file)
    return file.getvalue()


def tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain(*map(tensors_in, value.values()))
    elif isinstance(value, (list, tuple)):
        yield from itertools.chain(*map(tensors_in, value))


def without_serial(data: bytes) -> bytes:
    """``data`` with zeros for its number and the sum of that: torch's tells of all data, ours of what is no tensor."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        number, checksum = archive.read(SERIAL), archive.getinfo(SERIAL).CRC.to_bytes(4, "little")
    return data.replace(number, bytes(len(number))).replace(checksum, bytes(4))


def same(one: Any, other: Any) -> bool:
    """Whether the values are equal to the last bit, and of the same types."""
    if isinstance(one, Tensor):
        is_alike = (type(one), one.dtype, one.shape) == (type(other), other.dtype, other.shape)
        return is_alike and one.requires_grad == other.requires_grad and bits(one) == bits(other)
    if isinstance(one, dict):
        is_alike = type(one) is type(other) and getattr(one, "_metadata", None) == getattr(other, "_metadata", None)
        return is_alike and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def comparable(image: Image) -> Any:
    """An image as a value that can be compared."""
    tensors = [(at, id(tensor)) for at, tensor in placed(image)]
    return image.size_bytes, sorted(image.texts), tensors, image.sums


def bits(tensor: Tensor) -> list[int]:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return plain.view(-1).view(torch.uint8).tolist()


# Any state

# A tree takes a while to draw, and a neighbour may be at work.
patient = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn]
VIEWS = {
    "itself": lambda tensor: tensor,
    "another of the same": lambda tensor: tensor.detach(),
    "turned": lambda tensor: tensor.mT if tensor.ndim >= 2 else tensor,
    "every other": lambda tensor: tensor[::2] if tensor.ndim else tensor,
    "a part": lambda tensor: tensor[1:] if tensor.ndim else tensor,
    "flat": lambda tensor: tensor.reshape(-1),
    "expanded": lambda tensor: tensor.unsqueeze(0).expand(2, *tensor.shape),
    "conjugate": lambda tensor: tensor.conj(),
    "negative": lambda tensor: tensor.conj().imag if tensor.is_complex() else tensor,
    "parameter": lambda tensor: nn.Parameter(tensor, requires_grad=tensor.is_floating_point()),
}


@st.composite
def states(draw: st.DrawFn) -> Any:
    """A tree with views of a few tensors, so that some are tied and some overlap."""
    shapes = draw(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4))
    pool = [torch.randint(0, 2, shape).to(draw(st.sampled_from(DTYPES))) for shape in shapes]
    tensors = [
        VIEWS[draw(st.sampled_from(sorted(VIEWS)))](draw(st.sampled_from(pool)))
        for _ in range(draw(st.integers(0, 12)))
    ]
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    leaves |= st.binary(min_size=1, max_size=300)  # b"" is what torch.load(weights_only=True) does not know
    if tensors:
        leaves |= st.sampled_from(tensors)
    keys = st.text(max_size=5) | st.integers(0, 20)
    return draw(
        st.recursive(
            leaves,
            lambda inner: (
                st.lists(inner, max_size=5)
                | st.lists(inner, max_size=3).map(tuple)
                | st.dictionaries(keys, inner, max_size=5)
                | st.dictionaries(keys, inner, max_size=5).map(OrderedDict)
            ),
            max_leaves=20,
        )
    )


@settings(patient, max_examples=200)
@given(states())
def test_it_is_byte_for_byte_what_torch_save_writes_of_contiguous_copies_but_for_its_number(state):
    assert without_serial(bytes_of_image(lay_out(state))) == without_serial(by_torch(state))


@patient
@given(states())
def test_torch_load_reads_what_was_laid_out(state):
    file = io.BytesIO(bytes_of_image(lay_out(state)))
    assert same(torch.load(file, weights_only=True), state)


@patient
@given(states())
def test_the_sums_in_it_are_right(state):
    with zipfile.ZipFile(io.BytesIO(bytes_of_image(lay_out(state)))) as archive:
        assert archive.testzip() is None


@patient
@given(states())
def test_texts_and_tensors_fill_it_without_holes_and_overlaps(state):
    image = lay_out(state)
    spans = [(at, len(text)) for at, text in image.texts] + [(at, tensor.nbytes) for at, tensor in placed(image)]
    at = 0
    for begin, size in sorted(spans):
        assert begin == at
        at += size
    assert at == image.size_bytes


@settings(patient, max_examples=25)
@given(st.lists(states(), min_size=2, max_size=3))
def test_a_layout_that_was_used_before_lays_out_the_same(several):
    layout = ZipLayout()
    for state in [*several, several[0], several[0]]:
        assert comparable(layout.lay_out(state)) == comparable(lay_out(state))


# A state as it is met


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(words)))  # type: ignore[no-any-return]


def trained() -> dict[str, Any]:
    """A model after two steps, as a runner of MMEngine saves it."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(2):
        net(torch.arange(5)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    state = {
        "meta": {"epoch": np.int64(2), "time": "20240101_000000", "seed": 1 << 40},
        "message_hub": {"loss": np.float32(0.5), "history": np.arange(5.0), "names": np.array(["a", "b"])},
        "state_dict": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "param_schedulers": [scheduler.state_dict()],
    }
    return to_plain(state, "", [])  # type: ignore[no-any-return]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "epoch_2.pth"
    path.write_bytes(bytes_of_image(lay_out(trained())))
    return path


@pytest.mark.parametrize(
    "words", [{"weights_only": True}, {"weights_only": True, "mmap": True}, {"weights_only": False}], ids=str
)
def test_every_way_of_torch_load_reads_it(place, words):
    held = torch.load(place, **words)
    assert same(held, trained())
    assert held["state_dict"]._metadata == Net().state_dict()._metadata
    assert held["state_dict"]["head.weight"].data_ptr() == held["state_dict"]["embedding.weight"].data_ptr()


def test_torch_load_reads_it_where_it_works_out_itself_where_tensors_lie(place):
    with config.patch("load.calculate_storage_offsets", True):
        assert same(torch.load(place, weights_only=True, mmap=True), trained())


def test_unzip_finds_no_errors(place):
    run = subprocess.run(["unzip", "-t", place], capture_output=True, text=True, timeout=30)
    assert run.returncode == 0 and "No errors detected" in run.stdout, run.stdout


def test_tensors_are_the_live_ones_and_all_else_is_as_it_was():
    weight = torch.zeros(2)
    state = {"weight": weight, "lr": 0.1, "steps": [1, 2]}
    image = lay_out(state)
    weight.add_(1)
    state["lr"] = 0.2
    state["steps"].append(3)
    held = torch.load(io.BytesIO(bytes_of_image(image)), weights_only=True)
    assert held["weight"].tolist() == [1, 1] and (held["lr"], held["steps"]) == (0.1, [1, 2])
    assert image.tensors[0] is weight


def test_a_view_has_the_place_of_what_it_shows_only():
    base = torch.arange(1_000_000.0)
    image = lay_out({"head": base[:10], "some": base[::100_000]})
    assert [tensor.nbytes for tensor in image.tensors] == [40, 40] and image.size_bytes < 4096


def test_tensors_without_elements_have_no_place():
    image = lay_out([torch.zeros(0, 3), torch.ones(1), torch.ones(2)[:0]])
    assert [tensor.nbytes for tensor in image.tensors] == [4]
    assert [one.end - one.begin for one in image.sums][1:-1] == [4]


@pytest.mark.parametrize(("elements", "alignment"), [(65_536, 4096), (65_535, 64)])
def test_tensors_that_are_large_on_average_begin_on_pages(elements, alignment):
    image = lay_out([torch.zeros(elements), torch.zeros(elements)])
    assert all(at % alignment == 0 for at in image.offsets)
    with zipfile.ZipFile(io.BytesIO(bytes_of_image(image))) as archive:
        assert archive.read("archive/.storage_alignment") == str(alignment).encode()


@pytest.mark.parametrize(
    "other",
    [{"lr": 0.1, "a": torch.zeros(7)}, {"lr": 0.1, "a": torch.zeros(3), "b": 1}, {"lr": 0.2, "a": torch.zeros(3)}],
    ids=["another size", "a longer pickle", "another number"],
)
def test_a_layout_remembers_nothing_that_changed(other):
    layout = ZipLayout()
    layout.lay_out({"lr": 0.1, "a": torch.zeros(3)})
    assert comparable(layout.lay_out(other)) == comparable(lay_out(other))


class Meanwhile:
    """Calls a function while it is being pickled."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        self.call()
        return int, ()


def test_a_layout_may_be_used_while_it_lays_out():
    layout = ZipLayout()
    others: list[bool] = []

    def call() -> None:
        other = [torch.zeros(nth) for nth in range(5)]
        others.append(comparable(layout.lay_out(other)) == comparable(lay_out(other)))

    state = [torch.zeros(2), Meanwhile(call), torch.zeros(3)]
    assert comparable(layout.lay_out(state)) == comparable(lay_out(state)) == comparable(layout.lay_out(state))
    assert others == [True] * 3


def test_files_of_other_values_have_other_numbers():
    def number(value: object) -> bytes:
        return zipfile.ZipFile(io.BytesIO(bytes_of_image(lay_out(value)))).read(SERIAL)

    assert number({"step": 1}) == number({"step": 1}) != number({"step": 2})


# More than 32 bits


@pytest.mark.skipif(sys.maxsize < 1 << 40, reason="needs addresses of 64 bits")
def test_a_tensor_of_5_gib_can_be_mapped_from_a_file(tmp_path):
    large = torch.empty(5 * GIB, dtype=torch.uint8)  # nobody touches it, so it takes no memory
    image = lay_out({"before": torch.arange(3), "large": large, "after": torch.arange(4)})
    first, begin, last = image.offsets
    assert last > begin + 5 * GIB > image.size_bytes - 65_536
    path = tmp_path / "sparse.pth"
    with path.open("wb") as file:
        file.truncate(image.size_bytes)
        for at, content in (*image.texts, (begin, b"\7"), (begin + 5 * GIB - 1, b"\x08"), (last + 24, b"\x09")):
            file.seek(at)
            file.write(content)
    held = torch.load(path, weights_only=True, mmap=True)
    assert [one.nbytes for one in held.values()] == [24, 5 * GIB, 32]
    assert (held["large"][0], held["large"][-1], held["after"][-1]) == (7, 8, 9)
    (told,) = [one for one in image.sums if one.begin == begin]
    assert told.end == begin + 5 * GIB and told.places[0] == told.end + 4
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/1").file_size == 5 * GIB
        assert archive.getinfo("archive/data/2").header_offset == told.end + 24

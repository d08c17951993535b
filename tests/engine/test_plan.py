"""A plan says of each tensor where it goes, and when and how it is copied."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine.trainings import bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distckpt.engine.copying import BLOCK_BYTES, SMALL_BYTES, Copy
from distckpt.engine.plan import Plan, starts
from distckpt.formats import Image

LARGE = (200, 200)  # in float32 160 kB


def image_of(*tensors: Tensor, text: bytes = b"head") -> Image:
    """A file with these one behind the other, and nothing to align them: a format may do that."""
    offsets, end = [], len(text)
    for one in tensors:
        offsets.append(end)
        end += one.nbytes
    return Image("file", end, ((0, text),), tensors, offsets, keys=[str(nth) for nth in range(len(tensors))])


def bytes_of(image: Image) -> bytes:
    """What will stand in the file."""
    found = bytearray(image.size_bytes)
    for offset, text in image.texts:
        found[offset : offset + len(text)] = text
    for offset, tensor in zip(image.offsets, image.tensors, strict=True):
        found[offset : offset + tensor.nbytes] = bits(tensor)
    return bytes(found)


def planned(*tensors: Tensor, late: bool = False, **words: Any) -> Plan:
    return Plan.of([image_of(*tensors, **words)], may_be_late=lambda *_: late)


def counts(plan: Plan) -> dict[str, int]:
    """How many tensors are copied in each of the ways."""
    found = {name: len(getattr(plan, name)) for name in ("small", "odd", "now", "late", "late_odd", "witnesses")}
    return {name: count for name, count in found.items() if count}


# Where


@given(st.lists(st.integers(0, 20_000), max_size=6))
def test_each_image_begins_on_a_page_behind_the_one_before(sizes):
    images = [Image(str(nth), size, ()) for nth, size in enumerate(sizes)]
    found = starts(images)
    assert len(found) == len(images) + 1 and found[0] == 0 and all(start % 4096 == 0 for start in found)
    for begin, end, size in zip(found, found[1:], sizes, strict=False):
        assert 0 <= end - begin - size < 4096


def test_what_stands_in_a_later_image_goes_behind_those_before():
    images = [image_of(torch.rand(LARGE)), image_of(torch.rand(LARGE), text=b"other")]
    plan = Plan.of(images, may_be_late=lambda *_: False)
    assert [offset for offset, _ in plan.texts] == [0, plan.starts[1]]
    assert [piece.offset for piece in plan.now] == [4, plan.starts[1] + 5]


# When and how


def test_a_small_tensor_is_copied_at_once_whoever_changes_it():
    plan = planned(torch.rand(SMALL_BYTES // 4 - 1), nn.Parameter(torch.rand(3)), torch.tensor(1.0), late=True)
    assert counts(plan) == {"small": 3}


def test_a_tensor_without_elements_is_not_copied():
    plan = planned(torch.empty(0), torch.empty(3, 0).t(), torch.empty(0, dtype=torch.complex64).conj(), late=True)
    assert counts(plan) == {}


def test_a_large_tensor_is_copied_by_pieces_beside_training_where_it_may_be():
    tensor = torch.rand(LARGE)
    assert counts(planned(tensor)) == {"now": 1}
    assert counts(planned(tensor, late=True)) == {"late": 1, "witnesses": 1}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.rand(LARGE).t(),
        torch.rand(LARGE)[:, ::2],
        torch.rand(1, 1).expand(LARGE),
        torch.rand(2, 3, 100, 100).contiguous(memory_format=torch.channels_last),
        torch.complex(torch.rand(LARGE), torch.rand(LARGE)).conj(),
        torch.complex(torch.rand(LARGE), torch.rand(LARGE)).conj().imag,
    ],
)
@pytest.mark.parametrize("late", [True, False])
def test_what_does_not_lie_as_it_reads_is_copied_at_once_by_torch(tensor, late):
    assert counts(planned(tensor, late=late)) == {"odd": 1}


def test_who_decides_what_is_late_is_told_where_it_lies():
    large, again, turned = torch.rand(LARGE), torch.rand(LARGE), torch.rand(LARGE).t()
    told: list[Any] = []
    Plan.of([image_of(large, torch.rand(3), turned, again)], may_be_late=lambda *one: told.append(one) or False)
    assert [place for place, _, _ in told] == [(large.data_ptr(), large.nbytes), (again.data_ptr(), again.nbytes)]
    assert [image.keys[nth] for _, image, nth in told] == ["0", "3"]


def test_what_nobody_could_name_is_copied_at_once():
    image = replace(image_of(torch.rand(LARGE)), keys=())
    assert counts(Plan.of([image], may_be_late=lambda *_: True)) == {"now": 1}


def test_a_tensor_of_inference_mode_has_no_version_and_is_copied_at_once():
    with torch.inference_mode():
        tensor = torch.rand(LARGE)
    assert counts(planned(tensor, late=True)) == {"now": 1}


# All of it

TENSORS = st.sampled_from(
    [
        torch.arange(7),
        torch.tensor(2.5),
        torch.empty(0, 3),
        torch.rand(LARGE),
        torch.rand(5, 7).t(),
        torch.rand(LARGE).t(),
        torch.complex(torch.rand(50), torch.rand(50)).conj(),
        torch.rand(2, 3, 90, 90).contiguous(memory_format=torch.channels_last),
        torch.rand(100_001).bfloat16(),
        torch.tensor([True, False]),
    ]
).map(lambda tensor: tensor.detach())


def aligned(tensors: list[Tensor]) -> Image:
    """As formats do it: each tensor lies at a multiple of its element's size."""
    return image_of(*sorted(tensors, key=lambda one: -one.element_size()), text=bytes(range(64)))


@given(st.lists(TENSORS, max_size=6), st.booleans())
def test_all_ways_together_fill_the_image(tensors, late):
    image = aligned(tensors)
    plan = Plan.of([image], may_be_late=lambda *_: late)
    arena = torch.full((plan.starts[-1] or 1,), 0xA5, dtype=torch.uint8)
    plan.scatter(arena)
    for pieces in (plan.now, plan.late):
        copy = Copy(arena, (plan.starts[-1] // BLOCK_BYTES + 1) * BLOCK_BYTES, pieces)
        copy.work()
        copy.wait()
    assert arena[: image.size_bytes].numpy().tobytes() == bytes_of(image)


@given(st.lists(TENSORS, max_size=6))
def test_where_there_is_memory_for_a_part_everything_comes_in_pieces(tensors):
    image = aligned(tensors)
    plan = Plan.in_order([image])
    assert sum(piece.size for piece in plan.now) == image.size_bytes
    assert counts(plan) == {"now": len(plan.now)} and not plan.texts
    arena = torch.full((plan.starts[-1],), 0xA5, dtype=torch.uint8)
    copy = Copy(arena, (plan.starts[-1] // BLOCK_BYTES + 1) * BLOCK_BYTES, plan.now)
    copy.work()
    copy.wait()
    assert arena[: image.size_bytes].numpy().tobytes() == bytes_of(image)

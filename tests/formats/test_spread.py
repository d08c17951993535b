"""What is left of a tensor where it was cut between any two of its elements, told as boxes."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt.formats.shards import boxes_of, bytes_of, is_on_several, is_spread, local_of, new_like, view_of, views_of
from distckpt.formats.spread import Range, boxes_of_range

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_a_range_is_few_boxes_that_follow_one_another(shape, data):
    count = math.prod(shape)
    begin = data.draw(st.integers(0, count))
    end = data.draw(st.integers(begin, count))
    whole = torch.arange(count).reshape(shape)
    boxes = [*boxes_of_range(shape, begin, end)]
    elements = []
    for offsets, sizes in boxes:
        assert 0 not in sizes
        slices = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
        elements += whole[slices].flatten().tolist()
    assert elements == [*range(begin, end)] and len(boxes) <= max(2 * len(shape) - 1, 1)


@given(SHAPES, st.data())
def test_its_views_are_its_elements_in_whatever_order_they_lie_in_memory(shape, data):
    order = data.draw(st.sampled_from([*permutations(range(len(shape)))]))
    count = math.prod(shape)
    begin = data.draw(st.integers(0, count))
    end = data.draw(st.integers(begin, count))
    back = sorted(range(len(order)), key=lambda nth: order[nth])
    lies = torch.randn([shape[dim] for dim in order])
    whole, mine = lies.permute(back), lies.flatten()[begin:end]
    tensor = Range.cut(shape, order, begin, mine)
    assert tensor.shape == whole.shape and is_spread(tensor)
    for seen, other in ((tensor, whole), (bytes_of(tensor), bytes_of(whole.contiguous()))):
        for box in boxes_of(seen):
            slices = tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))
            assert torch.equal(view_of(seen, box), other[slices])
    assert sum(view.numel() for view in views_of(tensor)) == end - begin
    if end > begin:
        assert local_of(tensor).data_ptr() == mine.data_ptr()
    again = new_like(tensor, torch.float64)
    assert [*boxes_of(again)] == [*boxes_of(tensor)] and again.elements.dtype is torch.float64
    assert again.elements.shape == mine.shape


def test_a_tensor_without_elements_is_on_every_rank():
    tensor = Range.cut((3, 0), (0, 1), 0, torch.empty(0), is_on_several=True)
    (box,) = boxes_of(tensor)
    assert box.sizes == (3, 0) and view_of(tensor, box).shape == (3, 0) and is_on_several(tensor)


def test_nobody_calculates_with_a_part_as_if_it_was_the_whole():
    tensor = Range.cut((4, 2), (0, 1), 3, torch.ones(2))
    for work in (
        lambda: torch.add(tensor, 1),
        lambda: tensor.sum(),
        lambda: tensor.clone(),
        lambda: torch.empty(4, 2).copy_(tensor),
    ):
        with pytest.raises(TypeError, match="lies on several ranks"):
            work()

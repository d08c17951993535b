"""What several ranks hold alike: each byte has one owner, no rank two parts of a box, and all have about as much."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from distckpt.formats.boxes import fault
from distckpt.formats.sharing import LEAST_SHARE_BYTES, Group, group_of, share

Shape = tuple[int, ...]
Part = tuple[Shape, Shape]

GPT2 = [
    *[(50257, 768), (1024, 768), (768,), (768,)],
    *[(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), *[(768,)] * 5] * 12,
]
LLAMA_8B = [
    *[(128256, 4096), (128256, 4096), (4096,)],
    *[(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), *[(14336, 4096)] * 2, (4096, 14336), (4096,), (4096,)]
    * 32,
]
MOE = [(64, 14336, 1024), (64, 1024, 14336), (64, 1024)] * 6
CONVNET = [(64, 3, 7, 7), (64,), *[(256, 64, 1, 1), (64, 64, 3, 3), (512, 128, 1, 1), (512, 512, 3, 3), (2048,)] * 16]


def trained(shapes: list[Shape], weight_bytes: int) -> tuple[list[Shape], list[int]]:
    """Weights, two moments of 4 bytes and a step of each."""
    sizes = [size for shape in shapes for size in (shape, shape, shape, ())]
    return sizes, [weight_bytes, 4, 4, 4] * len(shapes)


def bytes_of(sizes: list[Shape], item_bytes: list[int]) -> np.ndarray:
    return np.array([math.prod(size) * one for size, one in zip(sizes, item_bytes, strict=True)], dtype=np.int64)


def parts_of(group: Group, sizes: list[Shape], item_bytes: list[int]) -> list[dict[int, Part]]:
    """By box and rank of the group, what it writes. No rank has two parts of a box."""
    shares = share(group, sizes, bytes_of(sizes, item_bytes))
    found: list[dict[int, Part]] = []
    for nth, size in enumerate(sizes):
        nowhere = [0] * len(size)
        if (owner := int(shares.owners[nth])) >= 0:
            assert nth not in shares.cuts
            found.append({owner: (tuple(nowhere), size)})
            continue
        parts: dict[int, Part] = {}
        for owner, dim, low, high in shares.cuts[nth]:
            assert owner not in parts
            offsets, extents = [*nowhere], [*size]
            offsets[dim], extents[dim] = low, high - low
            parts[owner] = tuple(offsets), tuple(extents)
        found.append(parts)
    return found


def loads_of(group: Group, parts: list[dict[int, Part]], item_bytes: list[int]) -> np.ndarray:
    loads = np.zeros(len(group.ranks), dtype=np.int64)
    for of, one in zip(parts, item_bytes, strict=True):
        for owner, (_, extents) in of.items():
            loads[owner] += math.prod(extents) * one
    return loads


def coarseness(sizes: list[Shape], item_bytes: list[int]) -> float:
    """How many bytes one step of the best dimension to cut has, where that is most."""
    largest = zip(bytes_of(sizes, item_bytes).tolist(), (max(size, default=1) for size in sizes), strict=True)
    return max(size_bytes / extent for size_bytes, extent in largest)


def evenly(sizes: list[Shape], item_bytes: list[int], ranks: int) -> Group:
    return group_of(range(ranks), int(bytes_of(sizes, item_bytes).sum()), np.zeros(ranks))


extents = st.sampled_from([1, 2, 3, 7, 64, 1000, 4096, 30522])
boxes = st.lists(st.tuples(st.lists(extents, max_size=3).map(tuple), st.sampled_from([1, 2, 4, 8])), max_size=8)


@given(boxes, st.lists(st.one_of(st.just(0.0), st.floats(1, 1e9)), min_size=1, max_size=9))
@example([((), 4), ((1, 1), 4), ((0, 3), 4)], [1.0, 1.0])
@example([((1 << 28,), 8)], [0.0, 0.0, 1.0])
@example([((7,), 1)], [0.0, 0.0])
def test_each_byte_has_one_owner_and_no_rank_two_parts_of_a_box(held, capacities):
    sizes, item_bytes = [size for size, _ in held], [one for _, one in held]
    group = Group(tuple(range(len(capacities))), tuple(capacities))
    for size, parts in zip(sizes, parts_of(group, sizes, item_bytes), strict=True):
        rows = [
            np.array(list(one), dtype=np.int64).reshape(len(parts), -1) for one in zip(*parts.values(), strict=True)
        ]
        assert fault(size, *rows) == ""
        assert set(parts) <= set(range(len(capacities)))


model_like = st.one_of(
    st.tuples(st.sampled_from([64, 257, 768, 1000, 4096, 14336, 50257, 128256]), st.integers(16, 8192)),
    st.tuples(st.integers(1, 16384)),
    st.tuples(st.integers(16, 2048), st.integers(1, 512), st.sampled_from([1, 3, 7]), st.sampled_from([1, 3])),
    st.just(()),
)


@given(st.lists(model_like, min_size=1, max_size=60), st.sampled_from([1, 2, 4]), st.integers(2, 128))
def test_shares_of_two_megabytes_and_more_differ_by_half_a_percent_or_by_what_cannot_be_cut(
    shapes, weight_bytes, ranks
):
    sizes, item_bytes = trained(shapes, weight_bytes)
    total = int(bytes_of(sizes, item_bytes).sum())
    ranks = min(ranks, total // 2_000_000)
    assume(ranks >= 2)
    group = evenly(sizes, item_bytes, ranks)
    assert len(group.ranks) == ranks
    loads = loads_of(group, parts_of(group, sizes, item_bytes), item_bytes)
    assert loads.max() / loads.mean() <= 1 + max(0.005, coarseness(sizes, item_bytes) / loads.mean())


@pytest.mark.parametrize(
    "shapes, weight_bytes, ranks",
    [
        *[(LLAMA_8B, 2, 8), (LLAMA_8B, 2, 64), (LLAMA_8B, 2, 1024)],
        *[(GPT2, 4, 64), (GPT2, 4, 256), (MOE, 2, 64), (MOE, 2, 1024), (CONVNET, 4, 64)],
    ],
)
def test_shares_of_real_models_differ_by_half_a_percent_at_most(shapes, weight_bytes, ranks):
    sizes, item_bytes = trained(shapes, weight_bytes)
    group = evenly(sizes, item_bytes, ranks)
    assert len(group.ranks) == ranks
    loads = loads_of(group, parts_of(group, sizes, item_bytes), item_bytes)
    assert loads.min() > 0 and loads.max() / loads.mean() <= 1.005


def test_fewer_ranks_share_what_would_be_tiny_pieces_and_they_are_those_who_write_least():
    loads = np.array([5.0, 0.0, 9.0, 0.0, 5.0])
    assert group_of([0, 1, 2, 3, 4], LEAST_SHARE_BYTES - 1, loads).ranks == (1,)
    assert group_of([0, 1, 2, 3, 4], 3 * LEAST_SHARE_BYTES, loads).ranks == (0, 1, 3)
    assert group_of([0, 1, 2, 3, 4], 5 * LEAST_SHARE_BYTES, loads).ranks == (0, 1, 2, 3, 4)
    assert group_of([2, 4], 0, loads).ranks == (4,)


def test_who_writes_more_anyway_takes_less_so_that_all_have_as_much():
    heavy = 40.0 * (1 << 20)
    total = 400 << 20
    group = group_of([3, 4, 5, 6], total, np.array([0.0, 0.0, 0.0, heavy, 0.0, 500.0 * (1 << 20), 0.0]))
    sizes, item_bytes = [(1024, 1024)] * 100, [4] * 100
    loads = loads_of(group, parts_of(group, sizes, item_bytes), item_bytes)
    assert loads[2] == 0, "it has more than all others will have"
    assert np.allclose(
        loads + np.array([heavy, 0, 0, 0]), [(total + heavy) / 3] * 2 + [0, (total + heavy) / 3], rtol=0.005
    )


def test_all_ranks_that_ask_are_told_the_same():
    sizes, item_bytes = trained(GPT2, 4)
    group = evenly(sizes, item_bytes, 7)
    one, other = (share(group, sizes, bytes_of(sizes, item_bytes)) for _ in range(2))
    assert (one.owners == other.owners).all() and one.cuts == other.cuts


def test_what_is_smaller_than_a_page_is_not_cut():
    half = 1 << 20
    sizes = [(half - 8,), (16,), (half - 8,)]  # the middle of all lies in the second
    shares = share(Group((0, 1), (half, half)), sizes, bytes_of(sizes, [1, 1, 1]))
    assert not shares.cuts and shares.owners.tolist() in ([0, 0, 1], [0, 1, 1])

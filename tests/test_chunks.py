"""Chunks of a tensor: what is a grid takes few words and means the same, and what cannot be is refused."""

from __future__ import annotations

import json
import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.chunks import CUTS, Chunks, FileNumbers, Grid
from distckpt.progressions import condensed

PATHS = [f"rank-{rank:05d}.safetensors" for rank in range(6)]


def again(chunks: Chunks | Grid, shape: tuple[int, ...], paths: list[str]) -> Chunks | Grid:
    fields = json.loads(json.dumps(chunks.to_fields(FileNumbers(paths))))
    ((kind, told),) = fields.items()
    return CUTS[kind].from_fields(told, shape, paths, "they")


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
    starts = tuple(condensed(sorted({0} | draw(st.sets(st.integers(0, extent - 1), max_size=8)))) for extent in shape)
    count = math.prod(map(len, starts))
    return Grid(tuple(draw(st.permutations([f"file-{nth}" for nth in range(count)]))), shape, starts)


@given(grids())
def test_a_grid_holds_each_element_once(grid):
    dims = len(grid.shape)
    seen = []
    for nth in range(len(grid.files)):
        offsets, sizes = (numbers[nth * dims : (nth + 1) * dims] for numbers in (grid.offsets, grid.sizes))
        seen += product(*(range(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True)))
    assert sorted(seen) == sorted(product(*map(range, grid.shape)))


@given(grids())
def test_a_grid_is_the_same_after_it_was_read(grid):
    assert again(grid, grid.shape, sorted(grid.files)) == grid


@given(grids())
def test_any_chunks_are_the_same_after_they_were_read(grid):
    chunks = Chunks(grid.files, grid.offsets, grid.sizes)
    assert again(chunks, grid.shape, sorted(grid.files)) == chunks


def test_a_grid_of_a_million_ranks_takes_few_words():
    paths = [f"rank-{rank:07d}" for rank in range(1 << 20)]
    grid = Grid(tuple(paths), (7 << 20, 3), (range(0, 7 << 20, 7), range(1)))
    told = grid.to_fields(FileNumbers(paths))
    assert told == {"grid": {"files": [[0, 1, 1 << 20]], "starts": [[[0, 7, 1 << 20]], [0]]}}


@pytest.mark.parametrize(
    "told",
    [
        *({}, [], None, {"files": [0, 1], "starts": [[0, 3]], "sizes": []}, {"starts": [[0, 3]]}),
        *({"files": [0, 1], "starts": starts} for starts in ([], [[0]], [[0, 3], [0]], [[1, 3]], [[0, 0]], [[0, 5]])),
        *({"files": [0, 1], "starts": starts} for starts in ([[0, -1]], [[3, 0]], [[[4, -4, 2]]], [[[0, 5, 2]]], [[]])),
        *({"files": [0, 1], "starts": starts} for starts in ([0, 3], [{}], [[0, True]], [[0, 1, 2]], {}, [["0", 3]])),
        *(
            {"files": files, "starts": [[0, 3]]}
            for files in ([0, 6], [-1, 0], [0], [0, 1, 2], ["../x", 0], [[0, 1, 7]])
        ),
        *({"files": files, "starts": [[]]} for files in ([], [0])),
        {"files": [[0, 1, 1 << 40]], "starts": [[[0, 1, 1 << 40]]]},
    ],
    ids=ascii,
)
def test_what_is_no_grid_of_five_elements_is_refused(told):
    with pytest.raises(ValueError, match="they"):
        Grid.from_fields(told, (5,), PATHS, "they")


@pytest.mark.parametrize(
    "told", [{"files": [0] * 7, "offsets": [0] * 7, "sizes": [1] * 7}, {"files": [[0, 1, 1 << 40]]}]
)
def test_more_chunks_than_there_are_files_are_refused(told):
    with pytest.raises(ValueError, match="they"):
        Chunks.from_fields(told | {"offsets": [], "sizes": []} | told, (5,), PATHS, "they")

"""Which format is chosen where nobody said so: the same on all ranks, and told."""

from __future__ import annotations

import logging

import pytest

from distckpt.choosing import choose_format
from distckpt.engine.memory import Size
from distckpt.ranks import Solo
from distckpt.testing import on_threads, thread_ranks

GB = 1_000_000_000


def chosen(word: str, *sizes: Size) -> list[str]:
    """What each of as many ranks chooses."""
    return on_threads(thread_ranks(len(sizes)), lambda ranks: choose_format(word, sizes[ranks.rank], ranks).name)


@pytest.mark.parametrize("word", ["full", "sharded"])
def test_what_was_asked_for_is_taken(word):
    assert choose_format(word, Size(), Solo()).name == word


@pytest.mark.parametrize("size", [Size(), Size(whole_bytes=GB), Size(whole_bytes=100 * GB)])
def test_one_rank_writes_all_in_one_file_for_each_part(size):
    assert choose_format("auto", size, Solo()).name == "full"


def test_what_is_small_and_whole_is_written_by_one_rank():
    assert chosen("auto", Size(whole_bytes=GB), Size(whole_bytes=GB)) == ["full"] * 2


def test_where_a_tensor_is_cut_on_any_rank_all_write_and_it_is_told_once(caplog):
    with caplog.at_level(logging.INFO, "distckpt"):
        assert chosen("auto", Size(), Size(spread_bytes=1), Size()) == ["sharded"] * 3
    assert [one.message for one in caplog.records] == ["checkpoints are sharded: tensors are spread over ranks"]


def test_what_is_large_is_shared(caplog):
    with caplog.at_level(logging.INFO, "distckpt"):
        assert chosen("auto", Size(whole_bytes=GB), Size(whole_bytes=3 * GB)) == ["sharded"] * 2
    assert "the state has 3.0 GB" in caplog.text


def test_two_ranks_have_a_format_each_as_it_remembers_what_they_agreed_on():
    assert choose_format("sharded", Size(), Solo()) is not choose_format("sharded", Size(), Solo())

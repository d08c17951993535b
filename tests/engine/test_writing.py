"""An image becomes a file: its bytes, its digest, and the sums that it holds of itself."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from disks import memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distckpt.engine import writing
from distckpt.engine.writing import write_image
from distckpt.formats import Image, Sum
from distckpt.manifest import FileEntry
from distckpt.stores.local import LocalStore


def cut(data: memoryview, sizes: list[int]) -> Iterator[memoryview]:
    """``data`` in pieces of these sizes, again and again."""
    at = 0
    while at < len(data):
        for size in sizes:
            if data[at : at + size]:
                yield data[at : at + size]
            at += size


def image_of(data: memoryview, *sums: Sum) -> Image:
    return Image("part.safetensors", len(data), (), sums=sums)


def test_the_file_holds_the_bytes_and_the_entry_says_so(tmp_path):
    data = memory(300_000)
    (entry,) = write_image(image_of(data), cut(data, [100_000, 7]), LocalStore(tmp_path), "file", lambda *_: None)
    assert (tmp_path / "file").read_bytes() == bytes(data)
    assert entry == FileEntry("part.safetensors", 300_000, xxhash.xxh3_128(data).hexdigest())


def test_an_image_of_no_bytes_is_an_empty_file(tmp_path):
    (entry,) = write_image(image_of(memory(0)), [], LocalStore(tmp_path), "file", lambda *_: None)
    assert (tmp_path / "file").read_bytes() == b"" and entry.size_bytes == 0


def test_where_the_bytes_do_not_come_there_is_no_file(tmp_path):
    def pieces() -> Iterator[memoryview]:
        yield memory(5000)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_image(image_of(memory(9000)), pieces(), LocalStore(tmp_path), "file", lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def test_every_second_is_of_one_phase(tmp_path):
    spent: defaultdict[str, float] = defaultdict(float)

    def spend(phase: str, seconds: float) -> None:
        assert seconds >= 0
        spent[phase] += seconds

    data = memory(1_000_000)
    write_image(image_of(data), cut(data, [300_000]), LocalStore(tmp_path), "file", spend)
    assert set(spent) == {"fill", "hash", "write", "fsync"} and all(spent.values())


SUMS = st.lists(st.tuples(st.integers(0, 900), st.integers(0, 300), st.integers(0, 2)), max_size=5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(asked=SUMS, sizes=st.lists(st.integers(1, 400), min_size=1, max_size=3), data=st.data())
def test_sums_are_of_the_bytes_that_passed_by_and_stand_where_they_belong(asked, sizes, data, tmp_path):
    """As in a zip: the bytes of a record, then, in no particular order, what is said of it."""
    sums, end = [], 0
    for gap, size, places in asked:
        begin, end = end + gap, end + gap + size
        found = tuple(end + 4 * nth for nth in range(places))
        sums.append(Sum(begin, end, found))
        end += 4 * places + data.draw(st.integers(0, 5))
    directory = tuple(range(end + 3, end + 3 + 4 * len(sums), 4))
    sums = [Sum(one.begin, one.end, (*one.places, also)) for one, also in zip(sums, directory, strict=True)]
    content = memory(end + 3 + 4 * len(sums) + 10)
    expected = bytearray(content)
    for one in sums:
        for place in one.places:
            expected[place : place + 4] = zlib.crc32(content[one.begin : one.end]).to_bytes(4, "little")
    (tmp_path / "file").unlink(missing_ok=True)
    image = image_of(content, *data.draw(st.permutations(sums)))
    (entry,) = write_image(image, cut(content, sizes), LocalStore(tmp_path), "file", lambda *_: None)
    assert (tmp_path / "file").read_bytes() == bytes(expected)
    assert entry.xxh3_128 == xxhash.xxh3_128(bytes(expected)).hexdigest()


def test_the_slower_sum_is_the_same(monkeypatch, tmp_path: Path):
    for nth, crc32 in enumerate((writing.crc32, zlib.crc32)):
        monkeypatch.setattr(writing, "crc32", crc32)
        data = memory(10_000)
        image = image_of(data, Sum(5, 9000, (9001,)))
        write_image(image, cut(data, [4096]), LocalStore(tmp_path), str(nth), lambda *_: None)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes() != bytes(memory(10_000))

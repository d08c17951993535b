"""A zip file is laid out byte for byte as torch writes it, also where it needs 64 bits."""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.serialization import config

from distckpt.formats import Sum
from distckpt.formats.zip_archive import ZipArchive

SERIAL = ".data/serialization_id"
GIB = 1 << 30


class Recorder(io.RawIOBase):
    """A file that remembers what was written where, and what was skipped."""

    def __init__(self) -> None:
        self.texts: list[tuple[int, bytes]] = []
        self.skipped: list[tuple[int, int]] = []
        self.size_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.texts.append((self.size_bytes, bytes(data)))
        self.size_bytes += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == io.SEEK_CUR
        self.skipped.append((self.size_bytes, offset))
        self.size_bytes += offset
        return self.size_bytes

    def text(self) -> bytes:
        return b"".join(text for _, text in self.texts)


def by_torch(content: bytes, sizes: list[int], alignment: int) -> tuple[Recorder, bytes]:
    """The file of torch.save with that pickle and storages of these sizes, whose bytes it skips; and its serial."""
    storages = [torch.UntypedStorage(size, device="meta") for size in sizes]

    class Pickler(pickle.Pickler):
        def __init__(self, file: Any, protocol: int) -> None:
            self.file = file

        def dump(self, _: object) -> None:
            for storage in storages:
                self.persistent_id(storage)
            self.file.write(content)

    file = Recorder()
    with config.patch("save.storage_alignment", alignment), torch.serialization.skip_data():
        torch.save(None, file, pickle_module=SimpleNamespace(Pickler=Pickler, __name__="pickle"))
    (serial,) = [text for _, text in file.texts if len(text) == 40 and text.isdigit()]
    return file, serial


def by_us(content: bytes, sizes: list[int], alignment: int, serial: bytes) -> tuple[ZipArchive, list[int]]:
    archive = ZipArchive(alignment)
    archive.add_text("data.pkl", content)
    archive.add_text(".format_version", b"1")
    archive.add_text(".storage_alignment", str(alignment).encode())
    archive.add_text("byteorder", b"little")
    places = [archive.add(f"data/{nth}", size) for nth, size in enumerate(sizes)]
    archive.add_text("version", b"3\n")
    archive.add_text(SERIAL, serial)
    archive.finish()
    return archive, places


@settings(deadline=None)
@given(
    st.binary(min_size=1, max_size=200),
    st.lists(st.integers(0, 300) | st.sampled_from([4 * GIB - 2, 4 * GIB - 1, 4 * GIB, 5 * GIB]), max_size=6),
    st.sampled_from([64, 512, 4096]),
)
@example(b"pickle", [4 * GIB - 1, 5 * GIB, 7, 4 * GIB, 0, 3], 64)
@example(b"pickle", [4 * GIB - 2048, 0, 1], 64)
def test_all_but_the_contents_is_what_torch_writes(content, sizes, alignment):
    expected, serial = by_torch(content, sizes, alignment)
    archive, places = by_us(content, sizes, alignment, serial)
    assert b"".join(text for _, text in archive.texts) == expected.text()
    assert archive.size_bytes == expected.size_bytes
    assert [(at, size) for at, size in zip(places, sizes, strict=True) if size] == expected.skipped


def test_more_records_than_16_bits_can_count_are_what_torch_writes():
    expected, serial = by_torch(b"pickle", [3] * 66_000, 64)
    archive, _ = by_us(b"pickle", [3] * 66_000, 64, serial)
    assert b"".join(text for _, text in archive.texts) == expected.text()


@settings(deadline=None)
@given(st.lists(st.none() | st.binary(max_size=100), max_size=6))
def test_texts_and_contents_fill_the_file_without_holes_and_overlaps(contents):
    archive = ZipArchive(64)
    spans = []
    for nth, content in enumerate(contents):
        if content:
            archive.add_text(f"text/{nth}", content)
        else:
            spans.append((archive.add(f"data/{nth}", 10 * nth), 10 * nth))
    archive.finish()
    at = 0
    for begin, size in sorted([*((begin, len(text)) for begin, text in archive.texts), *spans]):
        assert begin == at or not size
        at += size
    assert at == archive.size_bytes


@pytest.mark.parametrize("content", [b"", b"x", b"content" * 99])
def test_a_zip_reader_reads_the_contents_once_they_and_their_sums_are_filled_in(content):
    archive = ZipArchive(64)
    archive.add_text("before", b"known")
    begin = archive.add("late", len(content))
    archive.add_text("after", b"known, too")
    archive.finish()
    data = bytearray(archive.size_bytes)
    for at, text in archive.texts:
        data[at : at + len(text)] = text
    data[begin : begin + len(content)] = content
    for one in archive.sums:
        assert one == Sum(begin, begin + len(content), one.places) and all(place >= one.end for place in one.places)
        for place in one.places:
            data[place : place + 4] = zlib.crc32(content).to_bytes(4, "little")
    with zipfile.ZipFile(io.BytesIO(data)) as reader:
        assert reader.testzip() is None
        assert {name: reader.read(name) for name in reader.namelist()} == {
            "archive/before": b"known",
            "archive/late": content,
            "archive/after": b"known, too",
        }

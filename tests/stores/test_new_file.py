"""A new file is written in any order, and is what was written."""

from __future__ import annotations

import errno
import os
import random
import resource
from pathlib import Path

import pytest

from distckpt.stores.new_file import new_file


def test_pieces_in_any_order_make_the_file(tmp_path):
    data = random.Random(0).randbytes(10_000)
    begins = list(range(0, len(data), 1000))
    random.Random(1).shuffle(begins)
    with new_file(tmp_path / "one", len(data)) as file:
        for begin in begins:
            file.write_at(begin, data[begin : begin + 1000])
    assert (tmp_path / "one").read_bytes() == data


def test_what_nobody_has_written_is_zeros(tmp_path):
    with new_file(tmp_path / "one", 10) as file:
        file.write_at(4, b"ab")
    assert (tmp_path / "one").read_bytes() == b"\0\0\0\0ab\0\0\0\0"


def test_what_was_written_can_be_read_before_it_is_whole(tmp_path):
    held = bytearray(3)
    with new_file(tmp_path / "one", 10) as file:
        file.write_at(5, b"abcde")
        file.read_at(6, held)
        with pytest.raises(OSError, match=r"what was just written is not there: '.*one'"):
            file.read_at(8, bytearray(3))
    assert held == b"bcd"


def test_a_name_that_is_taken_is_refused(tmp_path):
    (tmp_path / "one").write_text("precious")
    with pytest.raises(FileExistsError, match="one"), new_file(tmp_path / "one", 10):
        pass
    assert (tmp_path / "one").read_text() == "precious"


def test_an_error_of_the_disk_names_the_file(tmp_path):
    def write(place: Path) -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            with new_file(place, 10) as file:
                file.write_at(4000, bytes(200))
        except OSError as error:
            return error.errno if error.filename == str(place) else 1
        return 0

    pid = os.fork()
    if not pid:
        os._exit(write(tmp_path / "one"))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errno.EFBIG

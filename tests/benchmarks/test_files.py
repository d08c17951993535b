"""What the benchmarks say of files: which are new, and which lie in the page cache."""

from __future__ import annotations

from pathlib import Path

import proc
import pytest
from files import PIECE_BYTES, bring_into_cache, bytes_in, cached_share, drop_from_cache, files_in


def test_a_file_that_was_written_into_since_is_another(tmp_path: Path) -> None:
    (tmp_path / "same").write_bytes(b"1")
    (tmp_path / "changed").write_bytes(b"1")
    before = set(files_in(tmp_path))
    (tmp_path / "changed").write_bytes(b"22")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "new").write_bytes(b"333")
    (tmp_path / "link").symlink_to("same")
    assert {file.path.name for file in set(files_in(tmp_path)) - before} == {"changed", "new"}


def test_two_names_of_one_file_count_once(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"12345")
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    assert bytes_in(files_in(tmp_path)) == 5


def test_a_file_leaves_the_page_cache_and_comes_back(tmp_path: Path) -> None:
    if proc.file_system_of(tmp_path) == "tmpfs":
        pytest.skip("a file system in memory has nothing but a page cache")
    (tmp_path / "file").write_bytes(bytes(PIECE_BYTES + 1))
    (tmp_path / "empty").touch()
    assert cached_share(tmp_path) == 1.0
    drop_from_cache(tmp_path)
    assert cached_share(tmp_path) == 0.0
    with (tmp_path / "file").open("rb") as file:
        file.read(4096)
    assert 0 < cached_share(tmp_path) < 1
    bring_into_cache(tmp_path)
    assert cached_share(tmp_path) == 1.0

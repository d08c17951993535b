"""A file or folder appears whole under its name, or not at all, and nothing is replaced unasked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distckpt.stores.appearing import appearing


def anything(place: Path) -> bool:
    return True


def make_file(place: Path, text: str = "new") -> None:
    place.write_text(text)


def make_folder(place: Path, text: str = "new") -> None:
    place.mkdir()
    (place / "inside").write_text(text)


MAKERS = {"file": make_file, "folder": make_folder}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def text_at(place: Path) -> str:
    return (place / "inside" if place.is_dir() else place).read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_is_there_once_the_context_ends_and_not_before(tmp_path, make):
    with appearing(tmp_path / "one") as draft:
        make(draft)
        assert draft.parent == tmp_path and not (tmp_path / "one").exists()
    assert text_at(tmp_path / "one") == "new" and names(tmp_path) == ["one"]


@pytest.mark.parametrize("may_replace", [None, anything])
def test_an_error_leaves_nothing_of_it_and_what_was_there(tmp_path, make, may_replace):
    if may_replace:
        make(tmp_path / "one", "old")
    with pytest.raises(ZeroDivisionError), appearing(tmp_path / "one", may_replace) as draft:
        make(draft)
        raise ZeroDivisionError
    assert names(tmp_path) == (["one"] if may_replace else [])
    assert not may_replace or text_at(tmp_path / "one") == "old"


def test_what_is_there_is_refused_before_anything_is_made(tmp_path, make):
    make(tmp_path / "one", "old")
    with pytest.raises(FileExistsError, match=r"overwrite=True replaces it: '.*one'"), appearing(tmp_path / "one"):
        raise AssertionError("it should not come so far")
    assert text_at(tmp_path / "one") == "old"


def test_what_came_there_meanwhile_is_not_replaced(tmp_path, make):
    with pytest.raises(FileExistsError, match="one"), appearing(tmp_path / "one") as draft:
        make(draft)
        make(tmp_path / "one", "of somebody else")
    assert text_at(tmp_path / "one") == "of somebody else" and names(tmp_path) == ["one"]


def test_what_may_be_replaced_is(tmp_path, make):
    make(tmp_path / "one", "old")
    with appearing(tmp_path / "one", anything) as draft:
        make(draft)
        assert text_at(tmp_path / "one") == "old"
    assert text_at(tmp_path / "one") == "new" and names(tmp_path) == ["one"]


def test_what_may_not_be_replaced_is_refused(tmp_path, make):
    make(tmp_path / "one", "old")
    with (
        pytest.raises(FileExistsError, match="that is no export of this kind, so it is not replaced"),
        appearing(tmp_path / "one", lambda place: False),
    ):
        raise AssertionError("it should not come so far")


def test_a_link_is_replaced_and_what_it_leads_to_is_not(tmp_path):
    make_file(tmp_path / "precious", "old")
    (tmp_path / "one").symlink_to("precious")
    with appearing(tmp_path / "one", anything) as draft:
        make_file(draft)
    assert text_at(tmp_path / "precious") == "old" and text_at(tmp_path / "one") == "new"
    assert not (tmp_path / "one").is_symlink()


def test_the_folder_it_is_to_be_in_is_made(tmp_path, make):
    with appearing(tmp_path / "a" / "b" / "one") as draft:
        make(draft)
    assert text_at(tmp_path / "a" / "b" / "one") == "new"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    make_file(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="file"), appearing(tmp_path / "file" / "one"):
        raise AssertionError("it should not come so far")


def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path, make):
    name = "ü" * (os.pathconf(tmp_path, "PC_NAME_MAX") // 2)
    with appearing(tmp_path / name) as draft:
        make(draft)
    assert names(tmp_path) == [name]

"""Which backend takes the files of a hook, and what file systems of fsspec do with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distckpt.backends import FsspecFiles, open_backend, scheme_of


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        *(("s3://bucket/x", "s3"), ("cluster:s3://bucket/x", "s3"), ("memory://", "memory")),
        *(("/home/x", ""), ("runs/a:b", ""), ("", "")),
    ],
)
def test_the_scheme_of_a_url_is_what_mmengine_takes_for_it(url, scheme):
    assert scheme_of(url) == scheme


@pytest.mark.parametrize(
    ("root", "names", "path"),
    [
        ("s3://bucket", ["run", "a.pth"], "s3://bucket/run/a.pth"),
        ("s3://bucket/", ["/run/", "a.pth"], "s3://bucket/run/a.pth"),
        ("memory://", ["a.pth"], "memory://a.pth"),
        ("/home/x", ["a.pth"], "/home/x/a.pth"),
    ],
)
def test_paths_are_joined_as_urls(root, names, path):
    assert FsspecFiles("memory://").join_path(root, *names) == path


@pytest.fixture(params=["memory", "file", "dir"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[FsspecFiles, str]:
    """A file system, and somewhere on it with names that patterns are made of."""
    if request.param == "dir":
        return FsspecFiles("dir://runs", path=str(tmp_path), target_protocol="file"), "dir://runs/x[1]/*"
    root = f"{request.param}://{tmp_path}/x[1]/*"
    return FsspecFiles(root), root


def test_a_file_goes_there_and_comes_back(place, tmp_path):
    files, root = place
    source = tmp_path / "source"
    source.write_bytes(b"content")
    uploaded, put = files.join_path(root, "a.pth"), files.join_path(root, "b.pth")
    files.upload(source, uploaded)
    files.put(b"few", put)
    files.put(b"fewer", put)
    assert (files.get(uploaded), b"".join(files.download(put))) == (b"content", b"fewer")
    files.remove(uploaded)
    assert (files.isfile(uploaded), files.isfile(put), files.isfile(root)) == (False, True, False)


def test_a_source_that_cannot_be_read_leaves_what_was_there(place, tmp_path):
    files, root = place
    files.put(b"old", f"{root}/a.pth")
    with pytest.raises(OSError):
        files.upload(tmp_path / "nothing", f"{root}/a.pth")
    assert files.get(f"{root}/a.pth") == b"old"


def test_whether_there_is_a_file_is_no_guess(monkeypatch):
    def refuse(self: object, path: str, **_: object) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(MemoryFileSystem, "info", refuse)
    with pytest.raises(PermissionError):
        FsspecFiles("memory://x").isfile("memory://x/a")


@pytest.mark.parametrize(
    ("out_dir", "args", "error", "words"),
    [
        ("s3://bucket", None, ImportError, "pip install s3fs"),
        ("gs://bucket", {"backend": "fsspec"}, ImportError, "pip install gcsfs"),
        ("sftp://host/x", None, ImportError, "pip install paramiko"),
        ("nowhere://x", None, ValueError, "Protocol not known: nowhere"),
        ("http://host/x", None, ValueError, "http"),
        ("simplecache::memory://x", None, ValueError, "chain of URLs"),
        ("memory://x", {"backend": "disk"}, ValueError, "writes to directories"),
        ("memory://x", {"backend": "petrol"}, ValueError, "no backend 'petrol'; there are .*fsspec, local"),
    ],
)
@pytest.mark.parametrize("word", ["file_client_args", "backend_args"])
def test_what_cannot_take_files_is_refused_by_name(out_dir, args, error, words, word):
    asked = {"file_client_args": None, "backend_args": None, word: args}
    with pytest.raises(error, match=words):
        open_backend(out_dir, **asked)


def test_a_directory_needs_no_backend(tmp_path):
    assert open_backend(str(tmp_path), None, None).files is None
    assert open_backend(str(tmp_path), None, {"backend": "local"}).files is None
    assert open_backend(str(tmp_path), {"backend": "disk"}, None).files is None


def test_a_directory_of_this_machine_is_known_as_that(tmp_path):
    assert FsspecFiles("file:///").is_directory(f"file://{tmp_path}/../{tmp_path.name}", os.fspath(tmp_path))
    assert not FsspecFiles("file:///").is_directory(f"file://{tmp_path}/x", os.fspath(tmp_path))
    assert not FsspecFiles("memory://").is_directory(os.fspath(tmp_path), os.fspath(tmp_path))


def test_fsspec_is_imported_by_who_uses_it_alone():
    code = "import distckpt.backends, sys; sys.exit('fsspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_options_of_the_storage_are_passed_on():
    files = open_backend("dir://x", None, {"backend": "fsspec", "path": "/base", "target_protocol": "memory"}).files
    assert isinstance(files, FsspecFiles)
    files.put(b"few", "dir://x/a.pth")
    assert fsspec.filesystem("memory").cat("/base/x/a.pth") == b"few"
    fsspec.filesystem("memory").rm("/base", recursive=True)

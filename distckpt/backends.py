"""What takes files to a place that is no directory here: a backend of MMEngine, or a file system of fsspec."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOCAL = (None, "local", "disk")

_FSSPEC = "fsspec"
_NEEDED = ("put", "get", "isfile", "remove", "join_path")
_PIECE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Backend:
    """What the words of a hook ask for.

    Attributes:
        client, backend: what MMEngine's hook has as ``file_client`` and ``file_backend``; Nones where MMEngine is not
            in use, and none was asked for.
        files: how files get there; None for a directory.
    """

    client: Any
    backend: Any
    files: WholeFiles | FsspecFiles | None


class WholeFiles:
    """A backend of MMEngine, which takes and gives a file as one piece of bytes; see `distckpt.mirror.Files`."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.put, self.isfile, self.remove = backend.put, backend.isfile, backend.remove

    def upload(self, source: Path, path: str) -> None:
        self._backend.put(source.read_bytes(), path)

    def download(self, path: str) -> Iterator[bytes]:
        yield self._backend.get(path)

    def join_path(self, root: str, name: str) -> str:
        return str(self._backend.join_path(root, name))

    def is_directory(self, path: str, directory: str) -> bool:
        fileio = _mmengine_fileio(is_asked_for=False)
        within = getattr(self._backend, "client", self._backend)
        return isinstance(within, fileio.LocalBackend) and _is_same(path, directory)


class FsspecFiles:
    """A file system of fsspec, with the methods of a backend of MMEngine; see `distckpt.mirror.Files`, too.

    Files go there in pieces: none is in memory whole.

    Args:
        url: somewhere on it.
        options: its storage options.

    Raises:
        ImportError: naming what to install.
        ValueError: where there is no such file system.
    """

    def __init__(self, url: str, **options: Any) -> None:
        import fsspec

        if "::" in url:
            raise ValueError(f"out_dir: {url!r} is a chain of URLs: use the first, and storage options for the others")
        scheme = scheme_of(url) or "file"
        try:
            self._fs, _ = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            raise ImportError(f"out_dir: {url}: {error}: pip install {_package_of(scheme, error)}") from error
        except ValueError as error:
            raise ValueError(f"out_dir: {url}: {error}") from error

    def put(self, obj: bytes, filepath: str | os.PathLike[str]) -> None:
        """``obj`` is in the file, whose folder is made where there is none."""
        self._in_folder(os.fspath(filepath), lambda place: self._fs.pipe_file(place, obj))

    def get(self, filepath: str | os.PathLike[str]) -> bytes:
        """The bytes of the file."""
        return b"".join(self.download(os.fspath(filepath)))

    def isfile(self, filepath: str | os.PathLike[str]) -> bool:
        """Whether there is such a file; raises where that cannot be found out, which fsspec's own does not."""
        try:
            return bool(self._fs.info(self._at(filepath))["type"] == "file")
        except (FileNotFoundError, NotADirectoryError):
            return False

    def remove(self, filepath: str | os.PathLike[str]) -> None:
        """The file is no more."""
        self._fs.rm_file(self._at(filepath))  # not rm, which would take a name for a pattern

    def join_path(self, filepath: str | os.PathLike[str], *filepaths: str | os.PathLike[str]) -> str:
        """The path below ``filepath``."""
        path = os.fspath(filepath)
        for one in filepaths:
            head = path if path.endswith("://") else path.rstrip("/") + "/"
            path = head + os.fspath(one).lstrip("/")
        return path

    def upload(self, source: Path, path: str) -> None:
        # Not by open and write, where what was written before an error would become the file.
        self._in_folder(path, lambda place: self._fs.put_file(os.fspath(source), place))

    def download(self, path: str) -> Iterator[bytes]:
        with self._fs.open(self._at(path), "rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece

    def is_directory(self, path: str, directory: str) -> bool:
        """Whether ``path`` is that directory of this machine."""
        from fsspec.implementations.local import LocalFileSystem

        return isinstance(self._fs, LocalFileSystem) and _is_same(self._at(path), directory)

    def _in_folder(self, path: str, write: Callable[[str], object]) -> None:
        place = self._at(path)
        try:
            write(place)
        except FileNotFoundError:
            if getattr(self._fs, "fs", self._fs).async_impl:
                raise  # an object store, which has no folders: to make one would make a bucket that is misspelt
            self._fs.makedirs(self._fs._parent(place), exist_ok=True)
            write(place)

    def _at(self, path: str | os.PathLike[str]) -> str:
        return str(self._fs._strip_protocol(os.fspath(path)))


def open_backend(out_dir: str, file_client_args: Mapping[str, Any] | None, backend_args: Any) -> Backend:
    """The backend that was asked for by its name, or else by the scheme of ``out_dir``: one that MMEngine knows, or a
    file system of fsspec.

    Raises:
        ValueError: where there is none such, or it cannot be written to.
        ImportError: where its package is not installed.
    """
    word, args = ("backend_args", backend_args) if file_client_args is None else ("file_client_args", file_client_args)
    options = dict(args or {})
    name, scheme = options.pop("backend", None), scheme_of(out_dir)
    if name in LOCAL and not scheme and "prefix" not in options:
        return Backend(*_local(out_dir, file_client_args, backend_args), None)
    if name is not None and name in LOCAL:
        raise ValueError(f"{word}: the backend {name!r} writes to directories, and out_dir is the URL {out_dir!r}")
    fileio = _mmengine_fileio(is_asked_for=name not in (None, _FSSPEC))
    by_name, by_scheme = _known(fileio, is_client=file_client_args is not None)
    kind = by_scheme.get(options.get("prefix", scheme)) if name is None else by_name.get(name)
    if kind is not None:
        _refuse_unwritable(kind, word if name else "out_dir", name or scheme, by_name)
        try:
            return _of_mmengine(fileio, out_dir, file_client_args, backend_args, is_named=name is not None)
        except ImportError:
            if name is not None or not _is_known_to_fsspec(scheme):
                raise
    elif name not in (None, _FSSPEC):
        there = ", ".join(sorted({"local", _FSSPEC, *_writable(by_name)}))
        raise ValueError(f"{word}: there is no backend {name!r}; there are {there}")
    elif scheme in ("http", "https"):
        raise ValueError(f"out_dir: {scheme} cannot be written to: {out_dir!r}")
    files = FsspecFiles(out_dir, **options)
    return Backend(files, files, files)


def scheme_of(url: str) -> str:
    """``s3`` of ``s3://bucket``, and of ``cluster:s3://bucket``, as MMEngine has it; "" of what is no URL."""
    scheme, mark, _ = url.partition("://")
    return scheme.rpartition(":")[2] if mark else ""


def _local(out_dir: str, file_client_args: Any, backend_args: Any) -> tuple[Any, Any]:
    fileio = _mmengine_fileio(is_asked_for=False)
    if fileio is None:
        return None, None
    client = fileio.FileClient.infer_client(file_client_args, out_dir)
    if file_client_args is not None:
        return client, client
    return client, fileio.get_file_backend(out_dir, backend_args=backend_args)


def _of_mmengine(fileio: Any, out_dir: str, file_client_args: Any, backend_args: Any, *, is_named: bool) -> Backend:
    if file_client_args is not None:
        words = dict(file_client_args)
        if not is_named:
            words.setdefault("prefix", scheme_of(out_dir))
        client = fileio.FileClient(**words)
        return Backend(client, client, WholeFiles(client))
    backend = fileio.get_file_backend(out_dir, backend_args=backend_args)
    try:
        client = fileio.FileClient.infer_client(None, out_dir)
    except (ValueError, ImportError):  # it goes by the URL alone, and knows fewer of them
        client = backend
    return Backend(client, backend, WholeFiles(backend))


def _mmengine_fileio(*, is_asked_for: bool) -> Any:
    """MMEngine's ``fileio``; None where it is not in use, or, if asked for, not installed."""
    if is_asked_for:
        try:
            return importlib.import_module("mmengine.fileio")
        except ImportError:
            return None
    return sys.modules.get("mmengine.fileio")


def _known(fileio: Any, *, is_client: bool) -> tuple[Mapping[str, type], Mapping[str, type]]:
    """The backends of MMEngine by their names, and by schemes."""
    if fileio is None:
        return {}, {}
    if is_client:
        return fileio.FileClient._backends, fileio.FileClient._prefix_to_backends
    return fileio.backends.backends, fileio.backends.prefix_to_backends


def _refuse_unwritable(kind: type, word: str, name: str, others: Mapping[str, type]) -> None:
    missing = [method for method in _NEEDED if not hasattr(kind, method)]
    if missing:
        there = ", ".join(sorted({"local", _FSSPEC, *_writable(others)}))
        raise ValueError(
            f"{word}: the backend {name!r} ({kind.__name__}) cannot be written to: it has no {', '.join(missing)}; "
            f"those that can are {there}"
        )


def _writable(kinds: Mapping[str, type]) -> Collection[str]:
    return [name for name, kind in kinds.items() if all(hasattr(kind, method) for method in _NEEDED)]


def _is_known_to_fsspec(scheme: str) -> bool:
    import fsspec

    return scheme in fsspec.available_protocols()


def _package_of(scheme: str, error: ImportError) -> str:
    from fsspec.registry import known_implementations

    package = str(known_implementations.get(scheme, {}).get("class", "")).partition(".")[0]
    if package not in ("", "fsspec"):
        return package
    missing = error.__cause__.name if isinstance(error.__cause__, ImportError) else error.name
    return missing or f"'fsspec[{scheme}]'"


def _is_same(path: str, directory: str) -> bool:
    return Path(path).resolve() == Path(directory).resolve()

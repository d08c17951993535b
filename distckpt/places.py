"""Where the files of a runner go: into a directory and, where a backend is asked for, from there to a place of its
own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from distckpt.backends import Backend, open_backend, scheme_of
from distckpt.errors import RankFailure
from distckpt.hook_words import nested
from distckpt.mirror import Mirror
from distckpt.ranks import together
from distckpt.ranks.process_group import detect
from distckpt.stores.local import LocalStore


@dataclass(frozen=True)
class Place:
    """Where the files of a run go.

    Attributes:
        directory: where they are written: with a backend of its own the ``work_dir``.
        out_dir: where people, and what they are told, find them.
        client, backend: see `Backend`.
        mirror: the copies at ``out_dir``; None where that is the directory.
    """

    directory: str
    out_dir: str
    client: Any
    backend: Any
    mirror: Mirror | None

    def path(self, name: str) -> str:
        """Where people find the file ``name``. Not collective."""
        return os.path.join(self.out_dir, name) if self.mirror is None else self.mirror.path(name)  # noqa: PTH118


def open_place(work_dir: str, asked_dir: str | None, words: dict[str, Any], timeout: timedelta) -> Place:
    """The place that ``out_dir=asked_dir`` and ``words``, the ``file_client_args`` and ``backend_args``, ask for.
    Collective, where that is no directory.

    Raises:
        ValueError, ImportError, or what the backend raises: where there is none such, or it cannot be opened.
        RankFailure: where it cannot on another rank.
    """
    opened: Backend | None = None
    failure: Exception | None = None
    try:
        opened = open_backend(asked_dir or work_dir, **words)
        if opened.files is None:
            return Place(nested(asked_dir, work_dir), nested(asked_dir, work_dir), opened.client, opened.backend, None)
    except Exception as error:
        failure = error
    try:
        together(detect(timeout), "opening of the backend", lambda: _raise(failure))
    except RankFailure:
        if failure is not None:
            raise failure from None
        raise
    assert opened is not None and opened.files is not None, "else it failed"
    root = work_dir
    if asked_dir is not None and asked_dir != work_dir:
        root = opened.files.join_path(asked_dir, os.path.basename(work_dir.rstrip(os.sep)))  # noqa: PTH119
    if opened.files.is_directory(root, work_dir):
        raise ValueError(
            f"out_dir: {asked_dir or work_dir!r} leads to the work_dir itself, {work_dir}, into which checkpoints are "
            "written before they are copied: give another out_dir, or no backend"
        )
    return Place(
        work_dir, root, opened.client, opened.backend, Mirror(LocalStore(work_dir), work_dir, opened.files, root)
    )


def is_url(path: str) -> bool:
    """Whether that is no path of a file system."""
    return bool(scheme_of(path))


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure

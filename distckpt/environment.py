"""What a checkpoint says of the programs that wrote it."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import torch

import distckpt


def describe() -> dict[str, str]:
    """Versions, and the commit of the training script's repository where it has one. No process is started."""
    told = {"distckpt": distckpt.__version__, "torch": torch.__version__, "python": platform.python_version()}
    commit = _commit_of(Path(sys.argv[0]).absolute().parent) if sys.argv and sys.argv[0] else None
    return told | ({"git_commit": commit} if commit else {})


def _commit_of(folder: Path) -> str | None:
    """The commit that is checked out in the repository of ``folder``, read from its files."""
    for place in (folder, *folder.parents):
        git = place / ".git"
        if git.is_file():  # a worktree or a submodule
            git = place / _text(git).removeprefix("gitdir: ")
        if git.is_dir():
            return _checked_out(git)
    return None


def _checked_out(git: Path) -> str | None:
    commit = _text(git / "HEAD")
    if commit.startswith("ref: "):
        name = commit.removeprefix("ref: ")
        shared = git / _text(git / "commondir")
        packed = (line.partition(" ") for line in _text(shared / "packed-refs").splitlines())
        commit = _text(shared / name) or next((commit for commit, _, one in packed if one == name), "")
    return commit if re.fullmatch("[0-9a-f]{40,64}", commit) else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):  # no text, or a name that no file can have
        return ""

"""What a checkpoint says of the programs that wrote it."""

from __future__ import annotations

import platform
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
        head = place / ".git" / "HEAD"
        try:
            text = head.read_text(encoding="ascii").strip()
            if not text.startswith("ref: "):
                return text
            return (place / ".git" / text.removeprefix("ref: ")).read_text(encoding="ascii").strip()
        except (OSError, UnicodeError):
            continue
    return None

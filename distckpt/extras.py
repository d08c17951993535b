"""Packages that only some users need, and which versions of them."""

from __future__ import annotations

import re
from importlib import metadata


def require(package: str, *, extra: str, at_least: str, below: str | None = None) -> None:
    """``package`` is installed, in a version that was tested.

    Args:
        extra: that of distckpt which brings it.
        below: the first version that is too new, if one is known.

    Raises:
        ImportError: naming what to install.
    """
    wanted = f"{package}>={at_least}" + (f",<{below}" if below else "")
    way_out = f"pip install 'distckpt[{extra}]'"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"this needs {wanted}, which is not installed: {way_out}", name=package) from error
    is_too_new = below is not None and _numbers(found) >= _numbers(below)
    if is_too_new or _numbers(found) < _numbers(at_least):
        raise ImportError(f"this needs {wanted}, and {found} is installed: {way_out}", name=package)


def _numbers(version: str) -> list[int]:
    """What versions are compared by: their numbers, without a word about what was built or is still to come."""
    found = re.match(r"\d+(\.\d+)*", version)
    return [int(one) for one in found[0].split(".")] if found else []

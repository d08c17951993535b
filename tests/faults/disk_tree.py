"""What lies below a root at one moment, as a value: compared, built, grown from the parts of a simulated disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class File(NamedTuple):
    content: bytes
    identity: int  # equal for two names of one file


class Link(NamedTuple):
    text: str


# Everything below a root: a folder is None.
Tree = dict[str, File | Link | None]


def build(tree: Tree, root: Path) -> None:
    """The tree is below ``root``, which is there and empty."""
    names: dict[int, Path] = {}
    for path, entry in tree.items():
        place = root / path
        match entry:
            case None:
                place.mkdir()
            case Link(text):
                place.symlink_to(text)
            case File(content, identity):
                if identity in names:
                    os.link(names[identity], place)
                else:
                    place.write_bytes(content)
                    names[identity] = place


def without_identity(tree: Tree) -> dict[str, object]:
    """What two trees have to have in common to be equal for a reader."""
    return {path: entry.content if isinstance(entry, File) else entry for path, entry in tree.items()}


def names_of_one_file(tree: Tree) -> frozenset[frozenset[str]]:
    """The hard links in it."""
    names: dict[int, set[str]] = {}
    for path, entry in tree.items():
        if isinstance(entry, File):
            names.setdefault(entry.identity, set()).add(path)
    return frozenset(frozenset(paths) for paths in names.values() if len(paths) > 1)


def grow(
    folders: Mapping[int, Mapping[str, int]], contents: Mapping[int, bytes | bytearray], links: Mapping[int, str]
) -> Tree:
    """The tree below folder 0, from what each folder, file and link holds."""
    tree: Tree = {}

    def walk(identity: int, prefix: str) -> None:
        for name, inside in sorted(folders[identity].items()):
            path = prefix + name
            if inside in folders:
                tree[path] = None
                walk(inside, path + "/")
            elif inside in links:
                tree[path] = Link(links[inside])
            else:
                tree[path] = File(bytes(contents[inside]), inside)

    walk(0, "")
    return tree

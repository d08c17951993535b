"""What a disk may hold after a power cut, worked out from a trace of the calls that wrote to it.

Two models. ``posix``: only what was fsynced is sure. Bytes that were not may be missing, zeros, torn or there from
the middle on; each change of a folder's names that was not followed by an fsync of that folder may be there or not.
``ordered``, as journaling file systems do it: changes of names persist in the order in which they were made, any
fsync makes all earlier ones durable; bytes may be missing, zeros or torn.

In both, bytes whose fsync failed are lost to every later fsync of that file, as on Linux. A rename within a folder is
one change; across folders it is two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Literal

from disk_tree import Tree, grow, without_identity
from shim import Call

Model = Literal["posix", "ordered"]

# So many states of one moment are enumerated whole; of more, each unsure thing alone is there or missing.
_WHOLE = 64


@dataclass(frozen=True)
class Change:
    """Names of one folder that came, went or changed at once."""

    folder: int
    names: dict[str, int | None]


@dataclass(frozen=True)
class PowerCut:
    """What may be there if the power goes after ``after``, when the process had last said ``told``."""

    after: str
    told: str
    tree: Tree


@dataclass
class Disk:
    """Files and folders by identity: as programs see them, and what of it is sure to outlive a power cut."""

    model: Model
    contents: dict[int, bytearray] = field(default_factory=dict)
    durable: dict[int, bytes] = field(default_factory=dict)
    written: dict[int, tuple[int, int]] = field(default_factory=dict)  # from where to where, since the last fsync
    lost: set[int] = field(default_factory=set)
    folders: dict[int, dict[str, int]] = field(default_factory=dict)
    kept: dict[int, dict[str, int]] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    links: dict[int, str] = field(default_factory=dict)
    inodes: dict[int, int] = field(default_factory=dict)  # an inode number is used again, an identity never

    @classmethod
    def scan(cls, root: Path, model: Model = "posix") -> Disk:
        """What is there now, all of it durable."""
        disk = cls(model)
        disk._scan(root)
        disk.kept = {identity: dict(names) for identity, names in disk.folders.items()}
        return disk

    def _scan(self, place: Path) -> int:
        inode = place.lstat().st_ino
        if inode in self.inodes:
            return self.inodes[inode]
        identity = self._identify(inode)
        if place.is_symlink():
            self.links[identity] = str(place.readlink())
        elif place.is_dir():
            self.folders[identity] = {}
            for one in sorted(place.iterdir()):
                self.folders[identity][one.name] = self._scan(one)
        else:
            self.durable[identity] = place.read_bytes()
            self.contents[identity] = bytearray(self.durable[identity])
        return identity

    def _identify(self, inode: int) -> int:
        identity = len(self.contents) + len(self.folders) + len(self.links)
        self.inodes[inode] = identity
        return identity

    def doubt(self, path: str) -> None:
        """The name ``path`` is there, but was not made durable by whoever made it."""
        folder, _, name = path.rpartition("/")
        parent = self._find(folder or ".")
        assert parent is not None, f"{folder} is not there"
        self.changes.append(Change(parent, {name: self.kept[parent].pop(name)}))

    def apply(self, call: Call) -> None:
        """The call happened.

        Raises:
            ValueError: for a call of which there is no model.
        """
        if call.error:
            if call.name == "fsync" and self.inodes.get(call.inode) in self.contents:
                self.lost.add(self.inodes[call.inode])
            return
        match call.name:
            case "create" | "tmpfile":
                identity = self._identify(call.inode)
                self.contents[identity], self.durable[identity] = bytearray(), b""
                if call.name == "create":
                    self._change({call.path: identity})
            case "write":
                self._write(self.inodes[call.inode], call.offset, call.content)
            case "empty" | "truncate" | "fallocate":
                self._resize(self.inodes[call.inode], call)
            case "fsync":
                self._fsync(self.inodes[call.inode])
            case "mkdir":
                identity = self._identify(call.inode)
                self.folders[identity], self.kept[identity] = {}, {}
                self._change({call.path: identity})
            case "symlink":
                identity = self._identify(call.inode)
                self.links[identity] = call.other
                self._change({call.path: identity})
            case "link":
                self._change({call.other: self.inodes[call.inode]})
            case "rename":
                moved = self._find(call.path)
                if self._find(call.other) != moved:  # of two names of one file, rename changes neither
                    self._change({call.path: None, call.other: moved})
            case "exchange":
                self._change({call.path: self._find(call.other), call.other: self._find(call.path)})
            case "unlink" | "rmdir":
                self._change({call.path: None})
            case "close" | "note" | "direct" | "cached":  # past the page cache is not yet on the disk
                pass
            case _:
                raise ValueError(f"no model of {call}")

    def tree(self) -> Tree:
        """What programs see."""
        return grow(self.folders, self.contents, self.links)

    def _find(self, path: str) -> int | None:
        here: int | None = 0
        for part in [] if path == "." else path.split("/"):
            here = None if here is None else self.folders[here].get(part)
        return here

    def _change(self, names: dict[str, int | None]) -> None:
        by_folder: dict[int, dict[str, int | None]] = {}
        for path, identity in names.items():
            folder, _, name = path.rpartition("/")
            parent = self._find(folder or ".")
            assert parent is not None, f"the trace names {path}, but {folder} is not there"
            by_folder.setdefault(parent, {})[name] = identity
        for parent, changed in by_folder.items():
            _set(self.folders[parent], changed)
            self.changes.append(Change(parent, changed))

    def _write(self, identity: int, offset: int, data: bytes) -> None:
        content = self.contents[identity]
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data
        start, end = self.written.get(identity, (offset, offset))
        self.written[identity] = min(start, offset), max(end, offset + len(data))

    def _resize(self, identity: int, call: Call) -> None:
        content = self.contents[identity]
        size = {"empty": 0, "truncate": call.length, "fallocate": max(len(content), call.offset + call.length)}[
            call.name
        ]
        start = min(size, len(content))
        del content[size:]
        content.extend(bytes(size - len(content)))
        old_start, old_end = self.written.get(identity, (start, start))
        self.written[identity] = min(start, old_start), max(size, min(old_end, size))

    def _fsync(self, identity: int) -> None:
        if identity in self.contents and identity not in self.lost:
            self.durable[identity] = bytes(self.contents[identity])
            self.written.pop(identity, None)
        sure = [change for change in self.changes if self.model == "ordered" or change.folder == identity]
        for change in sure:
            _set(self.kept[change.folder], change.names)
        self.changes = [change for change in self.changes if change not in sure]
        self._forget()

    def _forget(self) -> None:
        """Nothing is unsure about what has no name any more, whatever the power cut leaves."""
        reached, left = {0}, [0]
        while left:
            folder = left.pop()
            changed = [change.names.values() for change in self.changes if change.folder == folder]
            for identity in {*self.kept.get(folder, {}).values()}.union(*changed) - reached:
                if identity is not None:
                    reached.add(identity)
                    left.append(identity)
        self.changes = [change for change in self.changes if change.folder in reached]
        self.written = {identity: span for identity, span in self.written.items() if identity in reached}

    def after_power_cut(self) -> Iterator[Tree]:
        """What may be there if the power went now; one state may come more than once."""
        dirty = {identity: self._variants(identity) for identity in self.written}
        for there, contents in self._combinations(dirty):
            folders = {identity: dict(names) for identity, names in self.kept.items()}
            for change, is_there in zip(self.changes, there, strict=True):
                if is_there:
                    _set(folders[change.folder], change.names)
            yield grow(folders, {**self.durable, **contents}, self.links)

    def _variants(self, identity: int) -> list[bytes]:
        """All of the bytes, none of them, zeros, torn, and, where nothing keeps order, there from the middle on."""
        new, old = bytes(self.contents[identity]), self.durable[identity]
        start, end = self.written[identity]
        middle = (start + end) // 2
        variants = [new, old, new[:start] + bytes(end - start) + new[end:], new[:middle] + old[middle:]]
        if self.model == "posix":
            variants.append(new[:start] + bytes(middle - start) + new[middle:])
        return list(dict.fromkeys(variants))

    def _combinations(self, dirty: dict[int, list[bytes]]) -> Iterator[tuple[list[bool], dict[int, bytes]]]:
        if self.model == "ordered":
            names = [[index < length for index in range(len(self.changes))] for length in range(len(self.changes) + 1)]
            for there in names:
                for one in _choices([len(variants) for variants in dirty.values()]):
                    yield there, _pick(dirty, one)
            return
        sizes = [2] * len(self.changes) + [len(variants) for variants in dirty.values()]
        for chosen in _choices(sizes):
            there = [choice == 0 for choice in chosen[: len(self.changes)]]
            yield there, _pick(dirty, chosen[len(self.changes) :])


def cuts(start: Disk, calls: Sequence[Call], *, since: int = 0) -> list[PowerCut]:
    """Every state in which a power cut may leave the disk, after each of the calls from ``since`` on; each once.

    ``start`` is as the calls leave it afterwards.
    """
    seen: dict[object, PowerCut] = {}
    told, after = "", "the start"
    for nth, call in enumerate(calls):
        start.apply(call)
        if call.name == "note":
            told = call.path
        else:
            after = f"call {call.number}, {call}"
        for tree in start.after_power_cut() if nth >= since else ():
            seen.setdefault((told, _key(tree)), PowerCut(after, told, tree))
    return list(seen.values())


def _key(tree: Tree) -> object:
    return frozenset(without_identity(tree).items())


def _choices(sizes: list[int]) -> Iterator[tuple[int, ...]]:
    """Vectors with one choice below each size: all if they are few, else each one alone against all others."""
    if prod(sizes) <= _WHOLE:
        yield from product(*map(range, sizes))
        return
    yield tuple(0 for _ in sizes)
    yield tuple(min(1, size - 1) for size in sizes)
    for index, size in enumerate(sizes):
        for choice in range(size):
            for others in (0, 1):
                yield tuple(choice if at == index else min(others, size - 1) for at, size in enumerate(sizes))


def _pick(dirty: dict[int, list[bytes]], chosen: Iterable[int]) -> dict[int, bytes]:
    return {identity: variants[choice] for (identity, variants), choice in zip(dirty.items(), chosen, strict=True)}


def _set(folder: dict[str, int], names: dict[str, int | None]) -> None:
    for name, identity in names.items():
        if identity is None:
            folder.pop(name, None)
        else:
            folder[name] = identity

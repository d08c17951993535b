"""A small writer that commits as it should, and that can be told to break one rule: what a harness has to catch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import shim

RULES = (
    "fsync of data",
    "fsync of folders",
    "data before the record",
    "new one before the old one goes",
    "record goes before its folder",
    "failed fsync is final",
    "record whole or not there",
)


@dataclass(frozen=True)
class Found:
    """What a reader sees: the newest step that is what was saved, 0 if none is, and records that promise too much."""

    newest: int
    broken: list[str]


def content(step: int) -> bytes:
    return b"".join(hashlib.sha256(f"{step} {block}".encode()).digest() for block in range(64))


def look(run: Path) -> Found:
    """Read everything back, and believe nothing but the bytes."""
    good, broken = [0], []
    for record in sorted(run.glob("step-*.committed")):
        try:
            promised = json.loads(record.read_text())
            data = (record.with_suffix("") / "data").read_bytes()
            step = promised["step"]
        except (OSError, ValueError, KeyError):
            broken.append(record.name)
            continue
        if data == content(step) and promised["sha256"] == hashlib.sha256(data).hexdigest():
            good.append(step)
        else:
            broken.append(record.name)
    return Found(max(good), broken)


def save_steps(root: Path, *, steps: list[int], broken: str | None = None) -> None:
    """Save each step, keep the newest, say which are sure and which failed."""
    writer = Writer(root / "run", broken)
    for step in steps:
        try:
            writer.save(step)
        except OSError as error:
            shim.say(f"failed {step} {error}")
        else:
            shim.say(f"acknowledged {step}")


class Writer:
    def __init__(self, run: Path, broken: str | None = None) -> None:
        assert broken is None or broken in RULES
        self._run = run
        self._broken = broken

    def save(self, step: int) -> None:
        self._run.mkdir(exist_ok=True)
        self._settle(self._run.parent)
        self._sweep()
        old = [one.with_suffix("") for one in self._run.glob("step-*.committed")]
        if self._broken == "new one before the old one goes":
            self._delete(old)
        folder = self._run / f"step-{step}"
        if self._broken == "data before the record":
            self._commit(folder, step)
        folder.mkdir()
        self._create(folder / "data", content(step), is_data=True)
        self._settle(folder)
        self._settle(self._run)
        if self._broken != "data before the record":
            self._commit(folder, step)
        if self._broken != "new one before the old one goes":
            self._delete(old)

    def _commit(self, folder: Path, step: int) -> None:
        promise = json.dumps({"step": step, "sha256": hashlib.sha256(content(step)).hexdigest()}).encode()
        record = folder.with_name(f"{folder.name}.committed")
        if self._broken == "record whole or not there":
            self._create(record, promise)
        else:
            draft = record.with_name(f"draft-{record.name}")
            self._create(draft, promise)
            draft.rename(record)
        self._settle(self._run)

    def _delete(self, folders: list[Path]) -> None:
        for folder in folders:
            record = folder.with_name(f"{folder.name}.committed")
            if self._broken == "record goes before its folder":
                shutil.rmtree(folder, ignore_errors=True)
            record.unlink(missing_ok=True)
            self._settle(self._run)
            if self._broken != "record goes before its folder":
                shutil.rmtree(folder, ignore_errors=True)

    def _sweep(self) -> None:
        for place in self._run.iterdir():
            if place.name.startswith("draft-"):
                place.unlink()
            elif place.is_dir() and not place.with_name(f"{place.name}.committed").exists():
                shutil.rmtree(place)

    def _create(self, place: Path, data: bytes, *, is_data: bool = False) -> None:
        with _opened(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
            while data:
                data = data[os.write(fd, data) :]
            if is_data and self._broken == "fsync of data":
                return
            if self._broken == "failed fsync is final":
                with suppress(OSError):
                    os.fsync(fd)
                    return
            os.fsync(fd)

    def _settle(self, folder: Path) -> None:
        if self._broken == "fsync of folders":
            return
        with _opened(folder, os.O_RDONLY | os.O_DIRECTORY) as fd:
            os.fsync(fd)


@contextmanager
def _opened(place: Path, flags: int) -> Iterator[int]:
    fd = os.open(place, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)

"""What distckpt writes down about a checkpoint: the manifest in it, and the record that makes it one.

Both are JSON. The record binds the manifest by its digest, the manifest binds every file by size and digest,
so that "the record is there" and "these are the bytes that were committed" are one check.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from typing import Any

import xxhash

from distckpt import layout, strict_json
from distckpt.chunks import CUTS, Chunks, FileNumbers, Grid, are_counts, files_at
from distckpt.errors import DamagedCheckpoint, NewerVersion
from distckpt.progress import Progress
from distckpt.strict_json import exactly, take

# By the word that says where tensors lie, the type of what says it.
_LIES: Mapping[str, type] = {**dict.fromkeys(CUTS, dict), "files": list, "file": str}

# Every older version stays readable for ever; a newer one is refused by name.
VERSION = 1


def digest(data: bytes) -> str:
    """The xxh3-128 of ``data``, as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its path in the folder, its size, and the xxh3-128 of its bytes.

    Attributes:
        digests: the file of the checkpoint that holds the digests of its blocks, so that a part of it can be checked;
            then ``xxh3_128`` is that of those, which have 16 bytes each. Else ``""``.
    """

    path: str
    size_bytes: int
    xxh3_128: str
    digests: str = ""

    def to_fields(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "digests" or value}

    @classmethod
    def from_fields(cls, fields: Any, what: str) -> FileEntry:
        kinds = {"path": str, "size_bytes": int, "xxh3_128": str}
        if type(fields) is dict and "digests" in fields:
            kinds["digests"] = str
        entry = cls(**exactly(fields, kinds, what))
        for name in (entry.path, entry.digests) if entry.digests else (entry.path,):
            if not layout.is_safe(name):
                raise ValueError(f"{what}: {ascii(name)[:80]} is no name of a file in a checkpoint")
        if entry.size_bytes < 0:
            raise ValueError(f"{what}: {entry.path} has a size of {entry.size_bytes} bytes")
        return entry


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that have one dtype and one global shape and are cut alike, by their keys: a model has many tensors, and
    few kinds of them.

    Attributes:
        files: that hold them whole: one that has all of them, or one for each; none where they are cut into ``chunks``,
            those of all of them in the same files.
    """

    files: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    chunks: Chunks | Grid | None = None

    @classmethod
    def of(cls, dtype: str, shape: tuple[int, ...], chunks: Chunks | Grid, keys: tuple[str, ...]) -> TensorGroup:
        """Tensors that consist of these chunks."""
        if len(chunks.files) == 1 and (isinstance(chunks, Grid) or chunks.sizes == shape):
            return cls(chunks.files, dtype, shape, keys)
        return cls((), dtype, shape, keys, chunks)

    def to_fields(self, numbers: FileNumbers) -> dict[str, Any]:
        """As JSON, where several files are known by their ``numbers``."""
        fields: dict[str, Any] = {"dtype": self.dtype, "shape": self.shape, "keys": self.keys}
        if self.chunks is not None:
            return {**self.chunks.to_fields(numbers), **fields}
        if len(self.files) > 1:
            return {"files": numbers.told(self.files), **fields}
        return {"file": self.files[0], **fields}

    @classmethod
    def from_fields(cls, fields: Any, paths: Sequence[str], what: str) -> TensorGroup:
        kind = next((name for name in _LIES if type(fields) is dict and name in fields), "file")
        group = exactly(fields, {"dtype": str, "shape": list, "keys": list, kind: _LIES[kind]}, what)
        shape, keys = group["shape"], group["keys"]
        whose = f"{what}: tensors like {ascii(keys[:1])[:80]}"
        if not are_counts(shape):
            raise ValueError(f"{whose} have the shape {ascii(shape)[:80]}")
        if not set(map(type, keys)) <= {str}:
            raise ValueError(f"{whose} have keys that are no words")
        lies: dict[str, Any] = {"files": ()}
        if kind in CUTS:
            lies["chunks"] = CUTS[kind].from_fields(group[kind], tuple(shape), paths, whose)
        elif kind == "file":
            lies["files"] = (group["file"],)
        else:
            lies["files"] = files = files_at(group["files"], len(keys), paths, whose)
            if len(files) != len(keys) or len(files) < 2:
                raise ValueError(f"{whose} are {len(keys)}, and lie in {len(files)} files")
        return cls(dtype=group["dtype"], shape=tuple(shape), keys=tuple(keys), **lies)

    @property
    def files_of_each(self) -> Iterable[tuple[str, ...]]:
        """Of each of the keys, the files that it lies in, chunk by chunk."""
        if self.chunks is None and len(self.files) > 1:
            return zip(self.files, strict=True)
        return repeat(self.files if self.chunks is None else self.chunks.files, len(self.keys))


@dataclass(frozen=True)
class Manifest:
    """Everything about one checkpoint, as it lies in its folder: enough to verify, restore and export it.

    Attributes:
        reasons: why it was saved: ``interval``, ``best``, ``last``, ``asked``.
        run, attempt: whose save it was: the id of the run's directory, and the how-manieth start of it.
        serial: the how-manieth save of that attempt. ``(attempt, serial)`` is the order of checkpoints; steps are
            not, as a run may be taken back to an older one, and clocks never are.
        seconds: how long each phase of the save took before the commit.
        environment: versions and, where known, the commit of the training code.
        read_with: plain Python that opens the files without distckpt.
    """

    progress: Progress
    format: str
    world_size: int
    reasons: tuple[str, ...]
    created: str
    run: str
    attempt: int
    serial: int
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorGroup, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    read_with: str = ""
    version: int = VERSION

    @property
    def total_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def to_json(self) -> bytes:
        numbers = FileNumbers([one.path for one in self.files])
        return strict_json.dump(
            {
                **{one.name: getattr(self, one.name) for one in dataclasses.fields(self)},
                "progress": asdict(self.progress),
                "files": [one.to_fields() for one in self.files],
                "tensors": [one.to_fields(numbers) for one in self.tensors],
            }
        )

    @classmethod
    def from_json(cls, data: bytes, what: str) -> Manifest:
        """The manifest in ``data``.

        Raises:
            DamagedCheckpoint: where it is not one; the message begins with ``what``.
            NewerVersion: where a newer distckpt wrote it.
        """
        try:
            fields = strict_json.load(data, what)
            _refuse_newer(fields, what)
            common = _common(fields, what)
            files = _files(take(fields, "files", list, what), what)
            paths = [one.path for one in files]
            tensors = take(fields, "tensors", list, what)
            return cls(
                **common,
                files=files,
                tensors=tuple(TensorGroup.from_fields(one, paths, what) for one in tensors),
                seconds=_numbers(take(fields, "seconds", dict, what), what),
                environment=_words(take(fields, "environment", dict, what), what),
                read_with=take(fields, "read_with", str, what),
            )
        except (ValueError, TypeError) as error:
            raise DamagedCheckpoint(str(error)) from error


@dataclass(frozen=True)
class Record:
    """The small file beside a checkpoint that makes it one. What it does not say, the manifest does.

    Attributes:
        name: the folder or file that is committed.
        total_bytes: of all its files.
        content_bytes, content_xxh3_128: of the manifest; where the checkpoint is one file, of that file.
        reasons, run, attempt, serial: as in `Manifest`.
        metrics: what is known of it today; a later report rewrites them.
    """

    name: str
    progress: Progress
    format: str
    world_size: int
    reasons: tuple[str, ...]
    created: str
    run: str
    attempt: int
    serial: int
    total_bytes: int
    content_bytes: int
    content_xxh3_128: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    version: int = VERSION

    @property
    def order(self) -> tuple[int, int]:
        """Sorts checkpoints from the oldest to the newest."""
        return self.attempt, self.serial

    def with_metrics(self, metrics: Mapping[str, float], reasons: tuple[str, ...] = ()) -> Record:
        """This record with more metrics, and more reasons, known."""
        more = tuple(reason for reason in reasons if reason not in self.reasons)
        return replace(self, metrics={**self.metrics, **metrics}, reasons=self.reasons + more)

    def to_json(self) -> bytes:
        fields = asdict(self)
        return strict_json.dump(fields | {"self_xxh3_128": digest(strict_json.dump(fields))})

    @classmethod
    def from_json(cls, data: bytes, what: str) -> Record:
        """The record in ``data``; raises as `Manifest.from_json` does."""
        try:
            fields = strict_json.load(data, what)
            own = fields.pop("self_xxh3_128", None)
            if own is None:
                _refuse_newer(fields, what)  # it may prove itself in another way
            if own != digest(strict_json.dump(fields)):
                # Before the version is looked at: a flipped bit in it would stop a resume that should pass this over.
                raise ValueError(f"{what} is damaged: its own digest does not match")
            _refuse_newer(fields, what)
            return cls(
                **_common(fields, what),
                name=take(fields, "name", str, what),
                total_bytes=_count(fields, "total_bytes", what),
                content_bytes=_count(fields, "content_bytes", what),
                content_xxh3_128=take(fields, "content_xxh3_128", str, what),
            )
        except (ValueError, TypeError) as error:
            raise DamagedCheckpoint(str(error)) from error


def _common(fields: dict[str, Any], what: str) -> dict[str, Any]:
    progress = exactly(fields.get("progress"), {"step": int, "epoch": int}, what)
    reasons = take(fields, "reasons", list, what)
    if not all(type(reason) is str for reason in reasons):
        raise ValueError(f"{what}: 'reasons' should be words")
    return {
        "progress": Progress(**progress),
        "reasons": tuple(reasons),
        "metrics": _numbers(take(fields, "metrics", dict, what), what),
        **{key: take(fields, key, str, what) for key in ("format", "created", "run")},
        **{key: _count(fields, key, what) for key in ("world_size", "attempt", "serial", "version")},
    }


def _files(told: list[Any], what: str) -> tuple[FileEntry, ...]:
    files = {entry.path: entry for entry in (FileEntry.from_fields(one, what) for one in told)}
    if len(files) != len(told):
        raise ValueError(f"{what}: a file stands twice in {', '.join(files)[:200]}")
    return tuple(files.values())


def _count(fields: Mapping[str, Any], key: str, what: str) -> int:
    value = take(fields, key, int, what)
    if value < 0:
        raise ValueError(f"{what}: {key!r} cannot be {value}")
    return value


def _words(fields: dict[str, Any], what: str) -> dict[str, str]:
    return {key: take(fields, key, str, what) for key in fields}


def _numbers(fields: dict[str, Any], what: str) -> dict[str, float]:
    return {key: take(fields, key, float, what) for key in fields}


def _refuse_newer(fields: dict[str, Any], what: str) -> None:
    version = take(fields, "version", int, what)
    if version > VERSION:
        raise NewerVersion(
            f"{what} has version {version}, this distckpt reads up to {VERSION}: upgrade distckpt to read it"
        )

"""Where in a folder lies what another library saved of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distckpt import layout, strict_json
from distckpt.errors import DamagedCheckpoint, NoCheckpoint
from distckpt.formats.dcp_native import METADATA, NativeFolder, is_of_single_ranks
from distckpt.formats.dcp_reading import Folder
from distckpt.formats.dcp_safetensors import SafetensorsFolder
from distckpt.formats.pth_folder import PthFolder
from distckpt.stores.file_source import FileSource
from distckpt.stores.local import LocalStore

_NUMBERS = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.[a-z]+")
_NUMBERED = re.compile(r"(?:step|checkpoint|global_step)[-_]?([0-9]{1,18})")
_FSDP = re.compile(r"pytorch_model_fsdp_[0-9]{1,4}")
_DEEPEST = 3
_Files = Mapping[str, frozenset[str] | None]
_INSIDE = ("sharded", "checkpoint")  # of DCP's safetensors beside what was made of them; of torchtitan


@dataclass(frozen=True)
class _Kind:
    """How Hugging Face calls the files of a model: the one that is whole, or those that an index names."""

    whole: str

    @property
    def index(self) -> str:
        return f"{self.whole}.index.json"

    @property
    def suffix(self) -> str:
        return Path(self.whole).suffix


_SAFETENSORS = _Kind("model.safetensors")
_PICKLED = _Kind("pytorch_model.bin")  # until 2023, and where somebody asked for it


class LinkedStore(LocalStore):
    """A directory in which files may be links, as in the cache of Hugging Face."""

    @contextmanager
    def open(self, path: str) -> Iterator[FileSource]:
        place = self._at(path).resolve()
        with LocalStore(place.parent).open(place.name) as source:
            yield source


def find(path: Path) -> Folder | PthFolder:
    """What is at ``path`` or in a folder of it: of several steps, the newest that is whole. Its indexes were read.

    These are known: a folder of ``torch.distributed.checkpoint``, its own files or safetensors; that of torchtitan,
    of Accelerate and of the ``Trainer`` of transformers around it; a model as Hugging Face saves it, or did before
    there was safetensors.

    Raises:
        NoCheckpoint: where there is none, or it does not say which is meant.
        DamagedCheckpoint: naming the file, where it is not what it should be.
        OSError: where it cannot be read.
    """
    folder = _in(path)
    if folder is None:
        raise NoCheckpoint(
            f"{path} holds no committed checkpoint, and none of another library: neither {METADATA}, nor "
            f"{_SAFETENSORS.whole}, nor {_PICKLED.whole}, nor an index of one, nor a step-<N> with one of these"
        )
    return open_folder(folder)


def open_folder(path: Path) -> Folder | PthFolder:
    """The checkpoint whose files lie there."""
    names = _names(path)
    store = LinkedStore(path)
    if METADATA in names:
        return NativeFolder(store)
    if _has_safetensors(names):
        return SafetensorsFolder(store, _safetensors(path, names, store))
    return PthFolder(path, _files(path, names, store, _PICKLED))


def _in(path: Path, depth: int = 0) -> Path | None:
    names = _names(path) if depth <= _DEEPEST else []
    if layout.CLAIM in names or any(layout.rank_of(name) is not None for name in names):
        return None  # ours, and it was never committed
    if is_of_single_ranks(names):
        raise NoCheckpoint(
            f"{path} was saved with use_collectives=False: only its own ranks can read it. Save it without that"
        )
    if METADATA in names or _has_safetensors(names) or _has_pickled(names):
        return path
    of_models = [name for name in names if _FSDP.fullmatch(name) and _is_whole(path / name)]
    if len(of_models) > 1:
        raise NoCheckpoint(f"{path} holds several models, say which is meant: {', '.join(of_models)}")
    if of_models:
        return path / of_models[0]
    for name in _INSIDE:
        if name in names and (found := _in(path / name, depth + 1)):
            return found
    for name in sorted(filter(_NUMBERED.fullmatch, names), key=_number, reverse=True):
        if _is_whole(path / name) and (found := _in(path / name, depth + 1)):
            return found
    return None


def _is_whole(path: Path) -> bool:
    """Whether a folder has what is written last."""
    names = _names(path)
    if layout.CLAIM in names:
        return False
    if {METADATA, _SAFETENSORS.index, _SAFETENSORS.whole, _PICKLED.index, _PICKLED.whole} & set(names):
        return True
    return any(_FSDP.fullmatch(name) and METADATA in _names(path / name) for name in names)


def _number(name: str) -> int:
    match = _NUMBERED.fullmatch(name)
    return int(match[1]) if match else -1


def _names(path: Path) -> list[str]:
    return sorted(one.name for one in path.iterdir()) if path.is_dir() else []


def _has_safetensors(names: Sequence[str]) -> bool:
    return any(name.endswith(_SAFETENSORS.suffix) for name in names)


def _has_pickled(names: Sequence[str]) -> bool:
    """Beside those of a model there are pickles of all else, with the same suffix."""
    return _PICKLED.index in names or _PICKLED.whole in names or bool(_numbered(names, _PICKLED))


def _numbered(names: Sequence[str], kind: _Kind) -> list[str]:
    matches = [match for name in names if (match := _NUMBERS.fullmatch(name)) and name.endswith(kind.suffix)]
    return [match[0] for match in matches if match[1] == Path(kind.whole).stem]


def _safetensors(path: Path, names: Sequence[str], store: LocalStore) -> _Files:
    """The safetensors files that are one model, whatever it is called."""
    if _SAFETENSORS.index in names or _SAFETENSORS.whole in names:
        return _files(path, names, store, _SAFETENSORS)
    files = [name for name in names if name.endswith(_SAFETENSORS.suffix)]
    _check_numbers(path, [name for name in files if not name.startswith("shard-")], names)
    if len(files) > 1 and not all(map(_NUMBERS.fullmatch, files)):
        folder = SafetensorsFolder(store, dict.fromkeys(files))
        if not folder.is_sharded:
            raise NoCheckpoint(f"{path} holds several models, say which file is meant: {', '.join(files[:20])}")
    return dict.fromkeys(files)


def _files(path: Path, names: Sequence[str], store: LocalStore, kind: _Kind) -> _Files:
    """The files that are one model, which is called as usual."""
    if kind.index in names:
        return _indexed(path, store, kind)
    if kind.whole in names:
        return {kind.whole: None}
    files = _numbered(names, kind)
    _check_numbers(path, files, names)
    return dict.fromkeys(files)


def _check_numbers(path: Path, files: Sequence[str], names: Sequence[str]) -> None:
    """All of so many files are there, where they say how many there are."""
    for name in files:
        if match := _NUMBERS.fullmatch(name):
            count, suffix = int(match[3]), Path(name).suffix
            wanted = [f"{match[1]}-{nth:05d}-of-{count:05d}{suffix}" for nth in range(1, min(count, 99_999) + 1)]
            if lost := [one for one in wanted if one not in names]:
                raise DamagedCheckpoint(f"{path}/{lost[0]} is missing: {name} is one of {count} files")


def _indexed(path: Path, store: LocalStore, kind: _Kind) -> _Files:
    what = f"{path}/{kind.index}"
    try:
        lies_in = strict_json.take(strict_json.load(store.read(kind.index), what), "weight_map", dict, what)
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from error
    keys: dict[str, set[str]] = {}
    for key, file in lies_in.items():
        if type(file) is not str or not file.endswith(kind.suffix) or Path(file).name != file or "\0" in file:
            raise DamagedCheckpoint(f"{what}: {ascii(file)[:80]} is no {kind.suffix} file of this folder")
        keys.setdefault(file, set()).add(key)
    return {file: frozenset(of) for file, of in keys.items()}

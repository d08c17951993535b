"""Where in a folder lies what another library saved of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from distckpt import layout, strict_json
from distckpt.errors import DamagedCheckpoint, NoCheckpoint
from distckpt.formats.dcp_native import METADATA, NativeFolder, is_of_single_ranks
from distckpt.formats.dcp_reading import Folder
from distckpt.formats.dcp_safetensors import SafetensorsFolder
from distckpt.stores.file_source import FileSource
from distckpt.stores.local import LocalStore

_SUFFIX = ".safetensors"
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_OF = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.safetensors")
_NUMBERED = re.compile(r"(?:step|checkpoint|global_step)[-_]?([0-9]{1,18})")
_FSDP = re.compile(r"pytorch_model_fsdp_[0-9]{1,4}")
_DEEPEST = 3
_INSIDE = ("sharded", "checkpoint")  # of DCP's safetensors beside what was made of them; of torchtitan


class LinkedStore(LocalStore):
    """A directory in which files may be links, as in the cache of Hugging Face."""

    @contextmanager
    def open(self, path: str) -> Iterator[FileSource]:
        place = self._at(path).resolve()
        with LocalStore(place.parent).open(place.name) as source:
            yield source


def find(path: Path) -> Folder:
    """What is at ``path`` or in a folder of it: of several steps, the newest that is whole. Its indexes were read.

    These are known: a folder of ``torch.distributed.checkpoint``, its own files or safetensors; that of torchtitan,
    of Accelerate and of the ``Trainer`` of transformers around it; a model as Hugging Face saves it.

    Raises:
        NoCheckpoint: where there is none, or it does not say which is meant.
        DamagedCheckpoint: naming the file, where it is not what it should be.
        OSError: where it cannot be read.
    """
    folder = _in(path)
    if folder is None:
        raise NoCheckpoint(
            f"{path} holds no committed checkpoint, and none of another library: neither {METADATA}, nor {_INDEX}, nor "
            f"{_WHOLE}, nor a step-<N> with one of these"
        )
    return open_folder(folder)


def open_folder(path: Path) -> Folder:
    """The checkpoint whose files lie there."""
    names = _names(path)
    store = LinkedStore(path)
    if METADATA in names:
        return NativeFolder(store)
    return SafetensorsFolder(store, _files(path, names, store))


def _in(path: Path, depth: int = 0) -> Path | None:
    names = _names(path) if depth <= _DEEPEST else []
    if layout.CLAIM in names or any(layout.rank_of(name) is not None for name in names):
        return None  # ours, and it was never committed
    if is_of_single_ranks(names):
        raise NoCheckpoint(
            f"{path} was saved with use_collectives=False: only its own ranks can read it. Save it without that"
        )
    if METADATA in names or any(name.endswith(_SUFFIX) for name in names):
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
    if {METADATA, _INDEX, _WHOLE} & set(names):
        return True
    return any(_FSDP.fullmatch(name) and METADATA in _names(path / name) for name in names)


def _number(name: str) -> int:
    match = _NUMBERED.fullmatch(name)
    return int(match[1]) if match else -1


def _names(path: Path) -> list[str]:
    return sorted(one.name for one in path.iterdir()) if path.is_dir() else []


def _files(path: Path, names: Sequence[str], store: LocalStore) -> Mapping[str, frozenset[str] | None]:
    """The safetensors files that are one model, and what of each is meant."""
    if _INDEX in names:
        return _indexed(path, store)
    if _WHOLE in names:
        return {_WHOLE: None}
    files = [name for name in names if name.endswith(_SUFFIX)]
    for name in files:
        if (match := _OF.fullmatch(name)) and not match[1].startswith("shard-"):
            count = int(match[3])
            wanted = [f"{match[1]}-{nth:05d}-of-{count:05d}{_SUFFIX}" for nth in range(1, min(count, 99_999) + 1)]
            if lost := [one for one in wanted if one not in names]:
                raise DamagedCheckpoint(f"{path}/{lost[0]} is missing: {name} is one of {count} files")
    if len(files) > 1 and not all(map(_OF.fullmatch, files)):
        folder = SafetensorsFolder(store, dict.fromkeys(files))
        if not folder.is_sharded:
            raise NoCheckpoint(f"{path} holds several models, say which file is meant: {', '.join(files[:20])}")
    return dict.fromkeys(files)


def _indexed(path: Path, store: LocalStore) -> Mapping[str, frozenset[str] | None]:
    what = f"{path}/{_INDEX}"
    try:
        lies_in = strict_json.take(strict_json.load(store.read(_INDEX), what), "weight_map", dict, what)
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from error
    keys: dict[str, set[str]] = {}
    for key, file in lies_in.items():
        if type(file) is not str or not file.endswith(_SUFFIX) or Path(file).name != file or "\0" in file:
            raise DamagedCheckpoint(f"{what}: {ascii(file)[:80]} is no safetensors file of this folder")
        keys.setdefault(file, set()).add(key)
    return {file: frozenset(of) for file, of in keys.items()}

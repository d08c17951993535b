"""Exports as a folder that ``from_pretrained`` of Hugging Face reads: safetensors files, their index, its config."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distckpt.formats import Image
from distckpt.formats.export_safetensors import keyed
from distckpt.formats.safetensors_layout import lay_out

_CONFIG = "config.json"
_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"

# What a model and its tokenizer are made from, as files; weights of whatever kind are others.
_SUFFIXES = {".json", ".txt", ".model", ".vocab", ".bpe", ".tiktoken", ".jinja", ".py"}
_OF_WEIGHTS, _OF_TRAINING = ".index.json", {"trainer_state.json", "manifest.json"}
_MOST_BYTES = 256 * 1024 * 1024  # of a tokenizer; the largest that are known have 40 MB


class HuggingFaceExport:
    """See `distckpt.exporting.Kind`.

    Args:
        max_shard_bytes: how large a file may become, but for a tensor that is larger by itself.
        config_from: a folder with a config, and perhaps a tokenizer, which are copied.
        dtype: what the config is to say that weights are of, if it says that at all.
    """

    is_folder = True
    takes_several = False
    names_parts = False
    leaves_out_values = True

    def __init__(self, max_shard_bytes: int, config_from: Path | None, dtype: torch.dtype | None) -> None:
        self._max_shard_bytes = max_shard_bytes
        self._copied = [] if config_from is None else _files_of(config_from, dtype)

    def lay_out(self, state: Any) -> list[Image]:
        # Which weights are tied is what the model knows: they are there once, and it ties them when they are loaded.
        tensors, _ = keyed(state)
        shards = _shards(tensors, self._max_shard_bytes)
        if len(shards) == 1:
            return [lay_out(_ONE_FILE, shards[0], {}), *self._copied]
        names = [f"model-{nth:05d}-of-{len(shards):05d}.safetensors" for nth in range(1, len(shards) + 1)]
        placed = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": sum(map(_size, tensors.values()))}, "weight_map": placed}
        files = [lay_out(name, shard, {}) for name, shard in zip(names, shards, strict=True)]
        return [*files, _text(_INDEX, json.dumps(index, indent=2).encode()), *self._copied]

    def is_one(self, place: Path) -> bool:
        if not place.is_dir():
            return False
        names = {one.name for one in place.iterdir()}
        is_checkpoint = "manifest.json" in names  # of ours, the full format of which has a file of the same name
        has_folders = any(one.is_dir() for one in place.iterdir())
        return not names or (not is_checkpoint and not has_folders and not names.isdisjoint({_ONE_FILE, _INDEX}))


def _shards(tensors: Mapping[str, Tensor], most_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        if shards[-1] and filled + _size(tensor) > most_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += _size(tensor)
    return shards


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _files_of(folder: Path, dtype: torch.dtype | None) -> list[Image]:
    """The files of ``folder`` that are copied.

    Raises:
        FileNotFoundError: where there is no config.
        ValueError: where that is no JSON.
    """
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(errno.ENOENT, "config_from should be a folder with a config.json", str(folder))
    return [
        _text(file.name, _config(file, dtype) if file.name == _CONFIG else file.read_bytes())
        for file in sorted(folder.iterdir())
        if _is_copied(file)
    ]


def _is_copied(file: Path) -> bool:
    return (
        file.suffix in _SUFFIXES
        and not file.name.startswith(".")
        and not file.name.endswith(_OF_WEIGHTS)
        and file.name not in _OF_TRAINING
        and file.is_file()
        and file.stat().st_size <= _MOST_BYTES
    )


def _config(file: Path, dtype: torch.dtype | None) -> bytes:
    """The config; where weights are cast and it says of which dtype they are, of that one."""
    data = file.read_bytes()
    try:
        config = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    told = [key for key in ("dtype", "torch_dtype") if isinstance(config, dict) and key in config]
    if dtype is None or not told:
        return data
    config |= dict.fromkeys(told, str(dtype).removeprefix("torch."))
    return json.dumps(config, indent=2).encode() + b"\n"


def _text(path: str, data: bytes) -> Image:
    return Image(path, len(data), texts=((0, data),))

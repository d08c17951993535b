"""The pickle in a file of ``torch.save``, read by nothing more than the restricted reader of
``torch.load(weights_only=True)``: no code of it ever runs."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np
import torch

from distckpt.errors import DamagedCheckpoint


class _History:
    """What ``HistoryBuffer`` of MMEngine holds, without its code."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.told = {
            "log_history": torch.as_tensor(state["_log_history"]),
            "count_history": torch.as_tensor(state["_count_history"]),
            "max_length": state["max_length"],
        }


def _no_function(*_: object) -> None:
    """A history of MMEngine names its statistics, which are code."""


# Names that files of stock MMEngine use, and what is built instead.
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_History, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_no_function, "builtins.getattr"),
    np.dtype,
    np.ndarray,
    *((np._core.multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),  # type: ignore[attr-defined]
    *((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # type: ignore[attr-defined]
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDSU"),
]


def unpickle(data: bytes, new_storage: Callable[[str, int], torch.UntypedStorage]) -> Any:
    """What the record ``data.pkl`` holds.

    Args:
        new_storage: makes what tensors lie in, once for each, from the name of its record and its size in bytes.

    Raises:
        whatever the reader makes of bytes that it should not have been given.
    """
    from torch import _weights_only_unpickler  # not public: whoever calls this can do without

    made: dict[str, torch.storage.TypedStorage] = {}

    def load(told: Any) -> torch.storage.TypedStorage:
        word, kind, name, _, count = told
        if word != "storage":
            raise ValueError(f"{ascii(word)[:80]} is no storage")
        if name not in made:
            dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
            storage = new_storage(name, count * dtype.itemsize)
            wrapped = {"wrap_storage": storage, "dtype": dtype, "_internal": True}
            made[name] = torch.storage.TypedStorage(**wrapped)  # type: ignore[no-untyped-call]
        return made[name]

    with torch.serialization.safe_globals(_STAND_INS):
        reader = _weights_only_unpickler.Unpickler(io.BytesIO(data), encoding="utf-8")
        reader.persistent_load = load  # type: ignore[method-assign]
        return reader.load()  # type: ignore[no-untyped-call]


def load(stream: IO[bytes], path: str) -> Any:
    """What the file of ``torch.save`` in ``stream`` holds, on the CPU.

    Raises:
        DamagedCheckpoint: naming ``path``, where it is none, or holds what only unpickling could read.
    """
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        why = _reason(error)
        raise DamagedCheckpoint(f"{path} cannot be read without running code that it names: {why}") from error
    except Exception as error:  # whatever its reader makes of bytes that are no file of torch.save
        raise DamagedCheckpoint(f"{path} is no whole file of torch.save: {_reason(error)}") from error


def to_plain(value: Any) -> Any:
    """``value`` with histories as the plain dicts that they hold."""
    if isinstance(value, _History):
        return value.told
    if isinstance(value, dict):
        for key, one in value.items():
            value[key] = to_plain(one)
        return value
    if type(value) in (list, tuple):
        return type(value)(to_plain(one) for one in value)
    return value


def _reason(error: Exception) -> str:
    """What is wrong, without what torch says of how to unpickle it all the same."""
    text = str(error)
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {named[1]}"
    return f"{type(error).__name__}: {text.splitlines()[0].split('. ')[0]}" if text else type(error).__name__

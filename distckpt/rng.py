"""The random number generators of one rank: of Python, NumPy, torch on the CPU, and the accelerator in use."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


def capture(*, host_only: bool = False) -> State:
    """The state of every global generator of this process, as plain values. Draws nothing.

    Args:
        host_only: leave out the accelerator's, which takes longest.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: State = {
        "python": {"version": version, "words": np.array(words, dtype=np.uint32).tobytes(), "gauss": gauss},
        "numpy": {
            "kind": str(kind),
            "keys": np.asarray(keys, dtype=np.uint32).tobytes(),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    for name, device in () if host_only else _accelerators().items():
        state[name] = device.get_rng_state().cpu().numpy().tobytes()
    return state


def apply(state: Mapping[str, Any]) -> list[str]:
    """The generators go on as they did where ``state`` was captured. The names of those that ``state`` does not know.

    Restore them last: making a data loader's iterator draws from them.
    """
    python = state["python"]
    words = tuple(int(word) for word in np.frombuffer(python["words"], dtype=np.uint32))
    random.setstate((python["version"], words, python["gauss"]))
    numpy = state["numpy"]
    keys = np.frombuffer(numpy["keys"], dtype=np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(_bytes_to_tensor(state["torch"]))
    unknown = []
    for name, device in _accelerators().items():
        if name in state:
            device.set_rng_state(_bytes_to_tensor(state[name]))
        else:
            unknown.append(name)
    return unknown


def _accelerators() -> dict[str, Any]:
    if not torch.accelerator.is_available():
        return {}
    name = torch.accelerator.current_accelerator()
    return {name.type: torch.get_device_module(name)} if name is not None else {}


def _bytes_to_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)

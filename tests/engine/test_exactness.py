"""What is saved is what was there, to the last bit, whatever the tensors are and however they are copied."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.trainings import Save, bits, spelled
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from distckpt.engine.stager import Stager
from distckpt.formats.known import get_format
from distckpt.formats.safetensors_file import DTYPES
from distckpt.formats.savable import is_savable

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore:ComplexHalf")]

EACH = [Phase.explicit, Phase.reuse, Phase.generate]  # to shrink a state takes longer than to read it
ARENA_BYTES = 2 * 1024 * 1024  # the least


def makes(dtype: torch.dtype) -> bool:
    """Whether torch has tensors of that type on the host."""
    try:
        return is_savable(torch.empty(2, dtype=dtype)) and torch.empty(2, dtype=dtype).nbytes > 0
    except (RuntimeError, NotImplementedError):
        return False


def copies(dtype: torch.dtype) -> bool:
    """Whether torch can copy tensors of that type that are not contiguous."""
    try:
        return bool(torch.empty(2, 2, dtype=dtype).t().contiguous().numel())
    except (RuntimeError, NotImplementedError):
        return False


ALL = sorted({one for one in vars(torch).values() if isinstance(one, torch.dtype)}, key=str)
with warnings.catch_warnings(action="ignore"):
    TYPES = [one for one in ALL if makes(one) and copies(one)]
    WHOLE_ONLY = [one for one in ALL if makes(one) and not copies(one)]


def of_bytes(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bytes at all: among floating point numbers, NaN of every kind."""
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    values = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, count * dtype.itemsize, dtype=np.uint8))
    return (values % 2 if dtype is torch.bool else values).view(dtype).view(shape)


VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda base: base,
    lambda base: base.transpose(0, -1) if base.dim() else base,
    lambda base: base[::2] if base.dim() else base,
    lambda base: base[..., 1:] if base.dim() else base,
    lambda base: base[1:] if base.dim() else base,
    lambda base: base.unsqueeze(0).expand(2, *base.shape),
    lambda base: base.contiguous(memory_format=torch.channels_last) if base.dim() == 4 else base,
    lambda base: base.flatten()[:1].expand(30_000) if base.numel() else base,
    lambda base: base.conj(),
    lambda base: base.conj().transpose(0, -1) if base.dim() else base,
    lambda base: base.conj().imag if base.dtype is torch.complex64 else base,
    lambda base: (
        base.view(torch.uint8)
        if base.dim() and base.stride(-1) == 1 and base.numel() and not (base.is_conj() or base.is_neg())
        else base
    ),
]


def views_of(base: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """Of a type that safetensors has no word for, the format itself makes plain bytes before the engine sees it."""
    return VIEWS if base.dtype in DTYPES else VIEWS[:1]


SHAPES = st.one_of(
    st.lists(st.sampled_from([0, 1, 2, 3, 7]), max_size=4),
    st.sampled_from([[9_000], [70_001], [300, 200], [2, 3, 100, 100], [700_003]]),
).map(tuple)

TENSORS = st.builds(of_bytes, st.sampled_from(TYPES), SHAPES, st.integers(0, 2**31)).flatmap(
    lambda base: st.sampled_from(views_of(base)).map(lambda view: view(base))
)


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    """A part, some of whose tensors stand in two places, and some read the memory of others in another way."""
    tensors = draw(st.lists(TENSORS, min_size=1, max_size=6))
    named = {f"first.{nth}": one for nth, one in enumerate(tensors)}
    for nth, one in enumerate(draw(st.lists(st.sampled_from(tensors), max_size=3))):
        named[f"again.{nth}"] = draw(st.sampled_from(views_of(one)))(one)
    return named


def everything_late(stager: Stager, state: dict[str, Any]) -> None:
    """As if each of them were an optimizer's."""
    places = {(one.data_ptr(), one.nbytes) for one in state.values()}
    stager._guard.guarded = lambda: places


@pytest.mark.parametrize(
    ("format", "mode"),
    [("full", "eager"), ("full", "lazy"), ("full", "bounded"), ("pth", "eager"), ("pth", "bounded")],
)
@settings(max_examples=30, deadline=None, phases=EACH, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tensor_is_saved_as_it_reads(format, mode, data, scratch, small_blocks):
    state = data.draw(states())
    if mode == "bounded":
        state["filler"] = of_bytes(torch.float32, (ARENA_BYTES // 4, 2), 1)
    expected = spelled({"part": state})
    stager = Stager("lazy" if mode == "lazy" else "eager", arena_bytes=ARENA_BYTES if mode == "bounded" else None)
    everything_late(stager, state)
    save = Save(stager, {"part": state}, scratch, format=get_format(format), is_written=True)
    written = save.write()
    assert spelled(save.read(written)) == expected
    if format == "full":
        check_by_safetensors(scratch / "saved" / "part.safetensors", state)
    assert mode != "bounded" or written.measures["arena_bytes"] == ARENA_BYTES
    stager.close()


def check_by_safetensors(place: Path, state: dict[str, Any]) -> None:
    """The stock reader finds each tensor that it knows the type of, or the one that it is tied to."""
    found = load_file(place)
    for key, tensor in state.items():
        if key in found:
            assert bits(found[key]) == bits(tensor)
            assert tensor.dtype not in DTYPES or found[key].dtype == tensor.dtype


@pytest.mark.parametrize("dtype", WHOLE_ONLY, ids=str)
def test_a_type_that_torch_can_only_hold_is_saved_as_it_lies(dtype, scratch):
    tensors = {str(nth): of_bytes(dtype, shape, nth) for nth, shape in enumerate([(), (3, 5), (300, 400)])}
    stager = Stager()
    save = Save(stager, {"part": tensors}, scratch)
    assert spelled(save.saved()) == spelled({"part": tensors})
    stager.close()

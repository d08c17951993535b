"""One pass through a file: wherever a tensor lies, and whoever else is beside it, it holds its bytes."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distckpt.formats import filling
from distckpt.formats.filling import SMALL_BYTES, Span, fill

LARGE = SMALL_BYTES + 8


class Memory:
    """Bytes as a source, which counts how often it was read from."""

    def __init__(self, data: bytes) -> None:
        self.size_bytes = len(data)
        self.calls = 0
        self._stream = io.BytesIO(data)

    def read_into(self, target: Any) -> None:
        self.calls += 1
        if self._stream.readinto(target) < len(target):
            raise EOFError("it ends too early")


def bits(tensor: Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def filled(data: bytes, *spans: tuple[int, list[Tensor]]) -> Memory:
    source, digest = Memory(data), xxhash.xxh3_128()
    fill(source, [Span(*one) for one in spans], digest)
    assert digest.hexdigest() == xxhash.xxh3_128_hexdigest(data), "each byte is hashed, in its order"
    return source


def turned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape[::-1], dtype=dtype).permute(tuple(range(len(shape)))[::-1])


def spread(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros((*shape, 2), dtype=dtype)[..., 1]


def inside(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.zeros(size + 3, dtype=dtype)[1 : 1 + size].view(shape)


def parameter(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=dtype.is_floating_point)


def conjugate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    zeros = torch.zeros(shape, dtype=dtype)
    return zeros.conj() if dtype.is_complex else zeros


PLACES = [turned, spread, inside, parameter, conjugate]
DTYPES = [torch.float64, torch.bfloat16, torch.float8_e5m2, torch.complex64, torch.int16, torch.uint8, torch.bool]
shapes = st.one_of(
    st.lists(st.integers(0, 4), max_size=4).map(tuple), st.sampled_from([(LARGE,), (3, LARGE // 8), (513, 2, 257)])
)
spans = st.tuples(st.sampled_from(DTYPES), shapes, st.lists(st.sampled_from(PLACES), max_size=3))


@settings(max_examples=120, deadline=None)
@given(st.lists(spans, max_size=12), st.integers(0, 9))
def test_every_tensor_holds_its_bytes_whatever_its_place(told, seed):
    laid = [
        (torch.Size(shape).numel() * dtype.itemsize, [make(shape, dtype) for make in places])
        for dtype, shape, places in told
    ]
    highest = 2 if any(dtype is torch.bool for dtype, *_ in told) else 256
    data = np.random.default_rng(seed).integers(0, highest, sum(size for size, _ in laid), np.uint8).tobytes()
    filled(data, *laid)
    begin = 0
    for size, targets in laid:
        for target in targets:
            assert bits(target) == data[begin : begin + size]
        begin += size


def test_what_lies_around_a_target_is_left_as_it_is():
    around = torch.zeros(2, LARGE + 6, dtype=torch.uint8)
    filled(b"\xff" * (LARGE + 3), (LARGE, [around[0, 3 : LARGE + 3]]), (3, [around[1, 3:6]]))
    assert around.count_nonzero() == LARGE + 3
    assert around[0, 3 : LARGE + 3].all() and around[1, 3:6].all()


def test_many_small_tensors_are_read_together():
    targets = [torch.zeros(16, dtype=torch.uint8) for _ in range(10_000)]
    source = filled(os.urandom(160_000), *((16, [one]) for one in targets))
    assert source.calls == 1


def test_more_small_tensors_than_are_read_at_once_are_read_in_turn():
    data = os.urandom(1000 * 16_384)
    targets = [torch.zeros(16_384, dtype=torch.uint8) for _ in range(1000)]
    assert filled(data, *((16_384, [one]) for one in targets)).calls > 1
    assert b"".join(map(bits, targets)) == data


def test_a_large_tensor_is_read_where_it_lies_and_nothing_else_takes_its_memory(monkeypatch):
    data = os.urandom(5 * LARGE)
    into = torch.zeros(len(data), dtype=torch.uint8)
    places = []
    real = Memory.read_into

    def noting(self: Memory, target: Any) -> None:
        places.append(torch.frombuffer(target, dtype=torch.uint8).data_ptr() - into.data_ptr())
        real(self, target)

    monkeypatch.setattr(Memory, "read_into", noting)
    filled(data, (len(data), [into]))
    assert places == list(range(0, len(data), filling._PIECE_BYTES))


@pytest.mark.parametrize("size", [8, LARGE // 8 * 8])
def test_autograd_sees_that_what_it_kept_has_changed(size):
    weight = torch.ones(size // 8, dtype=torch.float64, requires_grad=True)
    loss = (weight * weight).sum()
    filled(bytes(size), (size, [weight]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_file_that_ends_too_early_raises_what_the_source_does():
    with pytest.raises(EOFError, match="too early"):
        filled(bytes(7), (8, [torch.zeros(8, dtype=torch.uint8)]))


def test_what_cannot_be_read_where_it_lies_goes_by_way_of_the_scratch_memory(monkeypatch):
    """All that a device has, and here everything."""
    monkeypatch.setattr(filling, "_is_plain", lambda _: False)
    sizes = [3, 8, 2 * filling._SCRATCH_BYTES + 8, LARGE, 16]
    targets = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    data = os.urandom(sum(sizes))
    filled(data, *((size, [target, target.clone()]) for size, target in zip(sizes, targets, strict=True)))
    assert b"".join(map(bits, targets)) == data


@pytest.mark.gpu
@pytest.mark.parametrize("size", [8, LARGE, 3 * filling._SCRATCH_BYTES + 8])
def test_tensors_on_a_device_hold_their_bytes_beside_those_on_the_host(size):
    count = size // 8
    data = np.random.default_rng(0).integers(0, 256, 3 * count * 8 + 3, np.uint8).tobytes()
    places = [
        [torch.zeros(count, dtype=torch.int64, device="cuda"), torch.zeros(count, dtype=torch.int64)],
        [torch.zeros(3, dtype=torch.uint8, device="cuda")],
        [torch.zeros(count, 2, dtype=torch.int64, device="cuda")[:, 1]],
        [torch.zeros(2 * count, dtype=torch.float32, device="cuda").requires_grad_()],
    ]
    sizes = [count * 8, 3, count * 8, count * 8]
    filled(data, *zip(sizes, places, strict=True))
    begin = 0
    for size_bytes, targets in zip(sizes, places, strict=True):
        assert all(bits(target.cpu()) == data[begin : begin + size_bytes] for target in targets)
        begin += size_bytes

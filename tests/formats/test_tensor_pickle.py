"""The pickle of torch.save, with tensors by reference: what it holds, what it refuses, and what it remembers."""

from __future__ import annotations

import io
import threading
import warnings
import weakref
import zipfile
from collections import OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distckpt.formats import tensor_pickle
from distckpt.formats.tensor_pickle import TensorPickler

DTYPES = sorted({one for one in vars(torch).values() if isinstance(one, torch.dtype)}, key=str)


class Labelled(Tensor):
    """A subclass whose elements are in memory of its own."""


class Weight(nn.Parameter):
    """A subclass of parameters."""


class Holder:
    """An object that holds something."""

    def __init__(self, held: Any) -> None:
        self.held = held


def pickle_of_torch(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return zipfile.ZipFile(file).read("archive/data.pkl")


def is_savable_by_torch(dtype: torch.dtype) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.save(torch.empty(1, dtype=dtype), io.BytesIO())
    except (KeyError, RuntimeError):  # integers of fewer than 8 bits, and quantized ones
        return False
    return True


SAVABLE_DTYPES = [dtype for dtype in DTYPES if is_savable_by_torch(dtype)]


@pytest.mark.parametrize("dtype", SAVABLE_DTYPES, ids=str)
def test_a_tensor_of_any_dtype_is_pickled_as_torch_does(dtype):
    value = {"some": torch.empty(2, 3, dtype=dtype), "one": torch.empty((), dtype=dtype)}
    pickled = TensorPickler().pickle(value)
    assert pickled.data == pickle_of_torch(value)
    assert pickled.sizes == [6 * dtype.itemsize, dtype.itemsize]


def test_there_are_dtypes_of_both_kinds():
    assert {torch.float32, torch.bool, torch.uint16, torch.float8_e5m2, torch.complex32} <= set(SAVABLE_DTYPES)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"lr": 0.1, "step": 7, "big": 1 << 80, "text": "ü", "bytes": b"\0", "none": None, "flag": True},
        OrderedDict(b=1, a=[2, (3, {4}), frozenset({5}), deque([6], 7)]),
        defaultdict(list, {1: [2]}),
        [1 + 2j, torch.float32, torch.device("cpu"), torch.Size([1, 2]), np.float32(1.5), np.arange(3)],
        nn.BatchNorm1d(3).state_dict(),
        nn.Linear(2, 3),
        {"parameter": nn.Parameter(torch.ones(2)), "frozen": nn.Parameter(torch.ones(2), requires_grad=False)},
        {"learned": torch.ones(2, requires_grad=True)},
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_values_are_pickled_as_torch_does(value):
    assert TensorPickler().pickle(value).data == pickle_of_torch(value)


def test_a_subclass_is_saved_as_what_it_is_a_subclass_of():
    one = torch.ones(2)
    value = [one.as_subclass(Labelled), Weight(one.clone()), nn.Buffer(one.clone())]
    expected = [one, nn.Parameter(one.clone()), one.clone()]
    assert TensorPickler().pickle(value).data == pickle_of_torch(expected)


def test_tensors_are_those_that_were_given():
    weight, bias = torch.ones(2), nn.Parameter(torch.ones(3))
    tensors = TensorPickler().pickle({"weight": weight, "inner": [bias]}).tensors
    assert tensors[0] is weight and tensors[1] is bias


def test_tied_tensors_have_one_record_and_are_spelled_as_torch_does():
    fill = [torch.ones(1) for _ in range(11)]  # so that names have two digits
    base = torch.arange(6.0)
    value = [*fill, base, base.detach(), nn.Parameter(base), base[:], base]
    pickled = TensorPickler().pickle(value)
    assert len(pickled.tensors) == 12
    assert pickled.data == pickle_of_torch(value)


def test_views_that_read_the_same_memory_otherwise_have_records_of_their_own():
    base = torch.arange(6.0).view(2, 3)
    views = [base, base.t(), base.view(6), base[0], base.view(torch.int32), base[:, 1:]]
    assert TensorPickler().pickle([*views, *views]).sizes == [24, 24, 24, 12, 24, 16]


def test_tensors_without_elements_are_never_tied():
    base = torch.ones(2)
    assert TensorPickler().pickle([base[:0], base, base[:0], torch.empty(0), torch.empty(0)]).sizes == [0, 8, 0, 0, 0]


LATER = [
    {"step": 8, "a": torch.zeros(3), "b": torch.zeros(2, 2), "c": torch.zeros(3)},
    {"step": 300, "a": torch.zeros(3), "b": torch.zeros(2, 2), "c": torch.zeros(3)},
    {"step": 7, "a": torch.zeros(3), "b": torch.zeros(4), "c": torch.zeros(3)},
    {"step": 7, "a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.int32), "c": torch.zeros(3)},
    {"step": 7, "a": torch.zeros(3, requires_grad=True), "b": torch.zeros(2, 2), "c": torch.zeros(3)},
    {"step": 7, "a": nn.Parameter(torch.zeros(3)), "b": torch.zeros(2, 2), "c": torch.zeros(3)},
    {"step": 7, "b": torch.zeros(2, 2), "c": torch.zeros(3)},
    {"step": 7, "new": torch.zeros(3), "a": torch.zeros(3), "b": torch.zeros(2, 2), "c": torch.zeros(3)},
    {"step": 7, "a": (tied := torch.zeros(3)), "b": tied.detach(), "c": torch.zeros(3)},
    {"step": 7, "a": tied, "b": torch.zeros(2, 2), "c": tied.detach()},
    {"step": 7, "a": torch.zeros(0), "b": torch.zeros(2, 2), "c": torch.zeros(3)},
    {},
]


@pytest.mark.parametrize("later", LATER)
def test_what_is_remembered_of_one_value_never_shows_in_the_next(later):
    pickler = TensorPickler()
    first = {"step": 7, "a": torch.zeros(3), "b": torch.zeros(2, 2), "c": torch.zeros(3)}
    for value in (first, later, later, first):
        pickled = pickler.pickle(value)
        assert pickled.data == pickle_of_torch(value)
        assert pickled.sizes == [one.nbytes for one in pickled.tensors]


def test_what_is_the_same_again_is_not_spelled_anew(monkeypatch):
    spelled = []
    monkeypatch.setattr(tensor_pickle, "_told", lambda *of, told=tensor_pickle._told: spelled.append(of) or told(*of))
    pickler = TensorPickler()
    value = {"a": nn.Parameter(torch.zeros(1)), "b": torch.zeros(2), "c": [torch.zeros(3)]}
    assert pickler.pickle(value).data == pickler.pickle(value).data
    assert [shape for _, shape, *_ in spelled] == [(1,), (2,), (3,), (1,)]  # the one inside of a parameter each time


def test_a_refusal_is_forgotten():
    pickler = TensorPickler()
    value = {"a": torch.zeros(3), "b": torch.zeros(2)}
    pickler.pickle(value)
    with pytest.raises(TypeError):
        pickler.pickle({"a": torch.zeros(3), "b": torch.empty(2, device="meta")})
    assert pickler.pickle(value).data == pickle_of_torch(value)


def test_no_tensor_is_kept():
    pickler = TensorPickler()
    tensor = torch.ones(3)
    pickler.pickle([tensor, tensor[1:]])
    known = weakref.ref(tensor)
    del tensor
    assert known() is None


REFUSED = {
    "tensor": (lambda: torch.empty(3, device="meta"), "it is a Tensor of torch.float32, torch.strided, on meta"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "it is a Tensor of torch.float32, torch.sparse_coo"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "it is a Tensor of torch.float32"),
    "lazy": (lambda: nn.LazyLinear(3).weight, "it has no shape yet"),
    "storage": (lambda: torch.ones(3).untyped_storage(), "it is a UntypedStorage, which is no tensor"),
    "typed": (lambda: torch.FloatStorage(3), "it is a TypedStorage, which is no tensor"),
    "function": (lambda: lambda: None, "Can't pickle"),
    "lock": (lambda: threading.Lock(), "cannot pickle"),
    "object": (lambda: Holder(torch.empty(3, device="meta")), "a tensor inside of it cannot be held whole"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("make", "told"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_saved_is_refused_by_its_place(make, told):
    value = make()
    cyclic: dict[str, Any] = {"fine": [torch.ones(1), 1]}
    cyclic["itself"] = cyclic
    for state in ({"a": cyclic, "opt": {0: (1, {"x": value})}}, {"a": cyclic, "opt": deque([1, {0: [5, value]}])}):
        with pytest.raises(TypeError, match=rf"^opt\.(0\.1\.x|1\.0\.1) cannot be saved: .*{told}"):
            TensorPickler().pickle(state)


def test_what_is_refused_on_its_own_is_this_value():
    with pytest.raises(TypeError, match="^this value cannot be saved: it is a Tensor"):
        TensorPickler().pickle(torch.empty(3, device="meta"))


def test_what_stands_at_no_place_is_refused_too():
    with pytest.raises(TypeError, match="^this state cannot be saved: "):
        TensorPickler().pickle({"a": 1, (lambda: None): 2})

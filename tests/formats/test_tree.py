"""State taken apart into JSON and tensors, and put together again: types, bits and the order of keys stay."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler

from distckpt import strict_json
from distckpt.formats import tree

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FLOAT8S = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]
COMPLEX = [torch.complex32, torch.complex64, torch.complex128]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]
DTYPES = [*FLOATS, *FLOAT8S, *COMPLEX, *INTEGERS, *UNSIGNED, torch.bool]
ARRAYS = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]


def found_in(tensors: dict[str, Tensor]) -> Callable[[tree.Reference], Any]:
    """What a reference means where these are the tensors of a file."""

    def find(reference: tree.Reference) -> Any:
        tensor = tensors[reference.key]
        if reference.dtype is not None:
            tensor = tensor.view(reference.dtype).reshape(reference.shape)
        return tensor.numpy() if reference.is_array else tensor

    return find


def through_json(value: Any) -> Any:
    told, tensors, _ = tree.encode(value, "part")
    text = strict_json.dump({"state": told})
    return tree.decode(strict_json.load(text, "state")["state"], found_in(tensors))


def spelled(value: Any) -> Any:
    """``value`` with its types and bits spelled out, so that ``==`` compares both, and NaN equals NaN."""
    if isinstance(value, Tensor):
        plain = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return ["tensor", str(value.dtype), list(value.shape), plain.view(torch.uint8).tolist()]
    if isinstance(value, np.ndarray):
        return ["array", value.dtype.str, list(value.shape), value.tobytes()]
    if isinstance(value, dict):
        return [type(value).__name__, [[spelled(key), spelled(one)] for key, one in value.items()]]
    if isinstance(value, (set, frozenset)):
        return [type(value).__name__, sorted(map(repr, map(spelled, value)))]
    if isinstance(value, deque):
        return ["deque", value.maxlen, spelled(list(value))]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, [spelled(one) for one in value]]
    return [type(value).__name__, repr(value)]


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bits at all, NaNs and denormals among them."""
    size = math.prod(shape) * dtype.itemsize
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), generator=torch.Generator().manual_seed(seed))
    return data.to(torch.uint8).view(dtype).reshape(shape)


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
tensors = st.builds(filled, st.sampled_from(DTYPES), shapes, st.integers(0, 9))
arrays = st.builds(lambda kind, shape: np.ones(shape, kind), st.sampled_from(ARRAYS), shapes)
hashable = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=4), st.floats(allow_nan=False), st.binary(max_size=4)
)
keys = st.one_of(hashable, st.tuples(hashable, hashable), st.sampled_from(["a.b", "$tensor", "$", "key", "0", "", "a"]))
leaves = st.one_of(
    hashable,
    st.floats(),
    st.sampled_from(DTYPES),
    st.sampled_from([torch.device("cpu"), torch.device("cuda", 1)]),
    shapes.map(torch.Size),
    st.sets(hashable, max_size=3),
    st.frozensets(hashable, max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=3).map(Counter),
    arrays,
    tensors,
)


def grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dicts = st.dictionaries(keys, inner, max_size=4)
    lists = st.lists(inner, max_size=3)
    deques = st.builds(deque, lists, st.one_of(st.none(), st.integers(0, 4)))
    return st.one_of(dicts, dicts.map(OrderedDict), lists, lists.map(tuple), deques)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@settings(max_examples=300, deadline=None)
@given(st.recursive(leaves, grown, max_leaves=8))
def test_what_comes_back_is_what_was_stored(value):
    assert spelled(through_json(value)) == spelled(value)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_each_type_keeps_its_bits_and_its_shape(dtype):
    flat = filled(dtype, (12,), 0)
    state = {
        "flat": flat,
        "scalar": flat[3],
        "empty": flat[:0],
        "turned": flat.view(3, 4).T,
        "stepped": flat[::5],
        "deep": flat.view(1, 3, 2, 2),
    }
    assert spelled(through_json(state)) == spelled(state)


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_of_each_type_keeps_its_bits_and_its_shape(kind):
    flat = np.arange(12).astype(kind)
    read_only = flat.copy()
    read_only.flags.writeable = False
    state = {"flat": flat, "scalar": flat[3:4].reshape(()), "empty": flat[:0], "turned": flat.reshape(3, 4).T}
    state["read only"] = read_only
    assert spelled(through_json(state)) == spelled(state)


@pytest.mark.parametrize(
    ("number", "plain"),
    [
        (np.float32(0.1), float(np.float32(0.1))),
        (np.float64("nan"), math.nan),
        (np.int64(-3), -3),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.bool_(True), True),
        (np.str_("é"), "é"),
        (bytearray(b"\0"), b"\0"),
    ],
)
def test_what_has_a_plain_twin_comes_back_as_that(number, plain):
    assert spelled(through_json({"here": number})) == spelled({"here": plain})


def test_a_defaultdict_comes_back_as_a_dict():
    assert spelled(through_json(defaultdict(list, {3: [1]}))) == spelled({3: [1]})


def test_keys_of_tensors_are_their_places():
    _, found, _ = tree.encode(
        {"weight": torch.zeros(2), "state": {0: {"m": torch.ones(1)}}, "many": [torch.ones(3)]}, "p"
    )
    assert sorted(found) == ["many.0", "state.0.m", "weight"]


def test_tensors_whose_places_are_spelled_alike_stay_apart():
    one, two, three = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])
    state = {"a": {"b": one, 0: two, "0": three}, "a.b": two, "": one, "value": three, "__metadata__": two}
    assert spelled(through_json(state)) == spelled(state)
    _, found, _ = tree.encode(state, "part")
    assert "__metadata__" not in found, "a safetensors header has that key for itself"


def test_a_tensor_in_several_places_is_stored_once_and_comes_back_as_one():
    weight = torch.randn(3)
    state = {"a": weight, "b": [weight.detach()], "part of it": weight[:2], "equal": weight.clone()}
    told, found, aliases = tree.encode(state, "part")
    assert sorted(found) == ["a", "equal", "part of it"] and aliases == {"b.0": "a"}
    back = tree.decode(told, found_in(found))
    assert back["a"] is back["b"][0] and spelled(back) == spelled(state)


class Colour(IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [object(), lambda: None, 1j, Colour.RED, range(3), np.complex64(1j), np.longdouble(1), np.datetime64("2020-01-01"),
     np.timedelta64(3, "ns"), np.array([object()]), np.array([1], dtype=np.longdouble), np.array(["a"]),
     np.array([1], dtype=">i4"), np.array([1], dtype="m8[ns]"), np.ma.masked_array([1, 2], [0, 1]), nn.Identity()],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)  # fmt: skip
def test_a_value_that_needs_a_pickle_is_refused_by_its_place(value):
    for state in ({"a": {3: [0, value]}}, {"a": {3: {"x", 1}}, "b": [{"c": (value,)}]}):
        with pytest.raises(TypeError, match=r"part\.(a\.3\.1|b\.0\.c\.0) is a .* cannot be stored without a pickle"):
            tree.encode(state, "part")


@pytest.mark.parametrize(
    "told",
    [
        {"$unknown": 1},
        {"$tensor": "nowhere"},
        {"$tensor": ["bytes", "torch.float64", [1]]},
        {"$tensor": ["bytes", "torch.uint8", [4]]},
        {"$tensor": ["bytes", "torch.uint8", [-1, -1]]},
        {"$tensor": ["bytes", "torch.uint8", [2**70]]},
        {"$tensor": ["bytes", "torch.nothing", [3]]},
        {"$tensor": ["bytes", "torch.uint8"]},
        {"$tensor": None},
        {"$tensor": {}},
        {"$numpy": "bf16"},
        {"$numpy": 3},
        {"$tuple": 3},
        {"$tuple": "abc"},
        {"$list": []},
        {"$set": [[1]]},
        {"$size": ["three"]},
        {"$size": [2**70]},
        {"$dict": [[1]]},
        {"$dict": [[[], 1]]},
        {"$dict": {"ab": 1}},
        {"$ordered": 3},
        {"$deque": []},
        {"$deque": [None, 3]},
        {"$deque": ["a", [1]]},
        {"$deque": [-1, [1]]},
        {"$deque": [2**70, [1]]},
        {"$counter": ["a"]},
        {"$float": "much"},
        {"$float": 3},
        {"$bytes": "no base 64!"},
        {"$bytes": "é"},
        {"$bytes": 3},
        {"$dtype": "torch.Tensor"},
        {"$dtype": "float32"},
        {"$device": "nowhere"},
        {"$device": {}},
    ],
    ids=json.dumps,
)
def test_json_that_was_not_written_by_us_is_refused(told):
    there = {"bytes": torch.zeros(3, dtype=torch.uint8), "bf16": torch.zeros(3, dtype=torch.bfloat16)}
    for state in (told, {"a": [told]}):
        with pytest.raises(ValueError):
            tree.decode(state, found_in(there))


def test_json_nested_without_end_is_refused():
    told: Any = 1
    for _ in range(100_000):
        told = [told]
    with pytest.raises(ValueError, match="no state of ours"):
        tree.decode(told, found_in({}))


KINDS = ["tensor", "numpy", "tuple", "size", "set", "frozenset", "deque", "float", "bytes", "dtype", "device", "dict"]
KINDS += ["ordered", "counter"]
words = st.one_of(st.text(max_size=5), st.sampled_from(["k", "torch.int8"]))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=2),
        st.builds(lambda kind, one: {f"${kind}": one}, st.sampled_from(KINDS), inner),
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(anything)
def test_any_json_is_read_or_refused_with_a_value_error(told):
    with contextlib.suppress(ValueError):
        tree.decode(told, found_in({"k": torch.zeros(3, dtype=torch.uint8)}))


def trained(make: Any, **words: Any) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[1].parameters()}]
    optimizer = make(model.parameters() if make is torch.optim.LBFGS else groups, **words)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = model(torch.randn(5, 3)).square().mean()
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(loss)
    return optimizer


OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd, a tensor lr": (torch.optim.SGD, {"lr": torch.tensor(0.1)}),
    "adagrad": (torch.optim.Adagrad, {}),
    "nadam": (torch.optim.NAdam, {}),
    "adafactor": (torch.optim.Adafactor, {}),
    "lbfgs": (torch.optim.LBFGS, {"lr": 0.1}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_an_optimizer_comes_back_as_it_was(name):
    make, words = OPTIMIZERS[name]
    state = trained(make, **words).state_dict()
    assert spelled(through_json(state)) == spelled(state)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 3, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.StepLR(o, 2)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
}


def test_every_scheduler_of_torch_is_tried():
    there = {
        name
        for name in lr_scheduler.__all__
        if name not in ("LRScheduler", "_LRScheduler") and isinstance(getattr(lr_scheduler, name), type)
    }
    assert there <= SCHEDULERS.keys()


def scheduled(name: str) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = trained(torch.optim.SGD, lr=0.1, momentum=0.9)
    return optimizer, SCHEDULERS[name](optimizer)


def rates_after(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
    for step in range(steps):
        optimizer.step()
        scheduler.step(*[1.0 + step] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_restored_scheduler_goes_on_as_the_one_that_was_stored(name):
    optimizer, scheduler = scheduled(name)
    rates_after(optimizer, scheduler, 3)
    stored = through_json({"scheduler": scheduler.state_dict(), "optimizer": optimizer.state_dict()})
    expected = rates_after(optimizer, scheduler, 4)

    optimizer, scheduler = scheduled(name)
    optimizer.load_state_dict(stored["optimizer"])
    scheduler.load_state_dict(stored["scheduler"])
    assert rates_after(optimizer, scheduler, 4) == expected


def test_the_state_of_a_grad_scaler_and_of_an_averaged_model_comes_back_as_it_was():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    averaged = torch.optim.swa_utils.AveragedModel(nn.BatchNorm1d(2), use_buffers=True)
    averaged.update_parameters(nn.BatchNorm1d(2))
    for part in (scaler, torch.amp.GradScaler("cpu", enabled=False), averaged):
        assert spelled(through_json(part.state_dict())) == spelled(part.state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128).conj(),
        lambda: torch.tensor([1 + 2j, 3 - 4j, 5j], dtype=torch.complex128)[::3],
        lambda: torch.arange(6).to(torch.complex128).view(2, 3).t(),
        lambda: torch.empty(0, 2, dtype=torch.complex128).conj(),
    ],
    ids=["conjugate", "one element of a stride", "turned", "empty"],
)
def test_what_lies_there_as_bytes_lies_there_as_it_reads(make):
    tensor = make()
    _, found, _ = tree.encode({"a": tensor}, "part")
    assert torch.equal(found["a"].view(tensor.dtype).view(tensor.shape), tensor)

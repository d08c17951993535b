"""The copy of a rank's state: whole, on the host, and out of training's reach."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from distckpt.snapshot import Stager


def spelled(value: Any) -> Any:
    """``value`` with its types spelled out, so that ``==`` compares them too."""
    if isinstance(value, Tensor):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, dict):
        return [type(value).__name__, [[key, spelled(one)] for key, one in value.items()]]
    if isinstance(value, (list, tuple, deque)):
        return [type(value).__name__, getattr(value, "maxlen", None), [spelled(one) for one in value]]
    return [type(value).__name__, repr(value)]


def state() -> dict[str, Any]:
    weight = torch.arange(6.0).view(2, 3)
    return {
        "weight": weight,
        "turned": weight.T,
        "tied": weight,
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 2),
        "list": [torch.ones(2), [1, 2]],
        "tuple": (torch.zeros(1), "text"),
        "ordered": OrderedDict(b=torch.ones(1), a=2),
        "counter": Counter(a=2, b=0),
        "deque": deque([torch.ones(2), 3], maxlen=5),
        "array": np.arange(3),
        "none": None,
        7: {"nested": torch.tensor([True])},
    }


def test_a_copy_is_equal_in_values_and_types():
    assert spelled(Stager().copy({"part": state()})) == spelled({"part": state()})


def test_a_defaultdict_becomes_a_dict():
    assert spelled(Stager().copy({"part": defaultdict(list, {1: [2]})})) == spelled({"part": {1: [2]}})


def test_what_training_changes_later_does_not_reach_the_copy():
    live = state()
    copied = Stager().copy({"part": live})["part"]
    live["weight"].add_(1)
    live["list"][0].zero_()
    live["list"][1].append(3)
    live["list"].append(4)
    live["ordered"]["c"] = 1
    live["counter"]["a"] += 1
    live["deque"][0].zero_()
    live["deque"].append(5)
    live["array"] += 1
    live[7]["nested"].logical_not_()
    live["new"] = 1
    assert spelled(copied) == spelled(state())


def test_a_copy_needs_no_gradient_and_leaves_those_of_the_parameters():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    copied = Stager().copy({"model": {"weight": parameter, "result": parameter * 2}})["model"]
    assert not copied["weight"].requires_grad and not copied["result"].requires_grad
    assert type(copied["weight"]) is Tensor
    assert parameter.requires_grad and parameter.grad is not None


def test_tensors_that_are_tied_are_copied_once_over_all_parts():
    model = {"embedding": torch.ones(3), "head": torch.ones(3)}
    model["head"] = model["embedding"]
    copied = Stager().copy({"model": model, "ema": {"shadow": model["embedding"]}})
    assert copied["model"]["embedding"] is copied["model"]["head"] is copied["ema"]["shadow"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda base: base, lambda base: base.T),
        (lambda base: base[0], lambda base: base[:, 0]),
        (lambda base: base, lambda base: base.view(torch.int64)),
        (lambda base: torch.complex(base, base), lambda base: torch.complex(base, base).conj()),
    ],
)
def test_views_of_the_same_memory_that_read_otherwise_are_copied_each(one, other):
    base = torch.arange(4.0, dtype=torch.float64).view(2, 2)
    values = {"one": one(base), "other": other(base)}
    copied = Stager().copy({"part": values})["part"]
    assert spelled(copied) == spelled(values)


def test_views_that_are_lazily_conjugate_or_negative_are_copied_as_they_read():
    base = torch.tensor([1 + 2j, 3 - 4j])
    values = {"plain": base, "conjugate": base.conj(), "imag": base.imag, "negative": base.conj().imag}
    copied = Stager().copy({"part": values})["part"]
    assert spelled(copied) == spelled(values)


def test_the_second_copy_uses_the_memory_of_the_first():
    stager = Stager()
    first = stager.copy({"part": {"a": torch.zeros(3), "b": [torch.zeros(2)]}})["part"]
    second = stager.copy({"part": {"a": torch.ones(3), "b": [torch.ones(2)]}})["part"]
    assert first["a"].data_ptr() == second["a"].data_ptr()
    assert first["b"][0].data_ptr() == second["b"][0].data_ptr()
    assert second["a"].tolist() == [1.0] * 3 and second["b"][0].tolist() == [1.0] * 2


def test_a_tensor_of_another_shape_or_type_gets_other_memory():
    stager = Stager()
    stager.copy({"part": {"a": torch.zeros(3), "b": torch.zeros(3)}})
    changed = {"a": torch.ones(4), "b": torch.ones(3, dtype=torch.int32)}
    assert spelled(stager.copy({"part": changed})["part"]) == spelled(changed)


def test_memory_of_what_left_the_state_is_let_go():
    stager = Stager()
    gone = stager.copy({"part": {"a": torch.zeros(3), "b": torch.zeros(3)}})["part"]["b"]
    stager.copy({"part": {"a": torch.zeros(3)}})
    back = stager.copy({"part": {"a": torch.zeros(3), "b": torch.zeros(3)}})["part"]["b"]
    assert back.data_ptr() != gone.data_ptr()


def test_tensors_whose_places_are_spelled_alike_never_share_memory():
    values = {
        "a": {"b": torch.tensor([1.0])},
        "a.b": torch.tensor([2.0]),
        1: torch.tensor([3.0]),
        "1": torch.tensor([4.0]),
    }
    stager = Stager()
    for _ in range(3):
        assert spelled(stager.copy({"part": values})["part"]) == spelled(values)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
        (lambda: torch.empty(3, device="meta"), "meta"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "jagged"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "qint8"),
        (lambda: TwoTensor(torch.ones(3), torch.zeros(3)), "TwoTensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_cannot_be_copied_whole_is_refused_by_its_place(make, told):
    with pytest.raises(TypeError, match=rf"^extra\.list\.1\.inner cannot be saved: .*{told}"):
        Stager().copy({"extra": {"list": [0, {"inner": make()}]}})


def test_a_parameter_that_has_no_shape_yet_is_refused_by_its_place():
    with pytest.raises(TypeError, match=r"^model\.weight cannot be saved: it has no shape yet"):
        Stager().copy({"model": nn.LazyLinear(3).state_dict()})


def test_tensors_in_containers_of_other_kinds_are_refused_by_their_place_too():
    with pytest.raises(TypeError, match=r"^extra\.queue\.1 cannot be saved"):
        Stager().copy({"extra": {"queue": deque([1, torch.empty(3, device="meta")])}})


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_tensor_that_is_sharded_over_ranks_is_refused_by_its_place(one_rank):
    sharded = dist.tensor.distribute_tensor(torch.ones(4), one_rank, [dist.tensor.Shard(0)])
    with pytest.raises(TypeError, match=r"^model\.layer\.weight is sharded over ranks \(a DTensor\)"):
        Stager().copy({"model": {"layer.weight": sharded}})


def test_a_copy_that_failed_leaves_the_next_one_whole():
    stager = Stager()
    stager.copy({"part": {"a": torch.zeros(2)}})
    with pytest.raises(TypeError):
        stager.copy({"part": {"a": torch.ones(2), "b": torch.empty(3, device="meta")}})
    assert spelled(stager.copy({"part": {"a": torch.full((2,), 2.0)}})["part"]) == spelled({"a": torch.full((2,), 2.0)})

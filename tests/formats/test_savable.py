"""What can lie in a file whole is told from what cannot, and what is tied from what only looks alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from distckpt.formats.savable import check_savable, identity, is_savable


class Labelled(Tensor):
    """A subclass whose elements are in memory of its own."""


def freed() -> Tensor:
    """A tensor as FSDP1 leaves it when it has freed its memory."""
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(3)


SAVABLE = {
    "plain": lambda: torch.ones(3),
    "scalar": lambda: torch.tensor(1),
    "without elements": lambda: torch.empty(0, 3),
    "parameter": lambda: nn.Parameter(torch.ones(3)),
    "buffer": lambda: nn.Buffer(torch.ones(3)),
    "view": lambda: torch.ones(3, 4).t()[1:, ::2],
    "expanded": lambda: torch.ones(1).expand(3),
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "subclass": lambda: torch.ones(3).as_subclass(Labelled),
}

REFUSED = {
    "sparse_coo": lambda: torch.eye(3).to_sparse(),
    "Tensor of torch.float32, torch.sparse_coo": lambda: torch.empty(0, 3).to_sparse(),
    "sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "meta": lambda: torch.empty(3, device="meta"),
    "on meta": lambda: torch.empty(0, device="meta"),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "Tensor of torch.float32, torch.strided": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "qint8": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "TwoTensor": lambda: TwoTensor(torch.ones(3), torch.zeros(3)),
    "mkldnn": lambda: torch.ones(3).to_mkldnn(),
    "FakeTensor": fake,
    "Tensor of torch.float32": freed,
}


@pytest.mark.parametrize("make", SAVABLE.values(), ids=SAVABLE)
def test_what_has_memory_of_its_own_can_be_saved(make):
    assert is_savable(make())
    check_savable(make(), "model.weight")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("told", "make"), REFUSED.items(), ids=[f"{nth}-{told}" for nth, told in enumerate(REFUSED)])
def test_what_has_none_is_refused_by_its_place(told, make):
    assert not is_savable(make())
    with pytest.raises(TypeError, match=rf"^extra\.list\.1 cannot be saved: it is a .*{told}"):
        check_savable(make(), "extra.list.1")


def test_a_parameter_that_has_no_shape_yet_is_refused():
    weight = nn.LazyLinear(3).weight
    assert not is_savable(weight)
    with pytest.raises(TypeError, match=r"^model\.weight cannot be saved: it has no shape yet"):
        check_savable(weight, "model.weight")


def test_a_tensor_inside_of_a_transform_of_functions_is_refused():
    def look(tensor: Tensor) -> Tensor:
        assert not is_savable(tensor)
        return tensor

    torch.func.vmap(look)(torch.ones(3, 2))


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("make", [lambda: torch.ones(4), lambda: nn.Parameter(torch.ones(4)), lambda: torch.empty(0)])
def test_a_tensor_that_is_sharded_over_ranks_is_refused(one_rank, make):
    sharded = dist.tensor.distribute_tensor(make(), one_rank, [dist.tensor.Shard(0)])
    assert not is_savable(sharded)
    with pytest.raises(TypeError, match=r"^model\.layer\.weight is sharded over ranks \(a DTensor\)"):
        check_savable(sharded, "model.layer.weight")


BASE = torch.arange(4.0, dtype=torch.float64).view(2, 2)
COMPLEX = torch.complex(BASE, BASE)


@pytest.mark.parametrize(
    "other",
    [BASE.detach(), BASE[:], nn.Parameter(BASE), BASE.view(4).view(2, 2)],
    ids=["detached", "slice", "parameter", "view"],
)
def test_what_reads_the_same_memory_the_same_way_is_tied(other):
    assert identity(other) == identity(BASE)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (BASE, BASE.clone()),
        (BASE, BASE.T),
        (BASE, BASE.view(4)),
        (BASE, BASE.view(torch.int64)),
        (BASE[0], BASE[0, :1]),
        (BASE[0], BASE[1]),
        (BASE[0], BASE[:, 0]),
        (COMPLEX, COMPLEX.conj()),
        (COMPLEX.imag, COMPLEX.conj().imag),
    ],
)
def test_what_reads_other_memory_or_otherwise_is_not(one, other):
    assert identity(one) != identity(other)

"""Whoever changes a tensor without a word while it is copied is found out.

These are the writers of the research whom nobody asks before; the others stand in test_waiting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engine.trainings import WIDTH, Save, Training, adam, saved_beside, spelled
from torch import nn

from distckpt.engine.stager import Stager
from distckpt.errors import DistckptError

pytestmark = pytest.mark.timeout(60)


def fill_storage(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().copy_(torch.ones_like(tensor).untyped_storage())


@torch.no_grad()
def fill_one_in_the_middle(tensor: torch.Tensor) -> None:
    tensor[WIDTH // 2, WIDTH // 2] = 7


@torch.no_grad()
def fill_in_inference(tensor: torch.Tensor) -> None:
    with torch.inference_mode():
        tensor.fill_(1)


SILENT: dict[str, Callable[[torch.Tensor], object]] = {
    "p.data.add_": lambda tensor: tensor.data.add_(1),
    "p.data[:] =": lambda tensor: tensor.data.__setitem__(slice(None), 1),
    "the first row of p.data": lambda tensor: tensor.data[0].fill_(1),
    "the last row of p.data": lambda tensor: tensor.data[-1].fill_(1),
    "foreach of p.data": lambda tensor: torch._foreach_add_([tensor.data], 1),
    "out=p.data": lambda tensor: torch.ones(WIDTH, WIDTH, out=tensor.data),
    "numpy": lambda tensor: tensor.detach().numpy().fill(1),
    "dlpack": lambda tensor: torch.from_dlpack(tensor.detach()).fill_(1),
    "untyped_storage": fill_storage,
    "set_(storage)": lambda tensor: torch.empty(0).set_(tensor.untyped_storage()).fill_(1),
    "nn.init": lambda tensor: nn.init.ones_(tensor),
    "one element, under no_grad": fill_one_in_the_middle,
    "a view of an alias": lambda tensor: tensor.detach().view(-1)[5000:5001].fill_(1),
    "inference_mode": fill_in_inference,
    "_foreach_copy_": lambda tensor: torch._foreach_copy_([tensor.detach()], [torch.ones(WIDTH, WIDTH)]),
}


@pytest.mark.parametrize("how", SILENT)
@pytest.mark.parametrize("what", ["a parameter", "a moment"])
def test_a_silent_change_is_found_before_the_next_step(what, how, lazy, held, tmp_path, caplog):
    training = Training()
    save = Save(lazy, training.state(), tmp_path)
    parameter = training.weight
    SILENT[how](parameter if what == "a parameter" else training.optimizer.state[parameter]["exp_avg"])
    now = spelled(training.state())
    assert now != spelled(save.cut)
    training.step()
    named = "weight of model.safetensors" if what == "a parameter" else "state.0.exp_avg of optimizer.safetensors"
    assert [record.getMessage().split(" changed while")[0] for record in caplog.records] == [named]
    written = save.write()
    assert spelled(save.read(written)) == now and written.measures["retakes"] == 1


@pytest.mark.parametrize("how", SILENT)
def test_a_silent_change_is_found_where_no_step_follows(how, lazy, held, tmp_path):
    training = Training()
    save = Save(lazy, training.state(), tmp_path)
    SILENT[how](training.weight)
    with pytest.raises(DistckptError, match=r"^weight of model\.safetensors changed while it was being copied"):
        save.write()


SHRINKS: dict[str, Callable[[torch.Tensor], object]] = {
    "set_": lambda tensor: tensor.set_(torch.ones(3)),
    "resize_": lambda tensor: tensor.resize_(3),
    "a storage without memory": lambda tensor: tensor.untyped_storage().resize_(0),
    "a storage that is too small": lambda tensor: tensor.untyped_storage().resize_(tensor.nbytes // 2),
}


@pytest.mark.parametrize("how", SHRINKS)
@pytest.mark.parametrize("ends", ["at a step", "at the end"])
def test_a_tensor_that_lost_its_memory_is_not_read_beyond_it(how, ends, lazy, held, tmp_path):
    training = Training()
    save = Save(lazy, training.state(), tmp_path)
    SHRINKS[how](training.optimizer.state[training.weight]["exp_avg"])
    if ends == "at a step":
        lazy.wait_staged()
    with pytest.raises(DistckptError, match=r"^state.0.exp_avg of optimizer.safetensors was given other memory"):
        save.write()
    training.optimizer.state.clear()
    training.step()
    save = Save(lazy, training.state(), tmp_path)
    training.step()
    assert spelled(save.saved()) == spelled(save.cut)


def test_an_embedding_that_a_forward_renorms_is_found(lazy, held, tmp_path, caplog):
    grows = nn.Embedding(WIDTH, WIDTH, max_norm=1.0)
    training = Training(lambda parameters: torch.optim.SGD(parameters, lr=1e4, maximize=True), grows, torch.arange(3))
    save = Save(lazy, training.state(), tmp_path)
    training.backward()
    now = spelled(training.state())
    training.optimizer.step()
    assert "weight of model.safetensors changed" in caplog.text
    assert now != spelled(save.cut) and spelled(save.saved()) == now


@pytest.mark.parametrize("collective", ["broadcast", "all_reduce"])
def test_a_collective_is_found(collective, held, tmp_path, run_ranks):
    def work(rank: int, folder: str) -> str:
        training = Training()
        stager = Stager("lazy")
        training.step()
        save = Save(stager, training.state(), Path(folder) / str(rank))
        if collective == "broadcast":
            dist.broadcast(training.weight.data if rank else torch.ones(WIDTH, WIDTH), 0)
        else:
            dist.all_reduce(training.weight.data)
        with contextlib.suppress(DistckptError):
            return str(save.write().measures)
        return save.staged._failure.args[0]

    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    told = run_ranks(2, work, str(tmp_path))
    assert told[1].startswith("weight of model.safetensors changed while it was being copied")
    assert collective == "broadcast" or told[0] == told[1]


TENSORS = ("weight", "exp_avg", "exp_avg_sq")  # in the order in which they are copied


def tensors_of(training: Training) -> dict[str, torch.Tensor]:
    return {"weight": training.weight, **training.optimizer.state[training.weight]}


@pytest.mark.parametrize("ends", ["at a step", "at the end"])
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("changed", [(one,) for one in TENSORS] + [TENSORS[:2], TENSORS[1:], TENSORS])
def test_a_change_in_the_middle_of_a_copy_is_before_it_or_found(changed, at, ends, lazy, paused, tmp_path):
    """Copied before it was changed, a tensor is as it was; where only some are, the save is taken again or fails."""
    training = Training(lambda parameters: adam(parameters, fused=True))
    pause = paused(at)
    save = Save(lazy, training.state(), tmp_path)
    if at < len(TENSORS):
        assert pause.reached.wait(20)
    else:
        save.staged._late.wait()
    for name in changed:
        tensors_of(training)[name].data.add_(1)
    is_before = all(TENSORS.index(name) < at for name in changed)
    now = spelled(training.state())
    pause.go.set()
    if ends == "at a step":
        training.step()
        assert spelled(save.saved()) == (spelled(save.cut) if is_before else now)
    elif is_before:
        assert spelled(save.saved()) == spelled(save.cut)
    else:
        with pytest.raises(DistckptError, match=" changed while it was being copied"):
            save.write()


@pytest.fixture
def paranoid() -> Iterator[Stager]:
    stager = Stager("paranoid")
    yield stager
    stager.close()


@pytest.mark.parametrize("row", range(0, WIDTH, 13))
def test_where_every_byte_is_compared_one_element_is_found(row, paranoid, paused, tmp_path):
    training = Training()
    pause = paused(1)
    save = Save(paranoid, training.state(), tmp_path)
    assert pause.reached.wait(20)
    training.weight.detach().numpy()[row, row] += 1  # which the copy does not have any more
    pause.go.set()
    with pytest.raises(DistckptError, match=r"^weight of model\.safetensors changed"):
        save.write()


def test_where_every_byte_is_compared_a_training_that_waits_is_never_blamed(paranoid, held, tmp_path, caplog):
    training = Training(lambda parameters: adam(parameters, fused=True))
    for nth in range(3):
        (tmp_path / str(nth)).mkdir()
        save = Save(paranoid, training.state(), tmp_path / str(nth))
        assert saved_beside(save, training.step, training)
    assert caplog.records == []

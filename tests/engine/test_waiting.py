"""Who changes what is being copied waits, or changes what was copied at once, or what is not saved any more.

The writers of the research whom nobody asks stand in test_torn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine.trainings import WIDTH, Save, Training, adam, bits, saved_beside, spelled
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distckpt import Checkpointer
from distckpt.engine.stager import Stager

pytestmark = pytest.mark.timeout(60)


def optimizer(kind: str, **words: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: getattr(torch.optim, kind)(parameters, **words)


KINDS = ("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")
OPTIMIZERS = {
    **{kind: optimizer(kind, foreach=False) for kind in KINDS},
    **{f"{kind} foreach": optimizer(kind, foreach=True) for kind in KINDS},
    **{f"{kind} fused": optimizer(kind, fused=True) for kind in ("Adagrad", "Adam", "AdamW")},
    "Adam amsgrad fused": optimizer("Adam", amsgrad=True, fused=True),
    "SGD": optimizer("SGD", lr=0.1),
    "SGD momentum": optimizer("SGD", lr=0.1, momentum=0.9, foreach=False),
    "SGD momentum foreach": optimizer("SGD", lr=0.1, momentum=0.9, foreach=True),
    "SGD momentum fused": optimizer("SGD", lr=0.1, momentum=0.9, fused=True),
    "RMSprop momentum": optimizer("RMSprop", momentum=0.9),
    "Muon": optimizer("Muon"),
    "LBFGS": optimizer("LBFGS", lr=0.1, max_iter=2),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_waits(kind, lazy, held, tmp_path):
    training = Training(OPTIMIZERS[kind])
    training.closure()
    save = Save(lazy, training.state(), tmp_path)
    assert saved_beside(save, training.step, training)
    assert held.begun == 1 and save.late >= {"weight"}


def test_an_optimizer_of_ones_own_waits(lazy, held, tmp_path):
    class Sign(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                parameter.data.sub_(parameter.grad.sign(), alpha=0.1)

    training = Training(Sign)
    assert saved_beside(Save(lazy, training.state(), tmp_path), training.step, training)


def test_optimizers_in_a_backward_wait(lazy, held, tmp_path):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False))
    training = Training(model=model)
    each = {one: adam([one], fused=True) for one in model.parameters()}

    def step(parameter: nn.Parameter) -> None:
        each[parameter].step()
        parameter.grad = None

    for one in model.parameters():
        one.register_post_accumulate_grad_hook(step)
    training.backward()

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), **{f"of_{n}": one.state_dict() for n, one in enumerate(each.values())}}

    save = Save(lazy, state(), tmp_path)
    assert save.late == {"0.weight", "1.weight", "state.0.exp_avg", "state.0.exp_avg_sq"}
    training.backward()
    assert spelled(state()) != spelled(save.cut)
    assert spelled(save.saved()) == spelled(save.cut)


def test_an_optimizer_under_a_scaler_waits(lazy, held, tmp_path):
    training = Training(lambda parameters: adam(parameters, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)

    def step() -> None:
        training.optimizer.zero_grad()
        scaler.scale(training.model(training.batch).square().mean()).backward()
        scaler.unscale_(training.optimizer)
        scaler.step(training.optimizer)
        scaler.update()

    step()
    assert saved_beside(Save(lazy, training.state(), tmp_path), step, training)


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_of_several_optimizers_waits_for_what_all_change(first, lazy, held, tmp_path):
    pair = Training(), Training(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    state = {f"{name}_{nth}": one.state()[name] for nth, one in enumerate(pair) for name in ("model", "optimizer")}
    save = Save(lazy, state, tmp_path)
    pair[first].step()
    held.go.set()
    pair[1 - first].weight.data.add_(1)  # nobody asks before, but nothing is being copied any more
    assert spelled(save.saved()) == spelled(save.cut)


def test_the_barrier_waits_for_what_another_thread_is_copying(lazy, paused, tmp_path, monkeypatch):
    training = Training(lambda parameters: adam(parameters, fused=True))
    pause = paused(0)
    save = Save(lazy, training.state(), tmp_path)
    assert pause.reached.wait(20)
    late, wait = save.staged._late, save.staged._late.wait
    monkeypatch.setattr(late, "wait", lambda: (pause.go.set(), wait()))
    assert saved_beside(save, training.step, training)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["AdamW", "AdamW foreach", "AdamW fused", "SGD momentum fused"])
def test_an_optimizer_of_a_device_waits(kind, lazy, tmp_path):
    model = nn.Linear(WIDTH, 100_000, bias=False, device="cuda")
    training = Training(OPTIMIZERS[kind], model, torch.randn(2, WIDTH, device="cuda"))
    assert saved_beside(Save(lazy, training.state(), tmp_path), training.optimizer.step, training)


def test_a_forked_child_changes_what_is_its_own_and_waits_for_nobody(paused, tmp_path, run_ranks):
    """The thread that copies is none of its own, and what it copies neither."""
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    lazy = Stager("lazy", modules=[model])
    training = Training(model=model)
    pause = paused(0)
    save = Save(lazy, training.state(), tmp_path)
    assert pause.reached.wait(20)

    def change(_: int) -> None:
        training.step()
        model.load_state_dict({"weight": torch.zeros(WIDTH, WIDTH)})

    run_ranks(1, change, seconds=20.0)
    pause.go.set()
    assert saved_beside(save, training.step, training)
    lazy.close()


def test_accumulated_gradients_make_nobody_wait(lazy, held, tmp_path):
    training = Training()
    save = Save(lazy, training.state(), tmp_path)
    for _ in range(3):
        training.backward()
    assert not save.staged._late.is_done, "a backward waited"
    assert saved_beside(save, training.optimizer.step, training)


def test_the_ranks_of_a_data_parallel_training_wait(held, tmp_path, run_ranks):
    def work(rank: int, folder: str) -> None:
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
        training = Training(lambda parameters: adam(parameters, fused=True), model)
        training.model = DistributedDataParallel(model)
        training.batch = torch.randn(4, WIDTH) + rank
        with Checkpointer(folder, training.parts(), snapshot="lazy", sync_buffers=False) as ckpt:
            training.step()
            ckpt.step()
            ckpt.save()
            cut = copy.deepcopy({"model": model.state_dict(), "optimizer": training.optimizer.state_dict()})
            training.step()
            assert spelled(training.optimizer.state_dict()) != spelled(cut["optimizer"])
            ckpt.wait()
            assert held.begun == (rank == 0)
            if rank == 0:
                found = load_file(f"{folder}/step-00000001/model.safetensors")
                assert spelled(found) == spelled({key: cut["model"][key] for key in found}) and len(found) == 7
                found = load_file(f"{folder}/step-00000001/optimizer.safetensors")
                assert bits(found["state.0.exp_avg_sq"]) == bits(cut["optimizer"]["state"][0]["exp_avg_sq"])

    run_ranks(2, work, str(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_waits(lazy, held, tmp_path):
    training = Training(lambda parameters: adam(parameters, foreach=True))
    step = torch.compile(training.optimizer.step, backend="eager")
    step()
    assert saved_beside(Save(lazy, training.state(), tmp_path), step, training)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("of", ["the module", "a module in it"])
def test_load_state_dict_of_a_module_waits(of, strict, held, tmp_path):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    lazy = Stager("lazy", modules=[model])
    training = Training(model=model)
    save = Save(lazy, training.state(), tmp_path)
    other = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    of_whom, of_other = (model, other) if of == "the module" else (model[0], other[0])
    assert saved_beside(save, lambda: of_whom.load_state_dict(of_other.state_dict(), strict=strict), training)
    lazy.close()


def test_whoever_asks_before_a_change_may_change_anything(lazy, held, tmp_path):
    training = Training()
    save = Save(lazy, training.state(), tmp_path)
    lazy.wait_staged()
    assert saved_beside(save, lambda: training.weight.data.zero_(), training)


# What takes the place of a tensor leaves the old one, which is what is saved.

SWAPS: dict[str, Callable[[Training], object]] = {
    "p.data = new": lambda training: setattr(training.weight, "data", torch.ones(WIDTH, WIDTH)),
    "module.double()": lambda training: training.model.double(),
    "vector_to_parameters": lambda training: nn.utils.vector_to_parameters(
        torch.ones(WIDTH * WIDTH), training.model.parameters()
    ),
    "swap_tensors": lambda training: torch.utils.swap_tensors(training.weight, nn.Parameter(torch.ones(WIDTH, WIDTH))),
    "load_state_dict(assign=True)": lambda training: training.model.load_state_dict(
        {"weight": torch.ones(WIDTH, WIDTH)}, assign=True
    ),
    "optimizer.load_state_dict": lambda training: training.optimizer.load_state_dict(
        {**training.optimizer.state_dict(), "state": {0: {"step": torch.tensor(9.0), "exp_avg": torch.ones(3)}}}
    ),
    "a new moment": lambda training: training.optimizer.state[training.weight].update(exp_avg=torch.ones(WIDTH, WIDTH)),
}


@pytest.mark.parametrize("how", SWAPS)
def test_what_takes_the_place_of_a_tensor_is_not_saved(how, lazy, held, tmp_path):
    training = Training()
    save = Save(lazy, training.state(), tmp_path)
    assert saved_beside(save, lambda: SWAPS[how](training), training)


# What a forward changes, or what no optimizer is known to change, is copied before training goes on.


class Forward(nn.Module):
    """Each of its buffers is large, and changed by a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH, bias=False))
        self.norm = nn.BatchNorm1d(20_000)
        self.instance_norm = nn.InstanceNorm1d(WIDTH, track_running_stats=True)
        self.register_buffer("seen", torch.zeros(WIDTH, WIDTH))

    def forward(self, batch):
        self.seen += 1
        found = self.linear(batch)
        self.norm(found.repeat(1, 20_000 // WIDTH))
        return self.instance_norm(found.unsqueeze(-1).repeat(1, 1, 4))


def test_what_a_forward_changes_is_copied_at_once(lazy, held, tmp_path):
    training = Training(model=Forward())
    save = Save(lazy, training.state(), tmp_path)
    assert save.late & set(dict(training.model.named_buffers())) == set()
    assert saved_beside(save, training.closure, training)


def test_a_moving_average_is_copied_at_once(lazy, held, tmp_path):
    training = Training()
    average = torch.optim.swa_utils.AveragedModel(training.model, use_buffers=True)
    state = {**training.state(), "average": average.state_dict()}
    save = Save(lazy, state, tmp_path)
    average.update_parameters(training.model)
    average.update_parameters(training.model)
    for one in average.parameters():
        one.data.zero_()
    assert save.late == {"weight", "state.0.exp_avg", "state.0.exp_avg_sq"}
    assert spelled(save.saved()) == spelled(save.cut)


def test_what_is_frozen_or_of_an_optimizer_that_took_no_step_is_copied_at_once(lazy, held, tmp_path):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False))
    model[1].requires_grad_(False)
    training = Training(model=model)
    idle = nn.Linear(WIDTH, WIDTH)
    unknown = adam(idle.parameters())
    state = {**training.state(), "idle": idle.state_dict(), "unknown": unknown.state_dict()}
    assert Save(lazy, state, tmp_path).late == {"0.weight", "state.0.exp_avg", "state.0.exp_avg_sq"}


def test_small_tensors_are_copied_at_once(lazy, held, tmp_path):
    training = Training(model=nn.Sequential(nn.Linear(WIDTH, 100), nn.Linear(100, WIDTH)))
    save = Save(lazy, training.state(), tmp_path)
    training.weight.data.zero_()
    assert not save.late and not held.begun
    assert spelled(save.saved()) == spelled(save.cut)

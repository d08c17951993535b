"""One stager takes all snapshots of a rank: which of them are lazy, what they hold, and how one follows another."""

from __future__ import annotations

import copy
import gc
import io
import os
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engine.trainings import Background, Minded, Save, Training, spelled, state_of
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.two_tensor import TwoTensor

from distckpt.engine.stager import Stager
from distckpt.errors import DistckptError
from distckpt.formats import Snapshot
from distckpt.formats.full import FORMAT
from distckpt.stores.local import LocalStore

pytestmark = pytest.mark.timeout(60)


# What is copied late


def late_of(stager: Stager, folder: Path) -> set[str]:
    training = Training()  # whose optimizer lives for as long as it may be asked for
    return Save(stager, training.state(), folder).late


def test_an_eager_snapshot_leaves_nothing_for_later(eager, tmp_path):
    assert late_of(eager, tmp_path) == set()


@pytest.mark.parametrize("mode", ["lazy", "paranoid"])
def test_a_lazy_snapshot_leaves_what_optimizers_change(mode, made, tmp_path):
    assert late_of(made(mode), tmp_path) == {"weight", "state.0.exp_avg", "state.0.exp_avg_sq"}


@pytest.mark.parametrize(("threads", "cores", "is_lazy"), [(1, 2, True), (2, 2, False), (2, 1, False), (3, 8, True)])
def test_a_snapshot_is_lazy_by_itself_where_training_leaves_cores_to_it(
    threads, cores, is_lazy, made, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert bool(late_of(made("auto"), tmp_path)) == is_lazy


# What a snapshot holds


def mixed() -> dict[str, Any]:
    weight = torch.arange(6.0).view(2, 3)
    return {
        "weight": weight,
        "turned": weight.T,
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 2),
        "large": torch.arange(50_000),
        "list": [torch.ones(2), [1, 2]],
        "tuple": (torch.zeros(1), "text"),
        "ordered": OrderedDict(b=torch.ones(1), a=2),
        "counter": Counter(a=2, b=0),
        "deque": deque([torch.ones(2), 3], maxlen=5),
        "array": np.arange(3),
        "none": None,
        7: {"nested": torch.tensor([True])},
    }


def listed(value: Any) -> Any:
    """With arrays and deques as lists."""
    if isinstance(value, dict):
        return type(value)((key, listed(one)) for key, one in value.items()) if type(value) is not Counter else value
    if isinstance(value, deque):
        return [value.maxlen, [listed(one) for one in value]]
    if isinstance(value, (list, tuple)):
        return type(value)(listed(one) for one in value)
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_what_training_changes_later_does_not_reach_it(mode, made, tmp_path):
    live = mixed()
    save = Save(made(mode), {"part": live}, tmp_path)
    for one in (live["weight"], live["scalar"], live["list"][0], live["deque"][0], live["large"]):
        one.add_(1)
    live["list"][1].append(3)
    live["list"].append(4)
    live["ordered"]["c"] = 1
    live["counter"]["a"] += 1
    live["deque"].append(5)
    live["array"] += 1
    live[7]["nested"].logical_not_()
    live["new"] = 1
    assert spelled(listed(save.saved()["part"])) == spelled(listed(mixed()))


def test_parameters_are_saved_as_values_and_keep_their_gradients(eager, tmp_path):
    parameter = nn.Parameter(torch.ones(300, 300))
    parameter.grad = torch.ones(300, 300)
    values = {"weight": parameter.detach(), "turned": parameter.detach().t(), "result": parameter.detach() * 2}
    images = FORMAT.lay_out(
        Snapshot({"model": {"weight": parameter, "turned": parameter.t(), "result": parameter * 2}}), 0
    )
    staged = eager.take(images)
    staged.stage()
    (tmp_path / "saved").mkdir()
    staged.write(LocalStore(tmp_path), "saved")
    assert spelled(load_file(tmp_path / "saved/model.safetensors")) == spelled(values)
    assert parameter.requires_grad and parameter.grad is not None


def test_tensors_that_are_tied_are_staged_and_written_once(eager, tmp_path):
    weight = torch.rand(300, 300)
    save = Save(eager, {"model": {"embedding": weight, "head": weight, "alias": weight.detach()}}, tmp_path)
    written = save.write()
    assert [one.keys for one in written.tensors] == [("embedding",)]
    assert sum(one.size_bytes for one in written.files) < 1.1 * weight.nbytes
    assert spelled(save.read(written)) == spelled(save.cut)


REFUSED: list[tuple[Callable[[], torch.Tensor], str]] = [
    (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
    (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
    (lambda: torch.empty(3, device="meta"), "meta"),
    (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "jagged"),
    (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "qint8"),
    (lambda: TwoTensor(torch.ones(3), torch.zeros(3)), "TwoTensor"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("make", "told"), REFUSED)
def test_a_tensor_that_cannot_be_copied_whole_is_refused_by_its_place(make, told, eager, tmp_path):
    with pytest.raises(TypeError, match=rf"^extra\.list\.1\.inner cannot be saved: .*{told}"):
        Save(eager, {"extra": {"list": [0, {"inner": make()}]}}, tmp_path)


def test_a_parameter_that_has_no_shape_yet_is_refused_by_its_place(eager, tmp_path):
    with pytest.raises(TypeError, match=r"^model\.weight cannot be saved: it has no shape yet"):
        Save(eager, {"model": nn.LazyLinear(3).state_dict()}, tmp_path)


def test_a_tensor_that_is_sharded_over_ranks_is_refused_by_its_place(eager, tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        sharded = dist.tensor.distribute_tensor(torch.ones(4), mesh, [dist.tensor.Shard(0)])
        with pytest.raises(TypeError, match=r"^model\.layer\.weight is sharded over ranks \(a DTensor\)"):
            Save(eager, {"model": {"layer.weight": sharded}}, tmp_path)
    finally:
        dist.destroy_process_group()


def test_a_refusal_leaves_the_next_one_whole(eager, tmp_path):
    with pytest.raises(TypeError):
        Save(eager, {"part": {"a": torch.ones(2), "b": torch.empty(3, device="meta")}}, tmp_path)
    save = Save(eager, {"part": {"a": torch.full((2,), 2.0)}}, tmp_path)
    assert spelled(save.saved()) == spelled(save.cut)


# The next save


def test_what_was_changed_once_is_copied_at_once_from_then_on(lazy, held, tmp_path):
    training = Training()
    for _ in range(2):
        save = Save(lazy, training.state(), tmp_path)
        training.weight.data.add_(1)
        training.step()
        save.write()
    assert save.late == {"state.0.exp_avg", "state.0.exp_avg_sq"}
    save = Save(lazy, training.state(), tmp_path)
    training.weight.data.add_(1)
    assert spelled(save.saved()) == spelled(save.cut)


def test_one_of_the_same_name_in_another_file_is_still_copied_late(lazy, held, tmp_path):
    training, other = Training(), Training()
    state = {"model": training.model.state_dict(), "other": other.model.state_dict()}
    for _ in range(2):
        save = Save(lazy, state, tmp_path)
        training.weight.data.add_(1)
        training.step()
        save.write()
    assert save.late == {"weight"}


# The end


def test_what_is_being_copied_when_it_is_closed_is_given_up(held, tmp_path):
    stager = Stager("lazy")
    training = Training()
    save = Save(stager, training.state(), tmp_path, is_written=True)
    stager.close()
    with pytest.raises(DistckptError, match="given up"):
        save.writing.result()
    training.step()


def test_closed_twice_it_is_closed(made):
    stager = made()
    stager.reserve(1)
    stager.close()
    stager.close()


def test_a_stager_that_nobody_closed_lets_its_memory_and_its_hook_go(tmp_path):
    stager = Stager("lazy")
    Save(stager, Training().state(), tmp_path).write()
    memory = StorageWeakRef(stager._arena.memory.untyped_storage())
    del stager
    gc.collect()
    assert memory.expired()


# Two of them, and modules meanwhile


def test_two_stagers_take_snapshots_of_one_training(made, held, tmp_path):
    first, second = made("lazy"), made("paranoid")
    training = Training()
    for name in "ab":
        (tmp_path / name).mkdir()
    saves = [Save(first, training.state(), tmp_path / "a"), Save(second, training.state(), tmp_path / "b")]
    assert first._arena is not second._arena and all(save.late for save in saves)
    training.step()
    for save in saves:
        assert spelled(save.saved()) == spelled(save.cut)


def test_a_module_is_as_it_was_once_a_step_was_taken(held, made, tmp_path):
    training = Training(model=nn.Sequential(nn.Linear(160, 160, bias=False)))
    stager = made("lazy", modules=[training.model])
    training.step()
    save = Save(stager, training.state(), tmp_path)
    assert save.late and training.model[0]._load_state_dict_pre_hooks
    training.step()
    assert not any(one._load_state_dict_pre_hooks for one in training.model.modules())


@pytest.mark.parametrize("duplicate", ["torch.save", "deepcopy"])
def test_a_module_can_be_copied_while_it_is_saved(duplicate, held, made, tmp_path):
    training = Training(model=nn.Sequential(nn.Linear(160, 160, bias=False)))
    stager = made("lazy", modules=[training.model])
    training.step()
    save = Save(stager, training.state(), tmp_path)
    assert save.late
    if duplicate == "deepcopy":
        other = copy.deepcopy(training.model)
    else:
        file = io.BytesIO()
        torch.save(training.model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)  # a whole module is a pickle, of ours here
    other.load_state_dict({"0.weight": torch.zeros(160, 160)})
    assert not save.staged._late.is_done, "the load of another module has waited"
    assert spelled(training.model.state_dict()) == spelled(save.cut["model"])
    assert spelled(save.saved()) == spelled(save.cut)


# A writer that is slow, or fails


def test_released_while_it_is_copied_it_writes_nothing_into_the_next(lazy, paused, tmp_path):
    training = Training()
    pause = paused(1)
    save = Save(lazy, training.state(), tmp_path)
    assert pause.reached.wait(20)
    releasing = Background(save.staged.release)
    assert not releasing.ended(0.05)
    pause.go.set()
    releasing.result()
    following = Save(lazy, state_of(5), tmp_path)
    assert spelled(following.saved()) == spelled(following.cut)


def test_taken_again_the_files_that_were_begun_are_written_again(lazy, held, tmp_path, caplog):
    is_written = threading.Semaphore(0)

    class Counted(Minded):
        @contextmanager
        def create(self, path: str) -> Iterator[Minded]:
            with super().create(path) as sink:
                yield sink
            is_written.release()

    training, store = Training(), Counted(tmp_path)
    save = Save(lazy, training.state(), tmp_path, store=store, is_written=True)
    training.weight.data.add_(1)
    held.go.set()
    names = ["model.safetensors", "optimizer.safetensors", "state.json", "rank-00000.json"]
    for _ in names:
        assert is_written.acquire(timeout=20)
    now = spelled(training.state())
    training.step()
    assert spelled(save.saved()) == now
    each = [f"saved/{name}" for name in names]
    assert store.operations == [f"{what} {one}" for what in ("create", "delete", "create") for one in each]

"""Ranks whose state is not built alike, or is not any more what it was at the save before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from sharded_programs import Holder, adamw, differing, mesh_of, running, told, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from distckpt import RankFailure, SaveFailed, StateMismatch

# Pipeline stages: each rank has other layers, and an optimizer of its own


class Stage(nn.Module):
    def __init__(self, numbers: list[int]) -> None:
        super().__init__()
        torch.manual_seed(1 + sum(numbers))
        self.layers = nn.ModuleDict({str(number): nn.Linear(4, 4) for number in numbers})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x).tanh()
        return x


def step(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def stage(numbers: list[int], lr: float | Tensor) -> dict[str, Any]:
    model = Stage(numbers)
    return {"model": model, "optim": torch.optim.AdamW(model.parameters(), lr=lr)}


def save_stages(rank: int, out: str, numbers: list[list[int]]) -> dict[str, np.ndarray]:
    """Of each stage, another learning rate, which is a tensor."""
    state = stage(numbers[rank], torch.tensor([0.125, 0.25][rank]))
    step(**renamed(state), steps=rank + 1)
    with running(out, state) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)
    return told(state["model"], state["optim"])


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    return {"model": state["model"], "optimizer": state["optim"]}


def restore_stages(rank: int, out: str, numbers: list[list[int]]) -> tuple[dict[str, np.ndarray], list[float]]:
    state = stage(numbers[rank], 0.5)
    with running(out, state) as ckpt:
        ckpt.resume()
    return told(state["model"], state["optim"]), [float(group["lr"]) for group in state["optim"].param_groups]


STAGES = [[0, 1], [2, 3]]


def test_the_stages_of_a_pipeline_are_all_saved_and_come_back_each_to_its_rank(run_ranks, tmp_path):
    expected = run_ranks(2, save_stages, str(tmp_path / "run"), STAGES)
    found = run_ranks(2, restore_stages, str(tmp_path / "run"), STAGES)
    assert [differing(one, saved) for (one, _), saved in zip(found, expected, strict=True)] == [[], []]
    assert [lrs for _, lrs in found] == [[0.125], [0.25]]


def test_stages_may_be_cut_otherwise_and_no_rank_misses_what_another_has(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    expected = run_ranks(2, save_stages, out, STAGES)
    for numbers in ([[0, 1], [2], [3]], [[2, 3], [0, 1]]):
        found = run_ranks(len(numbers), restore_stages, out, numbers)
        together = {key: one for tensors, _ in found for key, one in tensors.items()}
        assert differing(together, expected[0] | expected[1]) == []


def restore_whole(rank: int, out: str, has_one_group: bool) -> tuple[dict[str, np.ndarray], list[float]]:
    """In one process, whose optimizer has a group for each stage, or one for all."""
    model = Stage([0, 1, 2, 3])
    one, two, three, four = (list(layer.parameters()) for layer in model.layers.values())
    groups = [{"params": [*one, *two]}, {"params": [*three, *four]}]
    optimizer = adamw(model) if has_one_group else torch.optim.AdamW(groups, lr=0.5)
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        ckpt.resume()
    return told(model, optimizer), [float(group["lr"]) for group in optimizer.param_groups]


def misses(rank: int, out: str, has_one_group: bool) -> str:
    with pytest.raises(StateMismatch) as raised:
        restore_whole(rank, out, has_one_group)
    return str(raised.value)


def test_one_process_reads_all_stages(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    first, second = run_ranks(2, save_stages, out, STAGES)
    ((found, lrs),) = run_ranks(1, restore_whole, out, False)
    assert differing(found, first | second) == [] and lrs == [0.125, 0.25]
    (told_by,) = run_ranks(1, misses, out, True)
    assert "optim.lr of the group of layers.0.weight (a tensor of layers.0.weight, a tensor of layers.2.w" in told_by


def with_a_counter(rank: int, count: int) -> dict[str, Holder]:
    """What is no tensor on the last rank alone: a part, and a key in one."""
    is_last = rank == dist.get_world_size() - 1
    part = {"a": numbers(0), "inner": {"count": count} if is_last else {}}
    return {"part": Holder(part)} | ({"counter": Holder({"count": count + 1})} if is_last else {})


def save_with_a_counter(rank: int, out: str) -> None:
    state = with_a_counter(rank, 3)
    with running(out, state) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)


def restore_with_a_counter(rank: int, out: str) -> Any:
    state = with_a_counter(rank, 0)
    with running(out, state) as ckpt:
        ckpt.resume()
    return {name: {key: str(one) for key, one in part.tensors.items()} for name, part in state.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_only_one_rank_has_is_saved_even_if_it_is_no_tensor(run_ranks, tmp_path, ranks):
    out = str(tmp_path / "run")
    run_ranks(3, save_with_a_counter, out)
    assert len(list(Path(out).glob("step-*/rank-*.state.json"))) == 1
    found = run_ranks(ranks, restore_with_a_counter, out)[-1]
    assert found == {"part": {"a": "tensor([0., 1., 2.])", "inner": "{'count': 3}"}, "counter": {"count": "4"}}


def miss_a_layer(rank: int, out: str, numbers: list[list[int]]) -> str:
    with pytest.raises(StateMismatch) as raised:
        restore_stages(rank, out, numbers)
    return str(raised.value)


def test_a_layer_that_no_stage_has_any_more_is_named_on_all_ranks(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    run_ranks(2, save_stages, out, STAGES)
    for told_by in run_ranks(2, miss_a_layer, out, [[0, 1], [3]]):
        assert "4 in the checkpoint alone: model.layers.2.weight" in told_by and "optim.layers.2.bias" in told_by
        assert "layers.3" not in told_by.partition("in the checkpoint alone: ")[2].split("; ")[0].replace(
            ", there is layers.3.weight", ""
        ).replace(", there is layers.3.bias", "")


def test_a_layer_that_only_one_stage_misses_is_named_on_all_ranks(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    run_ranks(2, save_stages, out, STAGES)
    for told_by in run_ranks(2, miss_a_layer, out, [[0, 1], [2, 3, 4]]):
        assert "rank 1: the checkpoint does not fit" in told_by and "model.layers.4.weight" in told_by


# A state that becomes another between two saves


def lies(out: str, number: int) -> dict[str, list[str]]:
    """Which files hold each tensor."""
    found: dict[str, list[str]] = {}
    for path in sorted((Path(out) / f"step-{number:08d}").glob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                found.setdefault(key, []).append(path.name)
    return found


def saves(rank: int, out: str, states: list[list[dict[str, Tensor]]]) -> list[tuple[bool, str]]:
    """Each rank saves its part of each state in turn: whether they are to agree anew after that, and what failed."""
    part = Holder({})
    found = []
    with running(out, {"part": part}) as ckpt:
        for state in states:
            part.tensors = state[rank]
            ckpt.step()
            try:
                ckpt.save(wait=True)
                failure = ""
            except (SaveFailed, RankFailure) as error:
                failure = str(error)
            found.append((ckpt._run._format.planner.is_due, failure))
    return found


def reads(rank: int, out: str, numbers: list[int]) -> list[dict[str, tuple[str, Any]]]:
    """All that was saved at each of these steps."""
    part, found = Holder(None), []
    with running(out, {"part": part}, save_last=False) as ckpt:
        for number in numbers:
            ckpt.resume(number)
            found.append({key: (str(one.dtype), one.tolist()) for key, one in part.tensors.items()})
    return found


def numbers(begin: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(begin, begin + 3).to(dtype)


def spelled(*states: dict[str, Tensor]) -> dict[str, tuple[str, Any]]:
    """What several ranks hold, together."""
    return {key: (str(one.dtype), one.tolist()) for state in states for key, one in state.items()}


def test_a_tensor_that_appears_on_some_ranks_is_saved_at_once_and_agreed_on_at_the_next_save(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    all_have, some_have, one_has = {"all": numbers(0)}, {"some": numbers(3)}, {"one": numbers(6)}
    states = [
        [all_have, all_have, all_have],
        [all_have, all_have | some_have, all_have | some_have | one_has],
        [all_have, all_have | some_have, all_have | some_have | one_has],
        [all_have | one_has, all_have, all_have],
    ]
    found = run_ranks(3, saves, out, states)
    assert found == [[(False, ""), (True, ""), (False, ""), (True, "")]] * 3
    assert run_ranks(2, reads, out, [1, 2, 3, 4])[1] == [spelled(*state) for state in states]
    third = lies(out, 3)
    assert {key: len(of) for key, of in third.items() if key.startswith("part.")} == {
        "part.all": 1, "part.some": 1, "part.one": 1
    }  # fmt: skip
    assert third["part.one"] == ["rank-00002.safetensors"] and third["part.some"] != ["rank-00000.safetensors"]


def test_a_dtype_and_a_shape_that_become_others_are_saved_as_they_are_now(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    kinds = [{"a": numbers(0)}, {"a": numbers(0, torch.bfloat16)}, {"a": numbers(1, torch.bfloat16)}]
    kinds += [{"a": torch.ones(4, 2, dtype=torch.bfloat16)}, {"a": torch.zeros(4, 2, dtype=torch.bfloat16)}]
    found = run_ranks(2, saves, out, [[kind, kind] for kind in kinds])
    assert found == [[(False, ""), (True, ""), (False, ""), (True, ""), (False, "")]] * 2
    assert run_ranks(1, reads, out, [1, 2, 3, 4, 5])[0] == [spelled(kind) for kind in kinds]


def test_a_tensor_that_is_not_the_same_on_all_ranks_is_named_and_the_next_save_works(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    usual, other = {"a": numbers(0), "b": numbers(3)}, {"a": numbers(0, torch.float64), "b": numbers(3)}
    states = [[usual, usual], [usual, other], [other, usual], [other, other], [other, other]]
    for found in run_ranks(2, saves, out, states):
        assert [is_due for is_due, _ in found] == [False, True, True, False, False]
        assert [bool(failure) for _, failure in found] == [False, True, True, False, False]
        assert all("'part.a' is not the same on all ranks" in failure for _, failure in found[1:3])
    assert run_ranks(1, reads, out, [1, 4, 5])[0] == [spelled(usual), spelled(other), spelled(other)]
    assert not list(Path(out).glob("step-0000000[23].committed"))


def test_a_tensor_that_is_gone_on_some_ranks_is_not_lost_where_others_have_it(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    both, one = {"a": numbers(0), "b": numbers(3)}, {"b": numbers(3)}
    states = [[both, both], [one, both], [one, both], [both, one], [both, one], [one, one], [one, one]]
    found = run_ranks(2, saves, out, states)
    assert found[0] == found[1]
    kept = [nth for nth, (_, failure) in enumerate(found[0], start=1) if not failure]
    assert {1, 3, 5, 7} <= {*kept}, "a save that follows such a change knows of it"
    assert all("part.a" in failure and "was not written whole" in failure for _, failure in found[0] if failure)
    assert run_ranks(1, reads, out, kept)[0] == [spelled(*states[nth - 1]) for nth in kept]


def reads_values(rank: int, out: str, numbers: list[int]) -> list[str]:
    part, found = Holder(None), []
    with running(out, {"part": part}, save_last=False) as ckpt:
        for number in numbers:
            ckpt.resume(number)
            found.append(str(part.tensors))
    return found


def test_a_value_that_appears_on_one_rank_is_saved_at_once_and_agreed_on_at_the_next_save(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    few, more = {"inner": {"a": 1}}, {"inner": {"a": 1, "b": 2}}
    found = run_ranks(2, saves, out, [[few, few], [few, more], [few, more], [more, more]])
    assert found == [[(False, ""), (True, ""), (False, ""), (True, "")]] * 2
    assert run_ranks(1, reads_values, out, [1, 2, 3, 4])[0] == [str(few), str(more), str(more), str(more)]


def test_a_value_that_is_gone_on_the_rank_that_wrote_it_for_all_is_named_and_the_next_save_works(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    few, more = {"inner": {}}, {"inner": {"a": 1}}
    for found in run_ranks(2, saves, out, [[more, more], [few, more], [few, more], [few, few]]):
        assert [is_due for is_due, _ in found] == [False, True, False, True]
        assert [bool(failure) for _, failure in found] == [False, True, False, False]
        assert "'part.inner.a' is not in the state of rank 0 any more" in found[1][1]
    assert run_ranks(1, reads_values, out, [1, 3, 4])[0] == [str(more), str(more), str(few)]


class Twice(nn.Module):
    """Two ways through it: each rank takes another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])


def save_experts(rank: int, out: str) -> list[list[str]]:
    """The names of parameters with state; each rank trains one more of them before the second save."""
    model = Twice()
    optimizer = adamw(model)
    names = {one: name for name, one in model.named_parameters()}
    found = []
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        for expert in (None, model.experts[rank], model.experts[rank]):
            if expert is not None:
                expert(torch.ones(1, 3)).sum().backward()
                optimizer.step()
            ckpt.step()
            ckpt.save(wait=True)
            found.append(sorted(names[one] for one in optimizer.state))
    return found


def restore_experts(rank: int, out: str) -> list[list[str]]:
    model = Twice()
    optimizer = adamw(model)
    names = {one: name for name, one in model.named_parameters()}
    found = []
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        for number in (1, 2, 3):
            ckpt.resume(number)
            found.append(sorted(names[one] for one in optimizer.state))
    return found


def test_state_that_the_first_step_of_an_expert_makes_on_one_rank_is_saved(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    first, second = run_ranks(2, save_experts, out)
    assert first[1] == ["experts.0.bias", "experts.0.weight"] and second[1] == ["experts.1.bias", "experts.1.weight"]
    both = sorted(first[1] + second[1])
    assert run_ranks(1, restore_experts, out) == [[[], both, both]]


def save_before_and_after_the_first_step(rank: int, out: str) -> list[bool]:
    """Whether the ranks have to agree anew after each save."""
    model = Stage([0])
    optimizer = adamw(model)
    found = []
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        for steps in (0, 1, 1):
            step(model, optimizer, steps)
            ckpt.step()
            ckpt.save(wait=True)
            found.append(ckpt._run._format.planner.is_due)
    return found


def test_the_ranks_agree_on_the_state_that_the_first_step_makes_before_it_is_saved(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    assert run_ranks(2, save_before_and_after_the_first_step, out) == [[True, False, False]] * 2
    assert all(len(files) == 1 for files in lies(out, 2).values()) and len(lies(out, 2)) == 2 + 2 * 3


# Two at once, and little to write


def two_at_once(rank: int, out: str) -> list[dict[str, Any]]:
    """Two checkpointers of one process, whose tensors are called alike and are not."""
    small, large = Holder({"a": numbers(0)}), Holder({"a": torch.ones(5, dtype=torch.float64), "b": numbers(1)})
    with running(f"{out}.small", {"part": small}) as one, running(f"{out}.large", {"part": large}) as other:
        for _ in range(3):
            for ckpt in (one, other):
                ckpt.step()
                ckpt.save()
            small.tensors = {"a": small.tensors["a"] + 1}
        for ckpt in (one, other):
            ckpt.wait()
        assert not any(ckpt._run._format.planner.is_due for ckpt in (one, other))
    return []


def test_two_checkpointers_do_not_know_of_one_another(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    run_ranks(2, two_at_once, out)
    assert run_ranks(1, reads, f"{out}.small", [1, 3])[0] == [spelled({"a": numbers(0)}), spelled({"a": numbers(2)})]
    expected = spelled({"a": torch.ones(5, dtype=torch.float64), "b": numbers(1)})
    assert run_ranks(1, reads, f"{out}.large", [3])[0] == [expected]


def little(rank: int) -> dict[str, Any]:
    """Less than there are ranks: no rows, one row, numbers; and what only some ranks are asked for."""
    mesh = mesh_of(dist.get_world_size())
    spread = {
        key: distribute_tensor(one, mesh, [Shard(0)])
        for key, one in {
            "no rows": torch.zeros(0, 3),
            "one row": torch.ones(1, 3),
            "two rows": torch.ones(2, 1),
        }.items()
    }
    return {
        **spread,
        "number": torch.tensor(2.5),
        "nothing": torch.zeros(2, 0),
        "a": {"b": numbers(0)},
        "a.b": numbers(3),
    }


def save_little(rank: int, out: str) -> None:
    with running(out, {"part": Holder(little(rank)), "none": Holder({})}) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)


def restore_little(rank: int, out: str) -> dict[str, Any]:
    part, none = Holder(little(rank)), Holder(None)
    with running(out, {"part": part, "none": none}) as ckpt:
        ckpt.resume()
    assert none.tensors == {}
    nested = part.tensors.pop("a")["b"]
    return {"a of b": whole(nested).tolist()} | {key: whole(one).tolist() for key, one in part.tensors.items()}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_with_nothing_to_write_and_tensors_smaller_than_the_world_come_back(run_ranks, tmp_path, ranks):
    out = str(tmp_path / "run")
    run_ranks(4, save_little, out)
    expected = {
        "no rows": [], "one row": [[1.0] * 3], "two rows": [[1.0], [1.0]], "number": 2.5, "nothing": [[], []],
        "a of b": [0.0, 1.0, 2.0], "a.b": [3.0, 4.0, 5.0],
    }  # fmt: skip
    assert run_ranks(ranks, restore_little, out) == [expected] * ranks
    names = {path.name for path in Path(out).glob("step-00000001/*.safetensors")}
    assert names == {"rank-00000.safetensors", "rank-00001.safetensors"} or len(names) < 4


def half(rank: int) -> dict[str, Any]:
    """Spread over the last two ranks of three: the first has nothing of it."""
    mesh = DeviceMesh("cpu", [1, 2])
    held = torch.arange(5.0) if rank else torch.empty(0)
    rows = {1: held[:3], 2: held[3:]}.get(rank, torch.empty(0))
    return {"half": DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=torch.Size([5]), stride=(1,))}


def save_half(rank: int, out: str) -> None:
    with running(out, {"part": Holder(half(rank))}) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)


def restore_half(rank: int, out: str) -> list[float]:
    part = Holder(half(rank) if dist.get_world_size() == 3 else {})
    with running(out, {"part": part}) as ckpt:
        ckpt.resume()
    found = part.tensors["half"]
    return (found.to_local() if isinstance(found, DTensor) else found).tolist()


def test_a_tensor_that_is_spread_over_some_of_the_ranks_comes_back(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    run_ranks(3, save_half, out)
    assert run_ranks(3, restore_half, out) == [[], [0.0, 1.0, 2.0], [3.0, 4.0]]
    assert run_ranks(1, restore_half, out) == [[0.0, 1.0, 2.0, 3.0, 4.0]]

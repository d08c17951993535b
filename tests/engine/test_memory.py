"""How much memory there is, by everybody's word, and how much a state will take."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from distckpt.engine import memory
from distckpt.engine.memory import available_bytes, expected_bytes
from distckpt.engine.plan import starts
from distckpt.formats import Snapshot
from distckpt.formats.full import FORMAT

GIB = 1 << 30


# What there is


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Control groups as the system shows them: ``files`` by their path, and which group this process is in."""

    def show(of_process: str, **files: str) -> None:
        for path, text in files.items():
            place = tmp_path / "cgroup" / path.replace("__", "/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        (tmp_path / "own").write_text(of_process)
        monkeypatch.setattr(memory, "_GROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(memory, "_OWN_GROUP", tmp_path / "own")

    return show


def machine_bytes() -> int:
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_where_nobody_sets_a_limit_it_is_what_the_machine_has(groups):
    groups("0::/\n", **{"memory.max": "max\n", "memory.current": f"{GIB}\n"})
    assert available_bytes() == pytest.approx(machine_bytes(), rel=0.2)


def test_where_there_are_no_groups_it_is_what_the_machine_has(groups):
    groups("")
    assert available_bytes() == pytest.approx(machine_bytes(), rel=0.2)


def test_a_limit_is_what_is_left_of_it(groups):
    groups("0::/\n", **{"memory.max": f"{GIB}\n", "memory.current": f"{GIB - 1000}\n", "memory.stat": "anon 5\n"})
    assert available_bytes() == 1000


def test_of_all_groups_that_a_process_is_in_the_smallest_rest_counts(groups):
    groups(
        "0::/job/step\n",
        **{
            "job__memory.max": f"{GIB}\n",
            "job__memory.current": f"{GIB - 500}\n",
            "job__step__memory.max": f"{GIB}\n",
            "job__step__memory.current": f"{GIB - 1000}\n",
            "other__memory.max": "1\n",
            "other__memory.current": "1\n",
        },
    )
    assert available_bytes() == 500


def test_the_older_kind_of_groups_is_read_too(groups):
    groups(
        "7:blkio:/x\n4:memory:/box\n0::/\n",
        memory__box__memory_limit="",
        **{
            "memory__box__memory.limit_in_bytes": f"{GIB}\n",
            "memory__box__memory.usage_in_bytes": f"{GIB - 900}\n",
            "memory__box__memory.stat": "inactive_file 1\ntotal_active_file 30\ntotal_inactive_file 70\n",
        },
    )
    assert available_bytes() == 1000


def test_a_box_that_sees_its_own_group_as_the_root_reads_that(groups):
    groups(
        "4:memory:/docker/abc\n",
        **{
            "memory__memory.limit_in_bytes": f"{GIB}\n",
            "memory__memory.usage_in_bytes": f"{GIB - 300}\n",
        },
    )
    assert available_bytes() == 300


def test_files_that_are_only_kept_in_mind_are_no_use_of_memory(groups):
    groups(
        "0::/\n",
        **{
            "memory.max": f"{GIB}\n",
            "memory.current": f"{GIB}\n",
            "memory.stat": f"anon 7\nfile 9\nactive_file {100 << 20}\ninactive_file {200 << 20}\n",
        },
    )
    assert available_bytes() == 300 << 20


def test_more_than_the_limit_is_nothing(groups):
    groups("0::/\n", **{"memory.max": "1000\n", "memory.current": "2000\n"})
    assert available_bytes() == 0


# What a state takes


def parts(optimizer: Callable[..., torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300), nn.Linear(300, 10))
    model[2].weight.requires_grad_(False)
    return model, optimizer(model.parameters())


def staged_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """What a save takes after the first step."""
    model(torch.randn(4, 300)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return starts(FORMAT.lay_out(Snapshot(state), 0))[-1]


MADE: list[Callable[..., torch.optim.Optimizer]] = [
    torch.optim.AdamW,
    lambda parameters: torch.optim.Adam(parameters, amsgrad=True),
    lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.1)),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
]


@pytest.mark.parametrize("make", MADE)
def test_before_the_first_step_it_is_what_a_save_takes_after_it(make):
    model, optimizer = parts(make)
    expected = expected_bytes([model, optimizer])
    assert staged_bytes(model, optimizer) == pytest.approx(expected, rel=0.05)
    assert expected_bytes([model, optimizer]) == pytest.approx(expected, rel=0.001)


def test_a_scheduler_holds_its_optimizer_and_saves_none_of_it():
    model, optimizer = parts(torch.optim.AdamW)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1), torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)]
    assert expected_bytes([model, optimizer, *schedulers]) == expected_bytes([model, optimizer])
    assert expected_bytes(schedulers) == 0


def test_what_wraps_an_optimizer_takes_what_that_takes():
    class Wrapped:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    _, optimizer = parts(torch.optim.AdamW)
    assert expected_bytes([Wrapped(optimizer)]) == expected_bytes([optimizer]) > 0


def test_tied_weights_are_counted_once():
    one = nn.Linear(300, 300, bias=False)
    two = nn.Sequential(one, nn.Linear(300, 300, bias=False))
    two[1].weight = one.weight
    assert expected_bytes([two]) == one.weight.nbytes


@pytest.mark.parametrize("part", [nn.LazyLinear(3), object(), nn.Linear(2, 2, device="meta")])
def test_what_has_no_memory_yet_takes_none(part):
    assert expected_bytes([part]) == 0


def test_nothing_is_changed_by_asking():
    model, optimizer = parts(torch.optim.AdamW)
    expected_bytes([model, optimizer])
    assert not optimizer.state and all(one.grad is None for one in model.parameters())

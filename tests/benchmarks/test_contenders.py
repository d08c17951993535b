"""Every contender saves what it says it saves, whatever training does next, and restores it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import contenders
import pytest
import torch
import workloads
from contenders import Contender
from workloads import Workload

# Two start a process of their own that imports torch; Lightning takes as long to import.
pytestmark = pytest.mark.timeout(240)

# They copy beside the forward, which changes the statistics of batch norms: of these they save what there is by then.
TEARS_BUFFERS = ("dcp_async_overlapped", "torch_checkpointing_async")


def train(workload: Workload, contender: Contender | None = None) -> None:
    workload.loss().backward()
    if contender is not None:
        contender.before_optimizer()
    workload.optimizer.step()
    workload.after_step()
    workload.optimizer.zero_grad(set_to_none=False)


def without(left_out: list[torch.Tensor], workload: Workload) -> list[torch.Tensor]:
    return [tensor for tensor in workload.tensors() if not any(tensor is one for one in left_out)]


def save_twice_and_restore_the_first(_: int, name: str, directory: Path) -> str | None:
    """What is not installed, if something is not."""
    try:
        contender = contenders.load(name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if importlib.util.find_spec(package) is not None:
            raise
        return package
    workload = workloads.load("tiny")
    train(workload)
    contender.open(directory, workload.model, workload.optimizer)
    contender.save(1)
    left_out = list(workload.model.buffers()) if name in TEARS_BUFFERS else []
    saved = [tensor.clone() for tensor in without(left_out, workload)]
    train(workload, contender)
    contender.wait()
    assert not any(map(torch.equal, without(left_out, workload), saved))
    contender.save(2)
    contender.before_optimizer()
    contender.wait()
    workload.optimizer.param_groups[0]["lr"] = 0.5
    contender.restore(1)
    assert workload.optimizer.param_groups[0]["lr"] == 1e-3
    assert all(map(torch.equal, without(left_out, workload), saved))
    contender.delete(1)
    assert contender.path(2).exists() and not contender.path(1).exists()
    contender.close()
    return None


@pytest.mark.parametrize("name", contenders.names())
def test_what_is_saved_is_what_is_restored(name: str, run_ranks: Any, tmp_path: Path) -> None:
    # In a process of its own: some leave threads, processes and words in the environment behind.
    (absent,) = run_ranks(1, save_twice_and_restore_the_first, name, tmp_path, seconds=200)
    if absent is not None:
        pytest.skip(f"{absent} is not installed: it comes with the extra 'bench'")


def test_every_contender_and_every_workload_says_what_it_is() -> None:
    assert all(about.endswith(".") for about in map(contenders.about, contenders.names()))
    assert all(about.endswith(".") for about in map(workloads.about, workloads.names()))

"""The workloads are the models that they say they are."""

from __future__ import annotations

import pytest
import torch
import workloads

# Parameters that are trained, numbers in them, tensors that are saved after a step.
SHAPES = {
    "gpt2": (148, 124_439_808, 592),
    "resnet50": (161, 25_557_032, 161 * 2 + 159),
    "vit_b_ema": (152, 86_567_656, 152 * 5 + 1),
    "many_small": (5000, 20_480_000, 10_000),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_workload_has_the_published_shape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is computed here, so nothing has to hold gigabytes.
    monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, *_, **__: tensor)
    with torch.device("meta"):
        workload = workloads.load(name)
    trained, numbers, saved = SHAPES[name]
    parameters = [one for group in workload.optimizer.param_groups for one in group["params"]]
    assert len(parameters) == trained
    assert sum(one.numel() for one in parameters) == numbers
    moments = {"AdamW": 3, "SGD": 1}[type(workload.optimizer).__name__]
    assert len([*workload.model.parameters(), *workload.model.buffers()]) + moments * trained == saved
    assert workloads.about(name).endswith(".")


def test_a_step_changes_every_tensor_that_is_saved() -> None:
    workload = workloads.load("tiny")
    for _ in range(2):
        before = [tensor.clone() for tensor in workload.tensors()]
        workload.loss().backward()
        workload.optimizer.step()
        workload.optimizer.zero_grad(set_to_none=False)
    assert not any(map(torch.equal, before, workload.tensors()))

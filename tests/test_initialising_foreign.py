"""Modules of one process that start from what other libraries saved."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter, HuggingFaceStorageWriter

from distckpt import DamagedCheckpoint, NoCheckpoint, RankFailure, StateMismatch
from distckpt.ranks import Solo
from distckpt.resuming import start_from
from distckpt.selection import Selection
from distckpt.state import Parts

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def begin(source: Path, module: nn.Module | dict[str, nn.Module], *, strict: bool = True, **words: Any) -> None:
    modules = module if isinstance(module, dict) else {"net": module}
    selection = Selection.parse(words.get("only"), words.get("exclude"), words.get("rename"))
    start_from(str(source), Solo(), Parts(modules), selection, strict=strict)


def stored(path: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, storage_writer=FileSystemWriter(path), no_dist=True)
    return path


def linear(fill: float) -> nn.Linear:
    module = nn.Linear(3, 2)
    nn.init.constant_(module.weight, fill)
    return module


def test_several_modules_start_from_what_is_under_their_names(tmp_path):
    source = stored(tmp_path / "source", {"model": linear(1.0).state_dict(), "ema": linear(2.0).state_dict()})
    model, ema = linear(0.0), linear(0.0)
    begin(source, {"model": model, "ema": ema})
    assert (model.weight[0, 0].item(), ema.weight[0, 0].item()) == (1.0, 2.0)


def test_several_modules_cannot_start_from_one_of_no_name(tmp_path):
    source = stored(tmp_path / "source", linear(1.0).state_dict())
    with pytest.raises(RankFailure, match="does not say for which of 2 modules it is: one, two"):
        begin(source, {"one": linear(0.0), "two": linear(0.0)})
    one, two = linear(0.0), linear(0.0)
    begin(source, {"one": one, "two": two}, only="one")
    assert (one.weight[0, 0].item(), two.weight[0, 0].item()) == (1.0, 0.0)


def test_keys_are_selected_and_renamed_as_in_a_resume(tmp_path):
    source = stored(tmp_path / "source", {"old.w": torch.ones(2, 3), "old.bias": torch.ones(2), "odd": torch.ones(1)})
    with pytest.raises(StateMismatch, match=r"missing in the checkpoint: net\.weight"):
        begin(source, linear(0.0))
    module = linear(0.0)
    begin(source, module, rename={"^old.w$": "weight", "^old.bias$": "bias"}, exclude="net.odd")
    assert module.weight.tolist() == [[1.0] * 3] * 2 and module.bias.tolist() == [1.0] * 2


def test_what_does_not_fit_changes_nothing(tmp_path):
    source = stored(tmp_path / "source", {"model": {"weight": torch.ones(2, 3), "bias": torch.ones(7)}})
    module = linear(0.0)
    with pytest.raises(StateMismatch, match=r"of another shape: net\.bias \(\(7,\) there, \(2,\) here\)"):
        begin(source, module)
    assert not module.weight.any()
    begin(source, module, strict=False)
    assert module.weight.all()


def test_other_dtypes_are_converted(tmp_path):
    source = stored(tmp_path / "source", linear(1.5).bfloat16().state_dict())
    module = linear(0.0)
    begin(source, module)
    assert module.weight.dtype is torch.float32 and module.weight[0, 0].item() == 1.5


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_of_which_one_was_saved_stay_tied(tmp_path):
    weight = torch.randn(4, 3)
    safetensors.torch.save_file({"embed.weight": weight}, tmp_path / "model.safetensors")
    module = Tied()
    begin(tmp_path, module)
    assert torch.equal(module.head.weight, weight) and module.head.weight is module.embed.weight


class Extra(nn.Linear):
    """A module with a state that is no tensor."""

    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


class Runs:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._path}",)


def test_extra_state_of_a_module_is_read_as_data(tmp_path):
    module, other = Extra(3, 2), Extra(3, 2)
    module.extra = ("scale", 3, None)
    begin(stored(tmp_path / "source", {"model": module.state_dict()}), other)
    assert other.extra == ("scale", 3, None)


def test_extra_state_that_would_run_code_is_left_out_and_told(tmp_path, caplog):
    module, other = Extra(3, 2), Extra(3, 2)
    module.extra = Runs(tmp_path / "made")
    source = stored(tmp_path / "source", {"model": module.state_dict()})
    with pytest.raises(StateMismatch, match=r"net\._extra_state"):
        begin(source, other)
    with caplog.at_level(logging.WARNING, "distckpt"):
        begin(source, other, strict=False)
    assert "model._extra_state is not read: torch.load(weights_only=True) refuses it" in caplog.text
    assert torch.equal(other.weight, module.weight) and not (tmp_path / "made").exists()


def test_what_is_left_there_is_told(tmp_path, caplog):
    state = {"model": linear(1.0).state_dict(), "optim": {"a": torch.ones(1), "b": 2}, "step": 1}
    with caplog.at_level(logging.INFO, "distckpt"):
        begin(stored(tmp_path / "source", state), linear(0.0))
    assert f"left in {tmp_path / 'source'}: 2 of optim, 1 of step" in caplog.text
    assert "2 loaded" in caplog.text


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_file_that_is_cut_off_is_refused_by_its_name(tmp_path, name):
    source = stored(tmp_path / "source", linear(1.0).state_dict())
    data = (source / name).read_bytes()
    (source / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedCheckpoint, match=name):
        begin(source, linear(0.0))


def test_what_torch_made_of_shards_is_taken_before_the_shards(tmp_path):
    module, other = linear(1.0), linear(0.0)
    writer = HuggingFaceStorageWriter(str(tmp_path), save_distributed=True, enable_consolidation=True)
    dcp.save(module.state_dict(), storage_writer=writer, no_dist=True)
    for shard in (tmp_path / "sharded").iterdir():
        shard.write_bytes(b"")
    begin(tmp_path, other)
    assert torch.equal(other.weight, module.weight) and torch.equal(other.bias, module.bias)


def test_where_nothing_is_there_is_no_checkpoint(tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(NoCheckpoint, match="init_from: .*source holds no committed checkpoint, and none of another"):
        begin(tmp_path / "source", linear(0.0))

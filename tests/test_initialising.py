"""Modules that start from a checkpoint of ours, or from a file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from distckpt import Checkpointer, DamagedCheckpoint, NewerVersion, NoCheckpoint, RankFailure
from distckpt.ranks import Solo
from distckpt.resuming import start_from
from distckpt.selection import Selection
from distckpt.state import Parts


def model(fill: float) -> nn.Module:
    made = nn.Linear(2, 1)
    nn.init.constant_(made.weight, fill)
    return made


def parts(*names: str) -> Parts:
    return Parts({name: model(0.0) for name in names or ("model",)})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two steps, saved at each."""
    net = model(0.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    with Checkpointer(tmp_path / "run", {"model": net, "ema": model(9.0), "optimizer": optimizer}, interval=1) as ckpt:
        for step in (1, 2):
            nn.init.constant_(net.weight, float(step))
            ckpt.step()
    return tmp_path / "run"


def first_weight(source: Path, *names: str) -> dict[str, float]:
    made = parts(*names)
    start_from(str(source), Solo(), made, Selection(), strict=True)
    return {name: module.weight[0, 0].item() for name, module in made.modules.items()}


def test_a_runs_directory_gives_its_newest_checkpoint(run):
    assert first_weight(run) == {"model": 2.0}


def test_only_the_modules_that_are_wanted_are_read(run):
    assert first_weight(run, "model", "ema") == {"model": 2.0, "ema": 9.0}
    (run / "step-00000002" / "ema.safetensors").unlink()
    assert first_weight(run, "model") == {"model": 2.0}


def test_a_damaged_newest_is_passed_over_in_a_runs_directory(run):
    (run / "step-00000002" / "model.safetensors").write_bytes(b"")
    assert first_weight(run) == {"model": 1.0}


@pytest.mark.parametrize("name", ["step-00000001", "step-00000002", "latest"])
def test_a_checkpoint_or_a_label_gives_that_one(run, name):
    assert first_weight(run / name) == {"model": 1.0 if name.endswith("1") else 2.0}


@pytest.mark.parametrize("name", ["step-00000002", "latest"])
def test_a_folder_in_the_place_of_another_is_found_by_the_record(run, name):
    shutil.rmtree(run / "step-00000002")
    shutil.copytree(run / "step-00000001", run / "step-00000002")
    with pytest.raises(NoCheckpoint, match="step-00000002"):
        first_weight(run / name)


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(run):
    (run / "step-00000002" / "model.safetensors").write_bytes(b"")
    with pytest.raises(NoCheckpoint, match="step-00000002"):
        first_weight(run / "step-00000002")


def test_a_checkpoint_that_was_copied_away_proves_itself(run, tmp_path):
    shutil.copytree(run / "step-00000001", tmp_path / "elsewhere" / "my weights")
    assert first_weight(tmp_path / "elsewhere" / "my weights") == {"model": 1.0}


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
def test_a_copy_that_is_damaged_is_refused_by_the_file(run, tmp_path, file):
    shutil.copytree(run / "step-00000001", tmp_path / "copy")
    data = (tmp_path / "copy" / file).read_bytes()
    (tmp_path / "copy" / file).write_bytes(data[:-1])
    with pytest.raises(DamagedCheckpoint, match=f"copy/{file}"):
        first_weight(tmp_path / "copy")


def test_a_checkpoint_of_a_newer_version_is_refused_by_name(run, tmp_path):
    shutil.copytree(run / "step-00000001", tmp_path / "copy")
    manifest = tmp_path / "copy" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version":1', '"version":2'))
    with pytest.raises(NewerVersion, match=r"copy/manifest\.json has version 2"):
        first_weight(tmp_path / "copy")


def test_a_safetensors_file_gives_the_weights_of_the_only_module(tmp_path):
    safetensors.torch.save_file(model(3.0).state_dict(), tmp_path / "weights.safetensors")
    assert first_weight(tmp_path / "weights.safetensors", "net") == {"net": 3.0}


@pytest.mark.parametrize(
    "wrap", [lambda weights: weights, lambda weights: {"meta": {"epoch": 1}, "state_dict": weights}]
)
def test_a_pth_file_gives_the_weights_of_the_only_module(tmp_path, wrap):
    torch.save(wrap(model(4.0).state_dict()), tmp_path / "weights.pth")
    assert first_weight(tmp_path / "weights.pth") == {"model": 4.0}


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("data", [b"", b"garbage" * 100, b"\x80\x02cos\nsystem\n(S'false'\ntR."])
def test_a_file_that_is_damaged_is_refused_by_its_name(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=name):
        first_weight(tmp_path / name)


def test_a_pth_file_that_holds_no_weights_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "weights.pth")
    with pytest.raises(DamagedCheckpoint, match="holds a list, no weights by name"):
        first_weight(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_one_file_for_two_modules_is_refused_with_their_names(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(RankFailure, match=r"is one file, and state has 2 modules: model, ema"):
        first_weight(tmp_path / name, "model", "ema")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda place: None, "is neither a checkpoint nor a file"),
        (lambda place: place.mkdir(), "holds no committed checkpoint"),
        (lambda place: place.symlink_to("nowhere"), "is neither a checkpoint nor a file"),
    ],
)
def test_where_nothing_is_there_is_no_checkpoint(tmp_path, make, told):
    place: Any = tmp_path / "there"
    make(place)
    with pytest.raises(NoCheckpoint, match=f"init_from: .*there {told}"):
        first_weight(place)


def test_a_checkpoint_that_was_not_committed_is_read_for_what_it_proves(run):
    (run / "step-00000001.committed").unlink()
    assert first_weight(run / "step-00000001") == {"model": 1.0}
    assert first_weight(run) == {"model": 2.0}

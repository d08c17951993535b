"""The hook under a training loop of one's own: which files there are, what is in them, and what becomes of them."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runners import Hub
from torch import nn

from distckpt import CheckpointHook, DirectoryInUse, RankFailure, SaveFailed, layout
from distckpt.engine.snapshot import Staging
from distckpt.formats import Written
from distckpt.formats.pth import read_pth
from distckpt.hook_words import OURS
from distckpt.stores import Store, local
from distckpt.testing import FaultyStore


class Loop:
    """A training of a small model, with the few attributes that the hook asks of a runner."""

    logger = logging.getLogger("loop")

    def __init__(self, work_dir: Path, hook: CheckpointHook, *, epochs: int = 3, iters: int = 2) -> None:
        torch.manual_seed(0)
        self.work_dir = str(work_dir)
        self.hook = hook
        self.model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.param_schedulers = [torch.optim.lr_scheduler.StepLR(self.optimizer, 1)]
        self.message_hub = Hub()
        self.epoch = self.iter = 0
        self.max_epochs, self.max_iters = epochs, epochs * iters
        self._iters = iters

    def train(self, metrics: Sequence[Any] = (), *, until: int | None = None) -> Loop:
        """Trains to the end, or stops early ``until`` that epoch; ``metrics`` are those after each epoch."""
        self.go_on(metrics, until=until)
        self.hook.after_train(self)
        return self

    def go_on(self, metrics: Sequence[Any] = (), *, until: int | None = None) -> Loop:
        """As `train`, but it is not told that training ends."""
        self.hook.before_train(self)
        while self.epoch < (until or self.max_epochs):
            for batch in range(self._iters):
                self.optimizer.zero_grad()
                data = torch.randn(4, 2, generator=torch.Generator().manual_seed(self.iter))
                self.model(data).square().sum().backward()
                self.optimizer.step()
                self.hook.after_train_iter(self, batch)
                self.iter += 1
            self.hook.after_train_epoch(self)
            self.epoch += 1
            if metrics:
                self.hook.after_val_epoch(self, as_metrics(metrics[self.epoch - 1]))
        return self

    def resume(self, path: Path) -> Loop:
        held = torch.load(path, weights_only=True)
        self.model.load_state_dict(held["state_dict"])
        self.optimizer.load_state_dict(held["optimizer"])
        self.message_hub.runtime_info.update(held["message_hub"]["runtime_info"])
        self.epoch, self.iter = held["meta"]["epoch"], held["meta"]["iter"]
        return self


def as_metrics(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"acc": value}


def train(
    work_dir: Path, metrics: Sequence[Any] = (), *, epochs: int = 3, until: int | None = None, **words: Any
) -> Loop:
    return Loop(work_dir, CheckpointHook(**words), epochs=epochs).train(metrics, until=until)


def go_on(work_dir: Path, metrics: Sequence[Any] = (), *, epochs: int = 3, **words: Any) -> Loop:
    """Resumes what ``last_checkpoint`` says, and trains to the end."""
    loop = Loop(work_dir, CheckpointHook(**words), epochs=epochs)
    return loop.resume(Path((work_dir / "last_checkpoint").read_text())).train(metrics)


def files(folder: Path) -> list[str]:
    """The checkpoints in ``folder``: files with a record."""
    named = (layout.recorded_by(path.name) for path in folder.iterdir())
    return sorted(name for name in named if name is not None and name.endswith(".pth"))


def epochs(folder: Path) -> list[int]:
    return sorted(int(name[6:-4]) for name in files(folder) if name.startswith("epoch_"))


def best(folder: Path) -> list[str]:
    return [name for name in files(folder) if name.startswith("best_")]


def held(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def info(path: Path) -> dict[str, Any]:
    return held(path)["message_hub"]["runtime_info"]


# Construction


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        ({"file_client_args": {}, "backend_args": {}}, ValueError, "cannot be set at the same time"),
        ({"save_best": {"acc": "acc"}}, AssertionError, '"save_best" should be'),
        ({"save_best": ["auto", "acc"]}, AssertionError, "Only support one"),
        ({"save_best": ["acc", "acc"]}, AssertionError, "duplicate"),
        ({"save_best": "unheard"}, ValueError, "Cannot infer the rule"),
        ({"save_best": ["acc"], "rule": 1}, AssertionError, '"rule" should be a str'),
        ({"save_best": ["acc"], "rule": ["greater", "less"]}, AssertionError, 'Number of "rule" must be'),
        ({"save_best": "acc", "rule": "better"}, KeyError, "rule must be greater"),
        ({"published_keys": {"meta"}}, TypeError, "published_keys"),
        ({"published_keys": ["meta", "meta"]}, AssertionError, "duplicate"),
        ({"published_keys": []}, ValueError, "published_keys"),
        ({"save_begin": -1}, ValueError, "save_begin should not be less than 0, but got -1"),
        ({"save_begin": 1.0}, TypeError, "save_begin"),
        ({"interval": None}, TypeError, "interval"),
        ({"interval": 0.5}, TypeError, "interval"),
        ({"interval": "2"}, ValueError, "interval"),
        ({"by_epoch": "yes"}, TypeError, "by_epoch"),
        ({"save_last": 1}, TypeError, "save_last"),
        ({"max_keep_ckpts": 1.5}, TypeError, "max_keep_ckpts"),
        ({"out_dir": 3}, TypeError, "out_dir"),
        ({"filename_tmpl": "last.pth"}, ValueError, "one and only one"),
        ({"filename_tmpl": "{}_{}.pth"}, ValueError, "one and only one"),
        ({"filename_tmpl": "{epoch}.pth"}, ValueError, "one and only one"),
        ({"filename_tmpl": "{.pth"}, ValueError, "one and only one"),
        ({"filename_tmpl": "sub/{}.pth"}, ValueError, "cannot be the name of a file"),
        ({"filename_tmpl": ".{}.pth"}, ValueError, "cannot be the name of a file"),
        ({"filename_tmpl": "step-{:08d}"}, ValueError, "cannot be the name of a file"),
        ({"filename_tmpl": "{}.committed"}, ValueError, "cannot be the name of a file"),
        ({"filename_tmpl": 3}, TypeError, "filename_tmpl"),
        ({"greater_keys": 3}, AssertionError, "greater_keys"),
        ({"sync_buffers": "sum"}, ValueError, "sync_buffers"),
        ({"timeout": "soon"}, ValueError, "timeout"),
        ({"async_save": 1}, TypeError, "async_save"),
        ({"max_keep_best": 0}, ValueError, "max_keep_best"),
        ({"keep_every": -1}, ValueError, "keep_every"),
        ({"keep_bytes": "lots"}, ValueError, "keep_bytes"),
        ({"max_keep_ckpt": 3}, TypeError, "did you mean max_keep_ckpts="),
        ({"save_top_k": 3}, TypeError, "here it is max_keep_best="),
        ({"monitor": "acc"}, TypeError, "here it is save_best="),
        ({"sync_buffer": True}, TypeError, "here it is sync_buffers="),
    ],
)
def test_a_wrong_word_fails_at_construction(words, error, told):
    with pytest.raises(error, match=told):
        CheckpointHook(**words)


def test_defaults_are_those_of_the_specification():
    hook = CheckpointHook()
    assert (hook.interval, hook.by_epoch, hook.save_optimizer, hook.save_param_scheduler) == (-1, True, True, True)
    assert (hook.out_dir, hook.max_keep_ckpts, hook.save_last, hook.save_best) == (None, -1, True, None)
    assert (hook.file_client_args, hook.backend_args, hook.published_keys, hook.save_begin) == (None, None, None, 0)
    assert (hook.filename_tmpl, CheckpointHook(by_epoch=False).filename_tmpl) == ("epoch_{}.pth", "iter_{}.pth")
    assert "acc" in hook.greater_keys and list(hook.less_keys) == ["loss"]


def test_words_may_be_given_by_position_as_specified():
    hook = CheckpointHook(2, False, False, False, "out", 3, False, "acc", "less", None, None, None, "x_{}.pth")
    assert (hook.interval, hook.out_dir, hook.rules, hook.filename_tmpl) == (2, "out", ["less"], "x_{}.pth")


def test_rules_are_inferred_and_given_keys_keep_their_type():
    hook = CheckpointHook(save_best=["coco/bbox_mAP", "val_loss"])
    assert (hook.key_indicators, hook.rules) == (["coco/bbox_mAP", "val_loss"], ["greater", "less"])
    assert CheckpointHook(greater_keys="acc").greater_keys == ("acc",)
    assert CheckpointHook(less_keys=["loss_cls"]).less_keys == ["loss_cls"]


def test_one_metric_has_a_best_path_and_several_have_a_dict():
    one, several = CheckpointHook(save_best="acc"), CheckpointHook(save_best=["acc", "loss"])
    assert one.best_ckpt_path is None and not hasattr(one, "best_ckpt_path_dict")
    assert several.best_ckpt_path_dict == {} and not hasattr(several, "best_ckpt_path")


def test_a_backend_that_nobody_knows_is_refused_before_training(tmp_path):
    hook = CheckpointHook(backend_args={"backend": "petrol"})
    with pytest.raises(ValueError, match="there is no backend 'petrol'; there are .*fsspec"):
        hook.before_train(Loop(tmp_path, hook))
    assert list(tmp_path.iterdir()) == []


def test_copies_go_to_any_url_without_mmengine_too(tmp_path):
    train(tmp_path / "here", interval=1, max_keep_ckpts=1, out_dir=f"local://{tmp_path}/there")
    assert sorted(path.name for path in (tmp_path / "there/here").iterdir()) == ["epoch_3.pth", "last_checkpoint"]


def test_records_of_best_files_that_were_not_hidden_yet_still_count(tmp_path):
    train(tmp_path, [0.5, 0.4], epochs=2, interval=1, save_best="acc")
    hidden = tmp_path / ".best_acc_epoch_1.pth.committed"
    hidden.rename(tmp_path / "best_acc_epoch_1.pth.committed")
    go_on(tmp_path, [0.0, 0.0, 0.6], epochs=3, interval=1, save_best="acc")
    assert best(tmp_path) == ["best_acc_epoch_3.pth"]
    assert not (tmp_path / "best_acc_epoch_1.pth").exists()


# Where and when


@pytest.mark.parametrize(
    ("words", "saved"),
    [
        ({}, [5]),
        ({"save_last": False}, []),
        ({"interval": 1}, [1, 2, 3, 4, 5]),
        ({"interval": 2}, [2, 4, 5]),
        ({"interval": 2, "save_last": False}, [2, 4]),
        ({"interval": 2, "save_begin": 3}, [3, 5]),
        ({"interval": 2, "save_begin": 2}, [2, 4, 5]),
        ({"interval": 1, "save_begin": 9}, [5]),
        ({"interval": [2, 3], "save_last": False}, [2, 3, 4]),
    ],
)
def test_it_saves_at_the_interval_and_at_the_end(tmp_path, words, saved):
    train(tmp_path, epochs=5, **words)
    assert epochs(tmp_path) == saved


def test_it_counts_iterations_too(tmp_path):
    train(tmp_path, epochs=3, interval=4, by_epoch=False, save_begin=1)
    assert files(tmp_path) == ["iter_1.pth", "iter_5.pth", "iter_6.pth"]
    assert (held(tmp_path / "iter_5.pth")["meta"]["epoch"], held(tmp_path / "iter_5.pth")["meta"]["iter"]) == (2, 5)


def test_a_training_that_ends_early_saves_its_last_state(tmp_path):
    train(tmp_path, epochs=9, until=3, interval=2)
    assert epochs(tmp_path) == [2, 3]
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "epoch_3.pth")


def test_a_duration_is_an_interval_too(tmp_path):
    train(tmp_path, interval="0.000001s", save_last=False)
    assert epochs(tmp_path) == [1, 2, 3]


def test_out_dir_gets_a_folder_that_is_called_as_work_dir(tmp_path):
    work_dir = tmp_path / "work" / "exp"
    loop = train(work_dir, out_dir=tmp_path / "out", interval=1)
    assert loop.hook.out_dir == str(tmp_path / "out" / "exp")
    assert epochs(tmp_path / "out" / "exp") == [1, 2, 3]
    assert [path.name for path in work_dir.iterdir()] == ["last_checkpoint"]
    assert (work_dir / "last_checkpoint").read_text() == str(tmp_path / "out" / "exp" / "epoch_3.pth")


@pytest.mark.parametrize("same", [lambda path: str(path), lambda path: path, lambda path: f"{path}/"])
def test_out_dir_that_is_work_dir_is_not_nested(tmp_path, same):
    assert train(tmp_path, out_dir=same(tmp_path)).hook.out_dir == str(tmp_path)


def test_before_train_may_be_called_twice(tmp_path):
    hook = CheckpointHook(interval=1, out_dir=tmp_path / "out")
    loop = Loop(tmp_path / "exp", hook)
    hook.before_train(loop)
    attempt = json.loads((tmp_path / "out" / "exp" / "run.json").read_text())["attempt"]
    loop.train()
    assert hook.out_dir == str(tmp_path / "out" / "exp")
    assert json.loads((tmp_path / "out" / "exp" / "run.json").read_text())["attempt"] == attempt


def test_a_template_may_format_its_number(tmp_path):
    train(tmp_path, filename_tmpl="e{:04d}.ckpt")
    assert (tmp_path / "e0003.ckpt.committed").exists()


def test_a_save_before_training_is_an_error_and_a_validation_outside_of_it_is_none(tmp_path):
    hook = CheckpointHook(interval=1, save_best="acc")
    with pytest.raises(RuntimeError, match="before_train"):
        hook.after_train_epoch(Loop(tmp_path, hook))
    hook.after_val_epoch(Loop(tmp_path, hook), {"acc": 1.0})
    hook.after_train(Loop(tmp_path, hook))
    assert list(tmp_path.iterdir()) == []


# What is in a file


def test_a_file_holds_what_training_goes_on_with(tmp_path):
    loop = train(tmp_path, interval=1)
    last = held(tmp_path / "epoch_3.pth")
    assert list(last) == ["meta", "state_dict", "message_hub", "optimizer", "param_schedulers"]
    assert (last["meta"]["epoch"], last["meta"]["iter"]) == (3, 6)
    for key, value in loop.model.state_dict().items():
        assert torch.equal(last["state_dict"][key], value)
    assert torch.equal(
        last["optimizer"]["state"][0]["momentum_buffer"], loop.optimizer.state_dict()["state"][0]["momentum_buffer"]
    )
    assert last["state_dict"]._metadata == loop.model.state_dict()._metadata


def test_a_resumed_training_is_the_one_that_was_not_interrupted(tmp_path):
    reference = train(tmp_path / "a", epochs=4, interval=1)
    train(tmp_path / "b", epochs=4, until=2, interval=1)
    resumed = go_on(tmp_path / "b", epochs=4, interval=1)
    assert resumed.iter == reference.iter and epochs(tmp_path / "b") == [1, 2, 3, 4]
    for key, value in reference.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value)


def test_a_training_that_was_resumed_at_its_end_writes_nothing(tmp_path):
    train(tmp_path, interval=1)
    before = (tmp_path / "epoch_3.pth").stat().st_mtime_ns
    go_on(tmp_path, interval=1)
    assert (tmp_path / "epoch_3.pth").stat().st_mtime_ns == before


def test_optimizer_and_schedulers_may_be_left_out(tmp_path):
    train(tmp_path, save_optimizer=False, save_param_scheduler=False)
    assert list(held(tmp_path / "epoch_3.pth")) == ["meta", "state_dict", "message_hub"]


def test_schedulers_that_are_not_there_are_warned_of(tmp_path, caplog):
    loop = Loop(tmp_path, CheckpointHook())
    loop.param_schedulers = None
    loop.train()
    assert "none are saved" in caplog.text and epochs(tmp_path) == [3]


def test_an_optimizer_without_state_is_a_type_error(tmp_path):
    loop = Loop(tmp_path, CheckpointHook(interval=1))
    loop.optimizer, loop.optim_wrapper = loop.optimizer, object()
    with pytest.raises(TypeError, match="OptimWrapper"):
        loop.go_on()


def test_wrappers_of_the_model_leave_no_prefix(tmp_path):
    loop = Loop(tmp_path, CheckpointHook())
    loop.model = nn.DataParallel(loop.model)
    loop.train()
    assert "0.weight" in held(tmp_path / "epoch_3.pth")["state_dict"]


def test_hooks_of_the_runner_may_change_what_is_saved(tmp_path):
    loop = Loop(tmp_path, CheckpointHook())
    loop.call_hook = lambda stage, checkpoint: checkpoint.update(ema=torch.ones(2), stage=stage)
    loop.train()
    assert held(tmp_path / "epoch_3.pth")["stage"] == "before_save_checkpoint"
    assert torch.equal(held(tmp_path / "epoch_3.pth")["ema"], torch.ones(2))


def test_types_that_need_a_pickle_become_plain(tmp_path):
    loop = Loop(tmp_path, CheckpointHook())
    loop.train_dataloader = type(
        "Loader",
        (),
        {
            "dataset": type(
                "Data",
                (),
                {
                    "metainfo": {
                        "sigmas": np.array([0.1, 0.2]),
                        "classes": np.array(["a", "b"]),
                        "n": np.int64(3),
                        "where": Path("/x"),
                        "long": np.longdouble(1),
                    }
                },
            )
        },
    )()
    loop.train()
    told = held(tmp_path / "epoch_3.pth")["meta"]["dataset_meta"]
    assert torch.equal(told.pop("sigmas"), torch.tensor([0.1, 0.2], dtype=torch.float64))
    assert told == {"classes": ["a", "b"], "n": 3, "where": "/x", "long": 1.0}


class Odd:
    """Only unpickling can bring it back."""


def test_what_only_unpickling_can_read_is_named_once(tmp_path, caplog):
    loop = Loop(tmp_path, CheckpointHook(interval=1))
    loop.message_hub.update_info("odd", Odd())
    loop.train()
    assert len(re.findall(r"message_hub\.runtime_info\.odd \(.*Odd\)", caplog.text)) == 1
    with pytest.raises(pickle.UnpicklingError, match="Odd"):
        held(tmp_path / "epoch_3.pth")


def test_a_runner_without_a_hub_is_served(tmp_path):
    loop = Loop(tmp_path, CheckpointHook(interval=1, save_best="acc", max_keep_ckpts=1))
    loop.message_hub = None
    loop.train([0.1, 0.3, 0.2])
    assert files(tmp_path) == ["best_acc_epoch_2.pth", "epoch_3.pth"]


def test_it_remembers_the_best_without_one_too(tmp_path):
    words: dict[str, Any] = {"interval": 1, "save_best": "acc", "max_keep_ckpts": 1}
    for epochs, report in ((1, 0.9), (2, 0.5)):
        loop = Loop(tmp_path, CheckpointHook(**words), epochs=epochs)
        loop.message_hub = None
        loop.epoch, loop.iter = epochs - 1, 2 * (epochs - 1)
        loop.train([report] * epochs)
    assert files(tmp_path) == ["best_acc_epoch_1.pth", "epoch_2.pth"]


def test_the_hub_in_each_file_tells_of_that_file(tmp_path):
    train(tmp_path, interval=1, max_keep_ckpts=2)
    told = info(tmp_path / "epoch_3.pth")
    assert told["last_ckpt"] == str(tmp_path / "epoch_3.pth")
    assert told["keep_ckpt_ids"] == [2, 3]


# What is kept


def test_only_the_last_periodic_files_are_kept(tmp_path):
    train(tmp_path, epochs=5, interval=1, max_keep_ckpts=2)
    assert epochs(tmp_path) == [4, 5]


@pytest.mark.parametrize("limit", [-1, 0])
def test_without_a_limit_all_are_kept(tmp_path, limit):
    train(tmp_path, [0.5, 0.9, 0.1, 0.2, 0.3], epochs=5, interval=3, save_best="acc", max_keep_ckpts=limit)
    assert files(tmp_path) == ["best_acc_epoch_2.pth", "epoch_1.pth", "epoch_2.pth", "epoch_3.pth", "epoch_5.pth"]


def test_the_last_does_not_count_and_the_best_neither(tmp_path):
    train(tmp_path, [0.1, 0.2, 0.9, 0.3, 0.4], epochs=5, interval=2, save_best="acc", max_keep_ckpts=2)
    assert files(tmp_path) == ["best_acc_epoch_3.pth", "epoch_2.pth", "epoch_3.pth", "epoch_4.pth", "epoch_5.pth"]
    assert info(tmp_path / "epoch_5.pth")["keep_ckpt_ids"] == [2, 4]


def test_what_was_saved_for_being_the_best_goes_when_it_is_not_any_more(tmp_path):
    train(tmp_path, [0.1, 0.2, 0.3, 0.4, 0.5], epochs=5, interval=4, save_best="acc", max_keep_ckpts=2)
    assert files(tmp_path) == ["best_acc_epoch_5.pth", "epoch_4.pth", "epoch_5.pth"]


def test_a_best_outlives_the_periodic_file_that_it_was(tmp_path):
    train(tmp_path, [0.9, 0.1, 0.2, 0.3], epochs=4, interval=1, save_best="acc", max_keep_ckpts=2)
    assert files(tmp_path) == ["best_acc_epoch_1.pth", "epoch_3.pth", "epoch_4.pth"]
    assert held(tmp_path / "best_acc_epoch_1.pth")["meta"]["epoch"] == 1


def test_a_limit_that_was_lowered_holds_from_the_next_save(tmp_path):
    train(tmp_path, epochs=4, interval=1)
    go_on(tmp_path, epochs=5, interval=1, max_keep_ckpts=2)
    assert epochs(tmp_path) == [4, 5]


def test_the_rules_of_ours_keep_more(tmp_path):
    train(tmp_path, epochs=6, interval=1, max_keep_ckpts=1, keep_every=2)
    assert epochs(tmp_path) == [2, 4, 6]


def test_a_budget_counts_the_bytes_of_a_best_and_its_link_once(tmp_path):
    train(tmp_path / "one", epochs=1)
    size = (tmp_path / "one" / "epoch_1.pth").stat().st_size
    train(tmp_path / "all", [0.1, 0.2, 0.3, 0.9], epochs=4, interval=1, save_best="acc", keep_bytes=int(size * 2.5))
    assert files(tmp_path / "all") == ["best_acc_epoch_4.pth", "epoch_3.pth", "epoch_4.pth"]


def test_several_best_are_kept_if_asked_for(tmp_path):
    loop = train(tmp_path, [0.5, 0.9, 0.7, 0.1], epochs=4, interval=1, save_best="acc", max_keep_best=2)
    assert best(tmp_path) == ["best_acc_epoch_2.pth", "best_acc_epoch_3.pth"]
    assert loop.hook.best_ckpt_path == str(tmp_path / "best_acc_epoch_2.pth")


def break_saves(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], None]:
    """From the ``after``-th on, saves fail as on a full disk; until the result is called."""
    saved = []
    write = Staging.write

    def fails(staging: Staging, store: Store, path: str) -> Written:
        saved.append(1)
        if len(saved) <= after:
            return write(staging, store, path)
        with store.create(path) as sink:
            sink.write(b"half of a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Staging, "write", fails)
    return lambda: monkeypatch.setattr(Staging, "write", write)


def test_nothing_is_deleted_before_the_newer_one_is_durable(tmp_path, monkeypatch):
    mend = break_saves(monkeypatch, after=2)
    loop = Loop(tmp_path, CheckpointHook(interval=1, max_keep_ckpts=1))
    with pytest.raises(SaveFailed, match="No space left"):
        loop.train()
    assert epochs(tmp_path) == [2]
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "epoch_2.pth")
    assert not list(tmp_path.glob(".draft-*"))
    mend()
    go_on(tmp_path, interval=1, max_keep_ckpts=1)
    assert epochs(tmp_path) == [3]


def test_a_failed_save_of_a_best_leaves_the_older_best(tmp_path, monkeypatch):
    break_saves(monkeypatch, after=1)
    loop = Loop(tmp_path, CheckpointHook(save_best="acc"))
    with pytest.raises(SaveFailed, match="No space left"):
        loop.train([0.5, 0.9])
    assert best(tmp_path) == ["best_acc_epoch_1.pth"]
    assert loop.message_hub.runtime_info["best_score"] == 0.5
    assert loop.hook.best_ckpt_path == str(tmp_path / "best_acc_epoch_1.pth")


def test_what_last_checkpoint_says_is_never_deleted(tmp_path):
    # It could not be written after the save of epoch 2, so a restart would still read epoch 1.
    loop = Loop(tmp_path, CheckpointHook(interval=1, max_keep_ckpts=1))
    loop.go_on(until=1)
    pointer = loop.hook._opened[1]._pointer
    write, pointer.set = pointer.set, lambda path: pointer._store.read("nothing")
    with pytest.raises(RankFailure, match=r"pointing to epoch_2\.pth failed"):
        loop.go_on()
    assert epochs(tmp_path) == [1, 2]
    pointer.set = write
    loop.epoch += 1  # the epoch at whose end it was raised
    loop.train()
    assert epochs(tmp_path) == [3]


def test_what_another_training_left_is_not_deleted(tmp_path, caplog):
    (tmp_path / "epoch_0.pth").write_bytes(b"of somebody else")
    train(tmp_path, [0, 0, 0.9, 0], epochs=4, interval=1, save_best="acc", max_keep_ckpts=1)
    train(tmp_path, [0.1, 0.2], epochs=2, interval=1, save_best="acc", max_keep_ckpts=1)
    assert files(tmp_path) == ["best_acc_epoch_2.pth", "best_acc_epoch_3.pth", "epoch_2.pth", "epoch_4.pth"]
    assert (tmp_path / "epoch_0.pth").read_bytes() == b"of somebody else"
    assert "2 checkpoints of another training" in caplog.text


def test_two_trainings_cannot_save_into_one_directory(tmp_path):
    Loop(tmp_path, CheckpointHook(interval=1)).go_on(until=1)
    script = (
        "import sys; from distckpt.stores.local import LocalStore; from distckpt.attempt import Attempt, Holder\n"
        "Attempt.start(LocalStore(sys.argv[1]), Holder.here())"
    )
    ran = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=60)
    assert DirectoryInUse.__name__ in ran.stderr and str(os.getpid()) in ran.stderr


# The best


def test_a_best_that_was_saved_just_now_is_a_link(tmp_path):
    train(tmp_path, [0.1, 0.9, 0.5], interval=1, save_best="acc")
    assert files(tmp_path) == ["best_acc_epoch_2.pth", "epoch_1.pth", "epoch_2.pth", "epoch_3.pth"]
    assert (tmp_path / "best_acc_epoch_2.pth").samefile(tmp_path / "epoch_2.pth")


@pytest.mark.parametrize("async_save, count", [(True, 2), (False, 4)])
def test_in_the_background_each_state_is_written_once(tmp_path, monkeypatch, async_save, count):
    writes = []
    write = Staging.write
    monkeypatch.setattr(Staging, "write", lambda *args: writes.append(args[2]) or write(*args))
    words = {"interval": 1, "save_best": ["acc", "loss"], "async_save": async_save}
    train(tmp_path, [{"acc": 0.1, "loss": 3}, {"acc": 0.9, "loss": 1}], epochs=2, **words)
    assert len(writes) == count
    assert (tmp_path / "best_acc_epoch_2.pth").samefile(tmp_path / "epoch_2.pth")


def test_a_file_that_is_the_best_is_written_once_more_to_say_so(tmp_path):
    # As MMEngine's own test of its hook expects; in a new file, which then stands in the place of the old one.
    words = {"interval": 1, "save_best": "acc", "max_keep_ckpts": 2}
    train(tmp_path, [0.1, 0.9, 0.3, 0.4], epochs=4, **words)
    assert files(tmp_path) == ["best_acc_epoch_2.pth", "epoch_3.pth", "epoch_4.pth"]
    told = info(tmp_path / "best_acc_epoch_2.pth")
    assert (told["best_score"], told["best_ckpt"]) == (0.9, str(tmp_path / "best_acc_epoch_2.pth"))
    assert told["keep_ckpt_ids"] == [1, 2] and told["last_ckpt"] == str(tmp_path / "epoch_2.pth")


@pytest.mark.parametrize("operation", ["delete", "settle", "move"])
def test_a_file_that_could_not_be_replaced_stays_a_checkpoint(tmp_path, monkeypatch, operation):
    # Of a save that replaces a file: its record goes, durably, before the file does.
    loop = Loop(tmp_path, CheckpointHook(interval=1, save_best="acc"), epochs=3).go_on([0.1, 0.1], until=2)
    record, fails = tmp_path / "epoch_2.pth.committed", [errno.EIO]
    before, real = record.read_bytes(), getattr(local.LocalStore, operation)
    reached = {"delete": lambda *names: names == (record.name,), "settle": lambda *_: not record.exists()}

    def fail(store: Any, *names: str) -> None:
        if fails and reached.get(operation, lambda *names: names[-1] == "epoch_2.pth")(*names):
            raise OSError(fails.pop(), "it is broken")
        real(store, *names)

    monkeypatch.setattr(local.LocalStore, operation, fail)
    with pytest.raises(SaveFailed, match="it is broken"):
        loop.hook.after_val_epoch(loop, {"acc": 0.9})
    assert not fails and record.read_bytes() == before
    assert read_pth(tmp_path / "epoch_2.pth") and not [*tmp_path.glob(".draft-*")]


def test_a_best_off_the_interval_is_written_whole_and_linked(tmp_path):
    train(tmp_path, [0.1, 0.2, 0.9, 0.3, 0.4], epochs=5, interval=2, save_best="acc")
    assert (tmp_path / "best_acc_epoch_3.pth").samefile(tmp_path / "epoch_3.pth")
    assert "optimizer" in held(tmp_path / "epoch_3.pth")
    told = info(tmp_path / "epoch_3.pth")
    assert (told["best_score"], told["best_ckpt"]) == (0.9, str(tmp_path / "best_acc_epoch_3.pth"))


def test_a_best_before_the_first_periodic_file_moves_no_last_checkpoint(tmp_path):
    Loop(tmp_path, CheckpointHook(interval=2, save_best="acc")).go_on([0.5], until=1)
    assert best(tmp_path) == ["best_acc_epoch_1.pth"] and not (tmp_path / "last_checkpoint").exists()


def test_a_best_after_it_does(tmp_path):
    Loop(tmp_path, CheckpointHook(interval=2, save_best="acc"), epochs=9).go_on([0.5, 0.6, 0.7], until=3)
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "epoch_3.pth")
    assert info(tmp_path / "epoch_3.pth")["last_ckpt"] == str(tmp_path / "epoch_3.pth")


def test_a_training_that_ends_at_a_best_has_it_as_its_last(tmp_path):
    train(tmp_path, [0.9], epochs=9, until=1, interval=5, save_best="acc")
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "epoch_1.pth")
    assert json.loads((tmp_path / "epoch_1.pth.committed").read_text())["reasons"] == ["best", "last"]


def test_several_metrics_have_each_their_best(tmp_path):
    reports = [{"acc": 0.5, "a/loss": 1.0}, {"acc": 0.4, "a/loss": 0.5}, {"acc": 0.3, "a/loss": 0.7}]
    loop = train(tmp_path, reports, interval=1, max_keep_ckpts=1, save_best=["acc", "a/loss"])
    assert best(tmp_path) == ["best_a_loss_epoch_2.pth", "best_acc_epoch_1.pth"]
    told = loop.message_hub.runtime_info
    assert (told["best_score_acc"], told["best_score_a/loss"]) == (0.5, 0.5)
    assert loop.hook.best_ckpt_path_dict == {
        "acc": str(tmp_path / "best_acc_epoch_1.pth"),
        "a/loss": str(tmp_path / "best_a_loss_epoch_2.pth"),
    }


def test_auto_takes_the_first_metric_for_good(tmp_path):
    reports = [{"acc": 0.5, "mAP": 0.1}, {"mAP": 0.9, "acc": 0.4}, {"mAP": 0.2, "acc": 0.6}]
    loop = train(tmp_path, reports, interval=1, save_best="auto")
    assert (loop.hook.key_indicators, loop.hook.rules) == (["acc"], ["greater"])
    assert best(tmp_path) == ["best_acc_epoch_3.pth"]


def test_auto_with_a_metric_of_no_known_rule_fails_at_the_first_report(tmp_path):
    with pytest.raises(ValueError, match="Cannot infer the rule for key fid"):
        train(tmp_path, [{"fid": 1.0}], save_best="auto")


@pytest.mark.parametrize(("rule", "name"), [("greater", "best_acc_epoch_2.pth"), ("less", "best_acc_epoch_1.pth")])
def test_the_given_rule_decides(tmp_path, rule, name):
    train(tmp_path, [0.1, 0.9, 0.5], interval=1, save_best="acc", rule=rule)
    assert best(tmp_path) == [name]


def test_of_equals_the_first_stays_the_best(tmp_path):
    train(tmp_path, [0.5, 0.5, 0.5], interval=1, save_best="acc")
    assert best(tmp_path) == ["best_acc_epoch_1.pth"]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), float("-inf"), torch.tensor(float("nan"))])
def test_what_is_no_finite_number_is_never_the_best(tmp_path, value, caplog):
    train(tmp_path, [value, 0.1, value], interval=1, save_best="acc")
    assert best(tmp_path) == ["best_acc_epoch_2.pth"]
    assert "acc is" in caplog.text


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor(0.5), np.array([0.5]), 1])
def test_numbers_of_other_libraries_are_numbers(tmp_path, value):
    loop = train(tmp_path, [0.25, value, 0.25], interval=1, save_best="acc")
    assert best(tmp_path) == ["best_acc_epoch_2.pth"]
    assert type(loop.message_hub.runtime_info["best_score"]) is float


@pytest.mark.parametrize("value", ["high", True, torch.ones(2)])
def test_what_is_no_number_is_a_type_error(tmp_path, value):
    with pytest.raises(TypeError, match="metric acc should be one number"):
        train(tmp_path, [value], interval=1, save_best="acc")
    assert best(tmp_path) == []


def test_a_missing_metric_is_a_key_error_that_names_the_nearest(tmp_path):
    with pytest.raises(KeyError, match=r"metric acc was not reported.*did you mean val/acc\?"):
        train(tmp_path, [{"val/acc": 0.1}], interval=1, save_best="acc")


def test_no_metrics_at_all_are_warned_of_and_skipped(tmp_path, caplog):
    train(tmp_path, [{}, 0.5, {}], interval=1, save_best="acc")
    assert best(tmp_path) == ["best_acc_epoch_2.pth"]
    assert caplog.text.count("`metrics` is an empty dict") == 2


def test_metrics_that_nobody_asked_for_are_let_be(tmp_path, caplog):
    train(tmp_path, [{"acc": 0.5, "table": "| a |"}], epochs=1, interval=1)
    assert files(tmp_path) == ["epoch_1.pth"] and "empty" not in caplog.text


def test_names_of_metrics_cannot_leave_the_directory(tmp_path):
    train(tmp_path / "run", [{"../../acc (top 1)": 0.5}], epochs=1, interval=1, save_best="auto")
    assert best(tmp_path / "run") == ["best_.._.._acc__top_1__epoch_1.pth"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_metrics_that_would_share_a_file_are_refused():
    with pytest.raises(ValueError, match="a/acc.*a_acc"):
        CheckpointHook(save_best=["a/acc", "a_acc"])


# The best after a restart


def test_the_best_survives_a_restart(tmp_path):
    train(tmp_path, [0.5, 0.9], epochs=2, interval=1, save_best="acc", max_keep_ckpts=1)
    loop = go_on(tmp_path, [0, 0, 0.7], epochs=3, interval=1, save_best="acc", max_keep_ckpts=1)
    assert files(tmp_path) == ["best_acc_epoch_2.pth", "epoch_3.pth"]
    assert loop.hook.best_ckpt_path == str(tmp_path / "best_acc_epoch_2.pth")
    assert loop.message_hub.runtime_info["best_score"] == 0.9


def test_it_survives_several(tmp_path):
    train(tmp_path, [0.9], epochs=1, interval=1, save_best="acc", max_keep_ckpts=1)
    for last in (2, 3, 4):
        go_on(tmp_path, [0, 0.1, 0.2, 0.3], epochs=last, interval=1, save_best="acc", max_keep_ckpts=1)
    assert files(tmp_path) == ["best_acc_epoch_1.pth", "epoch_4.pth"]
    go_on(tmp_path, [0, 0, 0, 0, 0.95], epochs=5, interval=1, save_best="acc", max_keep_ckpts=1)
    assert files(tmp_path) == ["best_acc_epoch_5.pth", "epoch_5.pth"]


@pytest.mark.parametrize("async_save, known", [(True, 0.2), (False, 0.9)])
def test_a_best_that_no_periodic_file_knows_survives_too(tmp_path, async_save, known):
    # Killed at epoch 4: in the background the file of epoch 3 is not written again, and tells of an older best.
    hook = CheckpointHook(interval=3, save_best="acc", async_save=async_save)
    Loop(tmp_path, hook, epochs=6).go_on([0.1, 0.2, 0.9], until=3)
    hook._require_open()[0].run.settle()
    assert info(tmp_path / "epoch_3.pth")["best_score"] == known
    loop = go_on(tmp_path, [0, 0, 0, 0.5, 0.6, 0.7], epochs=6, interval=3, save_best="acc")
    assert loop.hook.best_ckpt_path == str(tmp_path / "best_acc_epoch_3.pth")
    assert best(tmp_path) == ["best_acc_epoch_3.pth"]


def test_the_best_moves_with_the_directory(tmp_path):
    train(tmp_path / "old", [0.9], epochs=1, interval=1, save_best="acc")
    shutil.move(tmp_path / "old", tmp_path / "new")
    loop = Loop(tmp_path / "new", CheckpointHook(interval=1, save_best="acc"), epochs=3)
    loop.resume(tmp_path / "new" / "epoch_1.pth").train([0, 0.5, 0.95])
    assert loop.hook.best_ckpt_path == str(tmp_path / "new" / "best_acc_epoch_3.pth")
    assert best(tmp_path / "new") == ["best_acc_epoch_3.pth"]


def test_a_copied_run_never_deletes_in_the_original(tmp_path):
    train(tmp_path / "original", [0.5, 0.9], epochs=2, interval=1, save_best="acc", max_keep_ckpts=1)
    before = files(tmp_path / "original")
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    loop = Loop(tmp_path / "copy", CheckpointHook(interval=1, save_best="acc", max_keep_ckpts=1), epochs=3)
    loop.resume(tmp_path / "copy" / "epoch_2.pth").train([0, 0, 0.95])
    assert files(tmp_path / "original") == before
    assert all((tmp_path / "original" / name).exists() for name in before)
    assert files(tmp_path / "copy") == ["best_acc_epoch_3.pth", "epoch_3.pth"]


def test_a_best_of_stock_mmengine_holds_and_is_not_deleted(tmp_path):
    (tmp_path / "best_acc_epoch_4.pth").write_bytes(b"of stock MMEngine")
    loop = Loop(tmp_path, CheckpointHook(interval=1, save_best="acc"), epochs=6)
    loop.message_hub.runtime_info |= {"best_score": np.float64(0.8), "best_ckpt": "/elsewhere/best_acc_epoch_4.pth"}
    loop.epoch, loop.iter = 4, 8
    loop.hook.before_train(loop)
    assert loop.hook.best_ckpt_path == str(tmp_path / "best_acc_epoch_4.pth")
    loop.go_on([0, 0, 0, 0, 0.7], until=5)
    assert best(tmp_path) == []
    loop.train([0, 0, 0, 0, 0, 0.9])
    assert best(tmp_path) == ["best_acc_epoch_6.pth"]
    assert (tmp_path / "best_acc_epoch_4.pth").read_bytes() == b"of stock MMEngine"


def test_a_score_whose_file_is_gone_does_not_block_a_new_best(tmp_path):
    train(tmp_path, [0.9, 0.1], epochs=2, interval=1, save_best="acc")
    for path in tmp_path.glob("best_*"):
        path.unlink()
    go_on(tmp_path, [0, 0, 0.5], epochs=3, interval=1, save_best="acc")
    assert best(tmp_path) == ["best_acc_epoch_3.pth"]


def test_another_metric_is_not_judged_by_the_score_of_the_first(tmp_path):
    train(tmp_path, [0.9, 0.1], epochs=2, interval=1, save_best="acc")
    go_on(tmp_path, [0, 0, {"mIoU": 0.4}], epochs=3, interval=1, save_best="mIoU")
    assert best(tmp_path) == ["best_acc_epoch_1.pth", "best_mIoU_epoch_3.pth"]


def test_one_metric_and_then_two_remember_the_first(tmp_path):
    train(tmp_path, [0.9], epochs=1, interval=1, save_best="acc")
    loop = go_on(tmp_path, [0, {"acc": 0.4, "mIoU": 0.1}], epochs=2, interval=1, save_best=["acc", "mIoU"])
    assert loop.hook.best_ckpt_path_dict["acc"] == str(tmp_path / "best_acc_epoch_1.pth")
    assert best(tmp_path) == ["best_acc_epoch_1.pth", "best_mIoU_epoch_2.pth"]


def test_auto_after_a_restart_deletes_nothing_before_it_knows_the_metric(tmp_path):
    train(tmp_path, [0.9], epochs=1, interval=1, save_best="auto")
    loop = Loop(tmp_path, CheckpointHook(interval=1, save_best="auto"), epochs=3)
    loop.resume(tmp_path / "epoch_1.pth").go_on([0, {}], until=2)
    assert best(tmp_path) == ["best_acc_epoch_1.pth"]
    loop.train([0, 0, 0.95])
    assert best(tmp_path) == ["best_acc_epoch_3.pth"]


def test_a_new_training_in_an_old_directory_has_a_best_of_its_own(tmp_path):
    train(tmp_path, [0.1, 0.1, 0.9], interval=1, save_best="acc")
    loop = train(tmp_path, [0.2, 0.1], epochs=2, interval=1, save_best="acc")
    assert loop.hook.best_ckpt_path == str(tmp_path / "best_acc_epoch_1.pth")
    assert best(tmp_path) == ["best_acc_epoch_1.pth", "best_acc_epoch_3.pth"]


# Publishing


def published(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if re.search(r"-[0-9a-f]{8}\.pth$", path.name))


def test_last_and_best_are_published_stripped(tmp_path):
    train(tmp_path, [0.1, 0.9, 0.5], interval=1, save_best="acc", published_keys=["meta", "state_dict"])
    names = published(tmp_path)
    assert [re.sub("-.*", "", name) for name in names] == ["best_acc_epoch_2", "epoch_3"]
    assert all(list(held(tmp_path / name)) == ["meta", "state_dict"] for name in names)
    assert held(tmp_path / names[0])["meta"]["epoch"] == 2


def test_torch_hub_accepts_a_published_file_by_its_name(tmp_path):
    train(tmp_path / "run", published_keys="state_dict")
    (name,) = published(tmp_path / "run")
    url = (tmp_path / "run" / name).as_uri()
    loaded = torch.hub.load_state_dict_from_url(
        url, model_dir=tmp_path / "hub", check_hash=True, progress=False, weights_only=True
    )
    assert torch.equal(
        loaded["state_dict"]["0.weight"], held(tmp_path / "run" / "epoch_3.pth")["state_dict"]["0.weight"]
    )


def test_the_same_file_is_published_under_the_same_name(tmp_path):
    train(tmp_path, interval=1, published_keys="state_dict")
    names = published(tmp_path)
    loop = Loop(tmp_path, CheckpointHook(interval=1, published_keys="state_dict"))
    loop.resume(tmp_path / "epoch_3.pth").train()
    assert published(tmp_path) == names and len(names) == 1


def test_a_metric_that_never_improved_is_skipped(tmp_path):
    reports = [{"acc": 0.5, "loss": None}]
    train(tmp_path, reports, epochs=1, interval=1, save_best=["acc", "loss"], published_keys="meta")
    assert [re.sub("-.*", "", name) for name in published(tmp_path)] == ["best_acc_epoch_1", "epoch_1"]


def test_without_save_last_only_the_best_is_published(tmp_path):
    train(tmp_path, [0.5], epochs=1, interval=1, save_last=False, save_best="acc", published_keys="meta")
    assert [re.sub("-.*", "", name) for name in published(tmp_path)] == ["best_acc_epoch_1"]


def test_a_key_that_is_not_there_is_warned_of(tmp_path, caplog):
    train(tmp_path, published_keys=["state_dict", "ema"])
    assert "epoch_3.pth has no ema" in caplog.text


def test_a_published_file_is_never_a_half_one(tmp_path, monkeypatch):
    def fails(value: Any, stream: Any) -> None:
        stream.write(b"half of a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(RankFailure, match="publishing failed.*No space left"):
        Loop(tmp_path, CheckpointHook(published_keys="meta")).train()
    assert published(tmp_path) == [] and epochs(tmp_path) == [3]


# Killed


WORDS: dict[str, Any] = {"interval": 1, "save_best": "acc", "max_keep_ckpts": 1}
CURVE = [0.5, 0.6, 0.9, 0.7]


def go_on_and_die(folder: Path, at: int) -> bool:
    """A process of its own goes on with the training in ``folder``; it is killed in place of its ``at``-th operation
    on a file. Whether it was."""
    child = os.fork()
    if child == 0:
        try:
            count_down(at)
            go_on(folder, CURVE, epochs=3, **WORDS)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def count_down(at: int) -> None:
    done = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **named: Any) -> Any:
            nonlocal done
            done += 1
            if done > at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **named)

        return operation

    for name in FaultyStore._CHANGING:
        setattr(local.LocalStore, name, counted(getattr(local.LocalStore, name)))
    local.FileSink.write = counted(local.FileSink.write)


@pytest.mark.timeout(300)
def test_killed_at_any_operation_it_resumes_and_loses_nothing(tmp_path):
    train(tmp_path / "start", CURVE, epochs=2, **WORDS)
    at, was_killed = 0, True
    while was_killed:
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "start", folder)
        (folder / "last_checkpoint").write_text(str(folder / "epoch_2.pth"))
        was_killed = go_on_and_die(folder, at)
        pointed = Path((folder / "last_checkpoint").read_text())
        assert held(pointed)["meta"]["epoch"] in (2, 3), at
        assert best(folder), at
        assert all(read_pth(folder / name) for name in files(folder)), at
        was_known = "best_acc_epoch_3.pth" in best(folder)
        go_on(folder, CURVE, epochs=4, **WORDS)
        # A runner does not validate again what it resumes: what was killed before it told its metrics is not judged.
        expected = "best_acc_epoch_3.pth" if was_known or pointed.name == "epoch_2.pth" else "best_acc_epoch_4.pth"
        assert files(folder) == [expected, "epoch_4.pth"], at
        assert sorted(path.name for path in folder.glob("*.pth")) == [expected, "epoch_4.pth"], at
        assert not [*folder.glob(".draft-*"), *folder.glob(".trash-*")], at
        shutil.rmtree(folder)
        at += 1
    assert at > 30


# In the background


def test_a_background_save_holds_the_state_of_its_moment(tmp_path):
    loop = train(tmp_path, [0.1, 0.9, 0.5], interval=1, save_best="acc", max_keep_ckpts=2, async_save=True)
    assert files(tmp_path) == ["best_acc_epoch_2.pth", "epoch_2.pth", "epoch_3.pth"]
    assert torch.equal(held(tmp_path / "epoch_3.pth")["state_dict"]["0.weight"], loop.model[0].weight)
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "epoch_3.pth")


def test_a_failure_in_the_background_is_raised_and_training_may_go_on(tmp_path, monkeypatch):
    mend = break_saves(monkeypatch, after=1)
    loop = Loop(tmp_path, CheckpointHook(interval=1, async_save=True), epochs=5)
    with pytest.raises(SaveFailed, match="No space left"):
        loop.go_on()
    mend()
    assert epochs(tmp_path)[0] == 1
    loop.epoch += 1  # the epoch at whose end it was raised
    loop.train()
    assert epochs(tmp_path)[-1] == 5


# Control


def test_who_makes_a_file_called_stop_stops_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("distckpt.triggers._CONTROL_PERIOD", type("Now", (), {"total_seconds": lambda self: 0.0})())
    loop = Loop(tmp_path, CheckpointHook(interval=5), epochs=9)
    loop.train_loop = type("TrainLoop", (), {"stop_training": False})()
    loop.go_on(until=1)
    (tmp_path / "STOP").touch()
    loop.go_on(until=2)
    assert loop.train_loop.stop_training and epochs(tmp_path) == [2]


def test_every_word_of_ours_is_documented():
    assert all(word in (CheckpointHook.__doc__ or "") for word in OURS)


def test_mmengine_is_used_where_it_is_and_never_imported():
    root = Path(sys.modules["distckpt.hook"].__file__ or "").parent
    sources = {path.name: path.read_text() for path in root.rglob("*.py")}
    assert len(sources) > 40
    assert [name for name, text in sources.items() if re.search(r"^\s*(import|from) mmengine", text, re.M)] == []

"""The hook under MMEngine's own Runner: as a default hook, resumed by it, and as its own tests want it."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine._strategy import DeepSpeedStrategy
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.registry import METRICS
from mmengine.runner import FlexibleRunner, Runner
from mmengine.testing import RunnerTestCase

from distckpt import CheckpointHook
from distckpt.formats.pth import read_pth

# accuracy and loss after each epoch: the best by one is not the best by the other
CURVE = [(0.1, 0.5), (0.9, 0.4), (0.5, 0.1), (0.6, 0.3), (0.7, 0.2), (0.8, 0.6)]


class Interrupted(Exception):
    """Training ends here."""


class CurveMetric(BaseMetric):
    """Tells of the next point of the curve."""

    default_prefix = "val"

    def __init__(self, start: int = 0, fails_at: int | None = None) -> None:
        super().__init__()
        self._next = start
        self._fails_at = fails_at

    def process(self, *_: Any, **__: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: Any) -> dict[str, float]:
        if self._next == self._fails_at:
            raise Interrupted
        acc, loss = CURVE[self._next]
        self._next += 1
        return {"acc": acc, "loss": loss}


@pytest.fixture
def case() -> Iterator[RunnerTestCase]:
    """MMEngine's own test case: its toy model, data and configs, in a directory of its own."""
    case = RunnerTestCase("setUp")
    case.setUp()
    METRICS.register_module(module=CurveMetric, force=True)
    yield case
    METRICS.module_dict.pop("CurveMetric", None)
    case.tearDown()


def build(
    case: RunnerTestCase,
    *,
    epochs: int = 3,
    start: int = 0,
    fails_at: int | None = None,
    resume: bool = False,
    custom_hooks: Sequence[dict[str, Any]] = (),
    scheduler: dict[str, Any] | None = None,
    kind: type[Any] = Runner,
    **words: Any,
) -> Any:
    """A runner with the hook, whose validations go on in the curve from ``start``, and fail at ``fails_at``."""
    by_epoch = words.setdefault("by_epoch", True)
    cfg = Config((case.epoch_based_cfg if by_epoch else case.iter_based_cfg).to_dict())
    if by_epoch:
        cfg.train_cfg.max_epochs = epochs
        cfg.val_evaluator = dict(type="CurveMetric", start=start, fails_at=fails_at)
    cfg.param_scheduler = [scheduler or dict(type="StepLR", step_size=2, by_epoch=by_epoch)]
    cfg.optim_wrapper.optimizer.lr = 1e-3
    cfg.custom_hooks = list(custom_hooks)
    cfg.resume = resume
    cfg.default_hooks = dict(checkpoint=dict(type="distckpt.CheckpointHook", **words))
    if kind is FlexibleRunner:
        cfg.env_cfg = dict()
        cfg.pop("launcher", None)
    cfg.experiment_name = case.experiment_name
    return kind.from_cfg(cfg)


def hook_of(runner: Runner) -> CheckpointHook:
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    return hook


def files(runner: Runner) -> list[str]:
    return sorted(path.name for path in Path(runner.work_dir).glob("*.pth"))


def info(path: Path | str) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["message_hub"]["runtime_info"]


def test_three_epochs_with_two_metrics_and_published_files(case):
    runner = build(
        case,
        interval=1,
        max_keep_ckpts=2,
        save_best=["val/acc", "val/loss"],
        rule=["greater", "less"],
        published_keys=["meta", "state_dict"],
    )
    runner.train()
    names = [name if "-" not in name else name[: name.index("-")] for name in files(runner)]
    assert sorted(names) == [
        *("best_val_acc_epoch_2", "best_val_acc_epoch_2.pth", "best_val_loss_epoch_3", "best_val_loss_epoch_3.pth"),
        *("epoch_2.pth", "epoch_3", "epoch_3.pth"),
    ]
    hub = runner.message_hub
    assert (hub.get_info("best_score_val/acc"), hub.get_info("best_score_val/loss")) == (0.9, 0.1)
    assert hub.get_info("keep_ckpt_ids") == [2, 3]
    assert hub.get_info("last_ckpt") == f"{runner.work_dir}/epoch_3.pth"
    assert (Path(runner.work_dir) / "last_checkpoint").read_text() == hub.get_info("last_ckpt")


def test_a_file_has_what_the_runner_itself_would_save(case):
    runner = build(case, interval=1)
    runner.train()
    runner.save_checkpoint(runner.work_dir, "stock.pth", by_epoch=False, meta={"epoch": 3, "iter": 12})
    ours = torch.load(Path(runner.work_dir) / "epoch_3.pth", weights_only=True)
    stock = read_pth(Path(runner.work_dir) / "stock.pth")
    assert ours.keys() == stock.keys()
    assert ours["meta"].keys() == stock["meta"].keys()
    assert (ours["meta"]["epoch"], ours["meta"]["iter"], ours["meta"]["cfg"]) == (3, 12, stock["meta"]["cfg"])
    assert ours["message_hub"].keys() == stock["message_hub"].keys()
    assert ours["message_hub"]["log_scalars"].keys() <= stock["message_hub"]["log_scalars"].keys()
    assert ours["optimizer"].keys() == stock["optimizer"].keys()
    assert ours["param_schedulers"] == stock["param_schedulers"]
    for key, value in stock["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value)


def test_the_runner_resumes_without_being_told_to_unpickle(case):
    build(case, epochs=2, interval=1, save_best="val/acc").train()
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
    runner = build(case, epochs=4, start=2, interval=1, save_best="val/acc", resume=True)
    runner.train()
    assert (runner.epoch, runner.iter) == (4, 16)
    assert files(runner) == ["best_val_acc_epoch_2.pth", *(f"epoch_{epoch}.pth" for epoch in (1, 2, 3, 4))]
    assert runner.message_hub.get_info("best_score") == 0.9
    assert hook_of(runner).best_ckpt_path == f"{runner.work_dir}/best_val_acc_epoch_2.pth"


@pytest.mark.parametrize(
    "scheduler",
    [
        dict(type="StepLR", step_size=2, by_epoch=True),
        dict(type="OneCycleLR", eta_max=0.01, total_steps=16, by_epoch=False),  # whose state holds functions
    ],
    ids=["StepLR", "OneCycleLR"],
)
@pytest.mark.parametrize("kind", [Runner, FlexibleRunner])
def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not(case, scheduler, kind):
    def weights(runner: Runner) -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in runner.model.state_dict().items()}

    case.epoch_based_cfg.train_dataloader.sampler.shuffle = False
    case.epoch_based_cfg.randomness = dict(seed=0)
    words = dict(epochs=4, interval=1, scheduler=scheduler, kind=kind)
    whole = build(case, **words)
    whole.train()
    case.clear_work_dir()
    with pytest.raises(Interrupted):
        build(case, fails_at=1, **words).train()
    resumed = build(case, start=2, resume=True, **words)
    resumed.train()
    assert resumed.iter == 16 and files(resumed) == [f"epoch_{epoch}.pth" for epoch in (1, 2, 3, 4)]
    assert all(torch.equal(value, weights(resumed)[key]) for key, value in weights(whole).items())


def test_the_history_of_logs_goes_on(case):
    build(case, epochs=2, interval=1).train()
    runner = build(case, epochs=3, interval=1, resume=True)
    runner.train()
    history = runner.message_hub.log_scalars["train/loss"]
    assert isinstance(history, HistoryBuffer)
    assert len(history.data[0]) == 12
    assert history.mean(5) == pytest.approx(history.data[0][-5:].mean())


def test_stock_mmengine_resumes_our_files_but_for_its_logs(case):
    build(case, epochs=2, interval=1).train()
    runner = build(case, epochs=3, interval=1, resume=True)
    checkpoint = torch.load(Path(runner.work_dir) / "epoch_2.pth", weights_only=True)
    hub = MessageHub.get_instance("fresh")
    hub.load_state_dict(checkpoint["message_hub"])
    assert hub.get_info("epoch") == 1 and hub.get_info("last_ckpt").endswith("epoch_2.pth")
    assert "train/loss" not in hub.log_scalars


def test_a_checkpoint_of_the_stock_hook_is_gone_on_with(case, monkeypatch):
    cfg = Config(case.epoch_based_cfg.to_dict())
    cfg.val_evaluator = dict(type="CurveMetric")
    cfg.default_hooks = dict(checkpoint=dict(type="CheckpointHook", interval=1, save_best="val/acc", rule="greater"))
    case.build_runner(cfg).train()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    runner = build(case, epochs=4, start=2, interval=1, save_best="val/acc", resume=True)
    runner.train()
    assert files(runner) == ["best_val_acc_epoch_2.pth", *(f"epoch_{epoch}.pth" for epoch in (1, 2, 3, 4))]
    assert runner.message_hub.get_info("best_score") == 0.9
    held = read_pth(Path(runner.work_dir) / "epoch_1.pth")
    assert list(held["message_hub"]["log_scalars"]["train/loss"]) == ["log_history", "count_history", "max_length"]


def test_a_damaged_file_is_passed_over_at_a_resume(case, caplog):
    build(case, epochs=3, interval=1).train()
    damaged = Path(case.temp_dir.name) / "epoch_3.pth"
    os.truncate(damaged, damaged.stat().st_size // 2)
    with caplog.at_level(logging.WARNING, "distckpt"):
        runner = build(case, epochs=3, start=2, interval=1, resume=True)
        runner.train()
    assert "epoch_3.pth is damaged and passed over" in caplog.text
    assert torch.load(damaged, weights_only=True)["meta"]["epoch"] == 3, "trained and saved again"


@pytest.mark.parametrize("pointer", ["", "nothing"])
def test_a_lost_last_checkpoint_is_found_again(case, pointer):
    build(case, epochs=2, interval=1).train()
    path = Path(case.temp_dir.name) / "last_checkpoint"
    path.write_text(pointer) if pointer else path.unlink()
    resumed_from = Path(case.temp_dir.name) / "epoch_2.pth"
    written = resumed_from.stat().st_mtime_ns
    runner = build(case, epochs=3, start=2, interval=1, resume=True)
    runner.train()
    assert resumed_from.stat().st_mtime_ns == written, "trained again from the start"
    assert runner.iter == 12 and len(runner.message_hub.log_scalars["train/loss"].data[0]) == 12


def test_a_moved_work_dir_resumes_where_it_is_now(case, tmp_path, caplog):
    build(case, epochs=2, interval=1, save_best="val/acc", max_keep_ckpts=1).train()
    before = sorted(Path(case.temp_dir.name).iterdir())
    shutil.copytree(case.temp_dir.name, tmp_path / "copy")
    case.epoch_based_cfg.work_dir = str(tmp_path / "copy")
    runner = build(case, epochs=4, start=0, interval=1, save_best="val/acc", max_keep_ckpts=1, resume=True)
    with caplog.at_level(logging.WARNING, "distckpt"):
        runner.train()
    assert f"now says {tmp_path / 'copy' / 'epoch_2.pth'}" in caplog.text, "not resumed from the original"
    assert runner.iter == 16
    assert files(runner) == ["best_val_acc_epoch_2.pth", "epoch_4.pth"]
    assert sorted(Path(case.temp_dir.name).iterdir()) == before


def test_iterations_are_counted_in_a_loop_of_iterations(case):
    runner = build(case, by_epoch=False, interval=5, max_keep_ckpts=1, save_best="acc")
    runner.train()
    assert files(runner) == ["best_acc_iter_12.pth", "iter_10.pth", "iter_12.pth"]
    assert (Path(runner.work_dir) / "iter_12.pth").samefile(Path(runner.work_dir) / "best_acc_iter_12.pth")


def test_epochs_in_a_loop_of_iterations_are_warned_of(case):
    runner = build(case, by_epoch=False, interval=1)
    hook = CheckpointHook(interval=1, by_epoch=True)
    runner.train_loop  # noqa: B018  built on first use
    with pytest.MonkeyPatch.context() as patch:
        told: list[str] = []
        patch.setattr(runner.logger, "warning", told.append)
        hook.before_train(runner)
    assert any("use by_epoch=False" in one for one in told)


def test_early_stopping_leaves_the_last_state(case):
    stop = dict(type="EarlyStoppingHook", monitor="val/acc", rule="greater", patience=1, min_delta=0.0)
    runner = build(case, epochs=6, interval=5, custom_hooks=[stop])
    runner.train()
    assert files(runner) == ["epoch_3.pth"]
    assert (Path(runner.work_dir) / "last_checkpoint").read_text().endswith("epoch_3.pth")


def test_the_averaged_weights_of_the_ema_hook_are_what_is_saved_and_resumed(case):
    ema = dict(type="EMAHook", momentum=0.5)
    first = build(case, epochs=2, interval=1, custom_hooks=[ema])
    first.train()
    held = torch.load(Path(first.work_dir) / "epoch_2.pth", weights_only=True)
    (hook,) = [hook for hook in first.hooks if isinstance(hook, EMAHook)]
    averaged = hook.ema_model.module.state_dict()
    assert all(torch.equal(value, averaged[key]) for key, value in held["state_dict"].items())
    assert "ema_state_dict" in held
    resumed = build(case, epochs=3, start=2, interval=1, custom_hooks=[ema], resume=True)
    resumed.train()
    assert resumed.iter == 12


def test_strategies_that_keep_their_state_to_themselves_are_refused_before_training(case):
    runner = build(case)
    runner.strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # to construct one needs DeepSpeed
    with pytest.raises(TypeError, match="DeepSpeedStrategy keeps"):
        runner.train()


def test_it_says_what_the_runner_asks_of_a_hook(case):
    runner = build(case)
    assert "(VERY_LOW    ) CheckpointHook" in runner.get_hooks_info()
    assert set(hook_of(runner).get_triggered_stages()) >= {"before_train", "after_train_epoch", "after_val_epoch"}


def test_clients_and_backends_of_mmengine_are_there_for_those_who_ask(case):
    runner = build(case)
    plain, old = CheckpointHook(), CheckpointHook(file_client_args={"backend": "disk"})
    plain.before_train(runner)
    old.before_train(runner)
    assert type(plain.file_client).__name__ == "FileClient" and type(plain.file_backend).__name__ == "LocalBackend"
    assert old.file_backend is old.file_client


def test_each_best_is_one_file_with_a_record(case):
    runner = build(case, epochs=2, interval=1, save_best="val/acc")
    runner.train()
    names = [path.name for path in Path(runner.work_dir).iterdir()]
    assert [name for name in names if name.startswith("best")] == ["best_val_acc_epoch_2.pth"]
    record = json.loads((Path(runner.work_dir) / ".best_val_acc_epoch_2.pth.committed").read_text())
    assert (record["metrics"], record["reasons"], record["format"]) == ({"val/acc": 0.9}, ["best"], "pth")
    assert (Path(runner.work_dir) / "best_val_acc_epoch_2.pth").samefile(Path(runner.work_dir) / "epoch_2.pth")

"""The hook under MMEngine's own Runner, with a backend: what goes to the other place, when, and what comes back."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

pytest.importorskip("mmengine")

import matplotlib.pyplot  # noqa: F401  a runner imports it: once here, and not in each forked rank
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.fileio import FileClient, LocalBackend, register_backend
from mmengine.fileio.backends import backends, prefix_to_backends
from mmengine.hooks import Hook
from mmengine.registry import METRICS
from mmengine.runner import FlexibleRunner, Runner
from mmengine.testing import RunnerTestCase

from distckpt import CheckpointHook, DamagedCheckpoint, NoCheckpoint, RankFailure

RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
FIRST_IS_BEST = [0.9, 0.5, 0.4, 0.3, 0.2, 0.1]


class Told(BaseMetric):
    """Tells of the accuracies that it was given."""

    def __init__(self, curve: list[float], start: int = 0) -> None:
        super().__init__()
        self._curve = iter(curve[start:])

    def process(self, *_: Any, **__: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: Any) -> dict[str, float]:
        return {"acc": next(self._curve)}


class Elsewhere(LocalBackend):
    """A backend whose place, ``elsewhere://``, is a folder. It knows what was asked of it, and fails when told to."""

    folder: Path
    calls: list[tuple[str, str]]
    fails: list[str]
    kills: list[str]

    @classmethod
    def begin(cls, folder: Path) -> None:
        cls.folder, cls.calls, cls.fails, cls.kills = folder, [], [], []

    def _at(self, filepath: str) -> Path:
        return self.folder / str(filepath).removeprefix("elsewhere:").lstrip("/")

    def _called(self, method: str, filepath: str) -> None:
        name = Path(filepath).name
        if f"{method} {name}" in self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        if f"{method} {name}" in self.fails:
            self.fails.remove(f"{method} {name}")
            raise OSError(errno.ENOSPC, "No space left on device", str(filepath))
        self.calls.append((method, name))

    def put(self, obj: bytes, filepath: str) -> None:
        self._called("put", filepath)
        super().put(obj, self._at(filepath))

    def get(self, filepath: str) -> bytes:
        self._called("get", filepath)
        return super().get(self._at(filepath))

    def isfile(self, filepath: str) -> bool:
        self._called("isfile", filepath)
        return super().isfile(self._at(filepath))

    def exists(self, filepath: str) -> bool:
        self._called("exists", filepath)
        return super().exists(self._at(filepath))

    def remove(self, filepath: str) -> None:
        self._called("remove", filepath)
        self._at(filepath).unlink()

    def join_path(self, filepath: str, *filepaths: str) -> str:
        return "/".join([str(filepath), *filepaths])


@pytest.fixture
def case() -> Iterator[RunnerTestCase]:
    """MMEngine's own test case: its toy model, data and configs, in a directory of its own."""
    case = RunnerTestCase("setUp")
    case.setUp()
    METRICS.register_module(module=Told, force=True)
    yield case
    METRICS.module_dict.pop("Told", None)
    case.tearDown()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[type[Elsewhere]]:
    Elsewhere.begin(tmp_path / "elsewhere")
    FileClient.register_backend("elsewhere", Elsewhere, prefixes="elsewhere", force=True)
    register_backend("elsewhere", Elsewhere, prefixes="elsewhere", force=True)
    yield Elsewhere
    for known in (FileClient._backends, FileClient._prefix_to_backends, backends, prefix_to_backends):
        known.pop("elsewhere", None)
    FileClient._instances.clear()


@pytest.fixture
def memory() -> Iterator[str]:
    """A place in the memory of this process."""
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def build(
    case: RunnerTestCase,
    *,
    epochs: int = 3,
    curve: list[float] = RISING,
    start: int = 0,
    resume: bool = False,
    kind: type[Any] = Runner,
    **words: Any,
) -> Any:
    by_epoch = words.setdefault("by_epoch", True)
    cfg = Config((case.epoch_based_cfg if by_epoch else case.iter_based_cfg).to_dict())
    cfg.val_evaluator = dict(type="Told", curve=curve, start=start)
    if by_epoch:
        cfg.train_cfg.max_epochs = epochs
    cfg.train_cfg.val_interval = 1 if by_epoch else 4
    cfg.param_scheduler = [dict(type="StepLR", step_size=2, by_epoch=by_epoch)]
    cfg.optim_wrapper.optimizer.lr = 1e-3
    cfg.train_dataloader.sampler.shuffle = False
    cfg.randomness = dict(seed=0)
    cfg.resume = resume
    cfg.default_hooks = dict(checkpoint=dict(type="distckpt.CheckpointHook", **words))
    cfg.experiment_name = f"{case.experiment_name}{uuid.uuid4().hex}"
    if kind is FlexibleRunner:
        cfg.env_cfg = dict()
        cfg.pop("launcher", None)
    return kind.from_cfg(cfg)


def hook_of(runner: Runner) -> CheckpointHook:
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    return hook


def base(case: RunnerTestCase) -> str:
    return Path(case.temp_dir.name).name


def copies(case: RunnerTestCase, backend: type[Elsewhere]) -> list[str]:
    return sorted(path.name for path in (backend.folder / base(case)).glob("*"))


def here(case: RunnerTestCase) -> list[str]:
    return sorted(path.name for path in Path(case.temp_dir.name).glob("*.pth"))


def lose(case: RunnerTestCase) -> None:
    """The directory is lost, as is what the process knows."""
    shutil.rmtree(case.temp_dir.name)
    Path(case.temp_dir.name).mkdir()


def counted(backend: type[Elsewhere]) -> dict[str, int]:
    """How often each method was called since the last time."""
    told = Counter(method for method, _ in backend.calls)
    backend.calls.clear()
    return dict(told)


def weights(runner: Runner) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in runner.model.state_dict().items()}


WORDS = {
    "file_client_args": dict(file_client_args=dict(backend="elsewhere")),
    "backend_args": dict(backend_args=dict(backend="elsewhere")),
    "scheme": dict(out_dir="elsewhere://runs"),
}


def words_of(kind: str) -> dict[str, Any]:
    return {"out_dir": "elsewhere://runs", **WORDS[kind]}


# What is asked of a backend


@pytest.mark.parametrize("by_epoch", [True, False])
@pytest.mark.parametrize("kind", WORDS)
def test_a_best_save_is_one_put_and_what_it_beats_one_isfile_and_one_remove(case, elsewhere, kind, by_epoch):
    runner = build(case, by_epoch=by_epoch)
    hook = CheckpointHook(interval=2, by_epoch=by_epoch, save_best="acc", **words_of(kind))
    hook.before_train(runner)
    assert counted(elsewhere) == {}
    for nth in (1, 2, 3):
        runner.train_loop._epoch += 1
        runner.train_loop._iter += 1
        hook.after_val_epoch(runner, {"acc": nth / 10})
        assert counted(elsewhere) == ({"put": 1} if nth == 1 else {"put": 1, "isfile": 1, "remove": 1})
    name = f"best_acc_{'epoch' if by_epoch else 'iter'}_3.pth"
    assert [path.name for path in (elsewhere.folder / "runs" / base(case)).iterdir()] == [name]
    assert hook.best_ckpt_path == runner.message_hub.get_info("best_ckpt") == f"elsewhere://runs/{base(case)}/{name}"
    assert not (Path(runner.work_dir) / "last_checkpoint").exists()


def test_a_periodic_save_is_a_put_of_the_file_and_one_of_what_points_to_it(case, elsewhere):
    runner = build(case, interval=1, max_keep_ckpts=1, out_dir="elsewhere://")
    runner.train()
    assert elsewhere.calls == [
        *(("put", "epoch_1.pth"), ("put", "last_checkpoint")),
        *(("put", "epoch_2.pth"), ("put", "last_checkpoint"), ("isfile", "epoch_1.pth"), ("remove", "epoch_1.pth")),
        *(("put", "epoch_3.pth"), ("put", "last_checkpoint"), ("isfile", "epoch_2.pth"), ("remove", "epoch_2.pth")),
    ]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_best_of_what_was_saved_just_now_is_one_put_too(case, elsewhere, async_save):
    build(case, interval=1, save_best="acc", out_dir="elsewhere://", async_save=async_save).train()
    puts = [name for method, name in elsewhere.calls if method == "put" and name != "last_checkpoint"]
    once_more = [] if async_save else ["epoch_{}.pth"]  # as the stock hook does
    each = ["epoch_{}.pth", *once_more, "best_acc_epoch_{}.pth"]
    assert Counter(puts) == Counter(name.format(nth) for nth in (1, 2, 3) for name in each)


def test_off_the_interval_only_what_a_restart_reads_goes_there_beside_the_best(case, elsewhere):
    build(case, epochs=4, interval=3, save_best="acc", out_dir="elsewhere://").train()
    puts = [name for method, name in elsewhere.calls if method == "put" and name != "last_checkpoint"]
    assert puts == [
        *("best_acc_epoch_1.pth", "best_acc_epoch_2.pth", "epoch_3.pth", "best_acc_epoch_3.pth", "epoch_3.pth"),
        *("epoch_4.pth", "best_acc_epoch_4.pth", "epoch_4.pth"),
    ]
    assert copies(case, elsewhere) == ["best_acc_epoch_4.pth", "epoch_3.pth", "epoch_4.pth", "last_checkpoint"]


# What is where


def test_copies_are_what_is_in_the_directory_and_nothing_else(case, elsewhere):
    runner = build(case, interval=1, max_keep_ckpts=2, save_best="acc", curve=FIRST_IS_BEST, out_dir="elsewhere://")
    runner.train()
    names = ["best_acc_epoch_1.pth", "epoch_2.pth", "epoch_3.pth"]
    assert here(case) == names
    assert copies(case, elsewhere) == [*names, "last_checkpoint"]
    for name in names:
        assert (elsewhere.folder / base(case) / name).read_bytes() == (Path(runner.work_dir) / name).read_bytes()


def test_the_hub_and_the_hook_say_the_place_of_the_copies_and_last_checkpoint_the_file_that_is_resumed(case, elsewhere):
    runner = build(case, interval=1, save_best="acc", out_dir="elsewhere://runs")
    runner.train()
    root, hub, hook = f"elsewhere://runs/{base(case)}", runner.message_hub, hook_of(runner)
    assert hook.out_dir == root
    assert hub.get_info("last_ckpt") == hook.last_ckpt == f"{root}/epoch_3.pth"
    assert hub.get_info("best_ckpt") == hook.best_ckpt_path == f"{root}/best_acc_epoch_3.pth"
    assert (Path(runner.work_dir) / "last_checkpoint").read_text() == f"{runner.work_dir}/epoch_3.pth"
    assert (elsewhere.folder / "runs" / base(case) / "last_checkpoint").read_text() == f"{root}/epoch_3.pth"


def test_clients_and_backends_are_those_of_mmengine(case, elsewhere):
    runner = build(case)
    new = CheckpointHook(out_dir="elsewhere://", backend_args=dict(backend="elsewhere"))
    old = CheckpointHook(out_dir="elsewhere://", file_client_args=dict(backend="elsewhere"))
    for hook in (new, old):
        hook.before_train(runner)
        assert isinstance(hook.file_client, FileClient)
    assert isinstance(new.file_backend, Elsewhere)
    assert old.file_backend is old.file_client


def test_a_backend_that_only_the_new_registry_knows_is_used(case, elsewhere):
    FileClient._prefix_to_backends.pop("elsewhere")
    runner = build(case, interval=1, out_dir="elsewhere://")
    runner.train()
    assert "epoch_3.pth" in copies(case, elsewhere)


def test_the_backend_that_is_named_decides_and_not_the_path(case, elsewhere, tmp_path):
    out_dir = tmp_path / "plain"
    runner = build(case, interval=1, out_dir=str(out_dir), backend_args=dict(backend="elsewhere"))
    runner.train()
    assert hook_of(runner).last_ckpt == f"{out_dir}/{base(case)}/epoch_3.pth"
    assert not out_dir.exists()
    assert (elsewhere.folder / str(out_dir).lstrip("/") / base(case) / "epoch_3.pth").is_file()


@pytest.mark.parametrize("async_save", [False, True])
def test_files_of_fsspec_take_any_url(case, memory, async_save):
    runner = build(case, interval=1, max_keep_ckpts=1, save_best="acc", out_dir=memory, async_save=async_save)
    runner.train()
    root = f"{memory}/{base(case)}"
    found = sorted(Path(path).name for path in fsspec.filesystem("memory").ls(root, detail=False))
    assert found == ["best_acc_epoch_3.pth", "epoch_3.pth", "last_checkpoint"]
    assert fsspec.filesystem("memory").cat(f"{root}/last_checkpoint").decode() == f"{root}/epoch_3.pth"
    assert hook_of(runner).file_backend is hook_of(runner).file_client


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_a_url_of_a_file_system_is_a_place_like_any_other(case, tmp_path, scheme):
    build(case, interval=1, max_keep_ckpts=1, out_dir=f"{scheme}://{tmp_path}/x[1]").train()
    assert sorted(path.name for path in (tmp_path / "x[1]" / base(case)).iterdir()) == [
        "epoch_3.pth",
        "last_checkpoint",
    ]


def test_arguments_beside_the_backend_are_storage_options(case, tmp_path):
    options = dict(backend="fsspec", path=str(tmp_path / "deep"), target_protocol="file")
    build(case, interval=1, out_dir="dir://runs", backend_args=options).train()
    assert (tmp_path / "deep" / "runs" / base(case) / "epoch_3.pth").is_file()


def test_published_files_go_there_too(case, elsewhere):
    build(case, interval=1, save_best="acc", published_keys=["meta", "state_dict"], out_dir="elsewhere://").train()
    published = [name for name in here(case) if "-" in name]
    assert len(published) == 2 and set(published) <= set(copies(case, elsewhere))


# What goes wrong


@pytest.mark.parametrize(
    ("name", "beaten"),
    [
        ("epoch_2.pth", "epoch_1.pth"),
        ("last_checkpoint", "epoch_1.pth"),
        ("best_acc_epoch_2.pth", "best_acc_epoch_1.pth"),
    ],
)
def test_a_copy_that_fails_is_raised_and_made_up_for_at_the_next_start(case, elsewhere, name, beaten):
    words = dict(interval=1, max_keep_ckpts=1, save_best="acc", out_dir="elsewhere://")
    build(case, epochs=1, **words).train()
    elsewhere.fails.append(f"put {name}")
    with pytest.raises(RankFailure, match=rf"rank 0: .*{name} could not be written: OSError.*No space left.*safe at"):
        build(case, start=1, resume=True, **words).train()
    assert "epoch_2.pth" in here(case)
    assert beaten in copies(case, elsewhere), "the old one is there until the new one is"
    runner = build(case, start=2, resume=True, **words)
    runner.train()
    assert runner.iter == 12
    assert copies(case, elsewhere) == ["best_acc_epoch_3.pth", "epoch_3.pth", "last_checkpoint"]


def test_in_the_background_a_copy_that_fails_is_warned_of_and_made_up_for_at_the_next_save(case, elsewhere, caplog):
    elsewhere.fails.append("put epoch_1.pth")
    with caplog.at_level(logging.WARNING, "distckpt"):
        build(case, interval=1, out_dir="elsewhere://", async_save=True).train()
    assert "epoch_1.pth could not be written" in caplog.text
    assert copies(case, elsewhere) == ["epoch_1.pth", "epoch_2.pth", "epoch_3.pth", "last_checkpoint"]


class SaysWhenEpochsEnd(Hook):
    priority = "LOWEST"

    def __init__(self) -> None:
        self.second = threading.Event()

    def after_train_epoch(self, runner: Runner) -> None:
        if runner.epoch == 1:
            self.second.set()


def test_in_the_background_no_save_waits_for_a_copy(case, elsewhere, monkeypatch):
    runner = build(case, interval=1, max_keep_ckpts=1, save_best="acc", out_dir="elsewhere://", async_save=True)
    says, put, waited = SaysWhenEpochsEnd(), elsewhere.put, []
    runner.register_hook(says)

    def slow(self: Elsewhere, obj: bytes, filepath: str) -> None:
        waited.append(says.second.wait(30))
        put(self, obj, filepath)

    monkeypatch.setattr(elsewhere, "put", slow)
    runner.train()
    assert waited and all(waited), "the second save was made while the first was being copied"
    assert copies(case, elsewhere) == ["best_acc_epoch_3.pth", "epoch_3.pth", "last_checkpoint"]


def test_in_the_background_what_is_not_there_at_the_end_is_raised(case, elsewhere):
    elsewhere.fails += ["put epoch_3.pth"] * 9  # that of another file may come to it first
    with pytest.raises(RankFailure, match="epoch_3.pth could not be written"):
        build(case, interval=1, out_dir="elsewhere://", async_save=True).train()
    assert "epoch_3.pth" in here(case)


def test_a_copy_that_cannot_be_removed_is_removed_later(case, elsewhere, caplog):
    runner = build(case, interval=1, max_keep_ckpts=1, out_dir="elsewhere://")
    removed = elsewhere.remove
    elsewhere.remove = lambda self, path: 1 / 0
    try:
        with caplog.at_level(logging.WARNING, "distckpt"):
            runner.train()
    finally:
        elsewhere.remove = removed
    assert "could not be removed, and will be tried again" in caplog.text
    assert "epoch_1.pth" in copies(case, elsewhere)
    build(case, epochs=4, interval=1, max_keep_ckpts=1, out_dir="elsewhere://", resume=True).train()
    assert copies(case, elsewhere) == ["epoch_4.pth", "last_checkpoint"]


@pytest.mark.parametrize(
    ("at", "made_up"),
    [
        ("put epoch_2.pth", ["epoch_2.pth", "last_checkpoint"]),
        ("put last_checkpoint", ["last_checkpoint"]),
        ("remove epoch_1.pth", []),
    ],
)
def test_killed_between_the_commit_and_its_copies_the_next_start_makes_up_for_it(case, elsewhere, at, made_up):
    words = dict(interval=1, max_keep_ckpts=1, out_dir="elsewhere://")
    build(case, epochs=1, **words).train()
    runner = build(case, epochs=3, resume=True, **words)
    if (pid := os.fork()) == 0:
        elsewhere.kills.append(at)
        try:
            runner.train()
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert "epoch_2.pth" in here(case)
    elsewhere.calls.clear()
    build(case, epochs=3, resume=True, **words).train()
    puts = [name for method, name in elsewhere.calls if method == "put"]
    assert puts == [*made_up, "epoch_3.pth", "last_checkpoint"]
    assert copies(case, elsewhere) == ["epoch_3.pth", "last_checkpoint"]
    assert (elsewhere.folder / base(case) / "last_checkpoint").read_text().endswith("epoch_3.pth")


# A directory that is lost


@pytest.mark.parametrize("kind", [Runner, FlexibleRunner])
def test_where_the_directory_is_lost_the_run_goes_on_from_the_copies_bit_for_bit(case, elsewhere, kind):
    words = dict(epochs=4, interval=1, max_keep_ckpts=2, save_best="acc", out_dir="elsewhere://", kind=kind)
    whole = build(case, curve=FIRST_IS_BEST, **words)
    whole.train()
    expected = weights(whole)
    lose(case)
    shutil.rmtree(elsewhere.folder)
    with pytest.raises(StopIteration):
        build(case, curve=FIRST_IS_BEST[:2], **words).train()
    lose(case)
    resumed = build(case, curve=FIRST_IS_BEST, start=3, resume=True, **words)
    resumed.train()
    assert resumed.iter == 16 and here(case) == ["epoch_3.pth", "epoch_4.pth"]
    assert all(torch.equal(value, weights(resumed)[key]) for key, value in expected.items())
    assert resumed.message_hub.get_info("best_score") == 0.9
    assert hook_of(resumed).best_ckpt_path == f"elsewhere:///{base(case)}/best_acc_epoch_1.pth"
    assert copies(case, elsewhere) == ["best_acc_epoch_1.pth", "epoch_3.pth", "epoch_4.pth", "last_checkpoint"]


def test_a_best_that_only_the_lost_directory_had_goes_when_it_is_beaten(case, elsewhere):
    words = dict(interval=1, max_keep_ckpts=1, save_best="acc", out_dir="elsewhere://")
    build(case, epochs=3, curve=[0.5, 0.4, 0.3], **words).train()
    lose(case)
    build(case, epochs=5, curve=[0.45, 0.6], resume=True, **words).train()
    assert copies(case, elsewhere) == ["best_acc_epoch_5.pth", "epoch_5.pth", "last_checkpoint"]


def test_what_was_fetched_is_a_checkpoint_of_the_run_like_any_other(case, elsewhere):
    words = dict(interval=1, out_dir="elsewhere://")
    build(case, epochs=2, **words).train()
    lose(case)
    elsewhere.calls.clear()
    build(case, epochs=3, resume=True, **words).train()
    assert (Path(case.temp_dir.name) / "epoch_2.pth.committed").is_file()
    assert ("put", "epoch_2.pth") not in elsewhere.calls


def test_where_another_directory_has_gone_on_with_the_run_this_one_follows(case, elsewhere, tmp_path, caplog):
    words = dict(interval=1, max_keep_ckpts=2, out_dir="elsewhere://")
    build(case, epochs=2, **words).train()
    left = tmp_path / "left"
    shutil.copytree(case.temp_dir.name, left)
    lose(case)
    build(case, epochs=4, resume=True, **words).train()
    lose(case)
    shutil.copytree(left, case.temp_dir.name, dirs_exist_ok=True)
    with caplog.at_level(logging.WARNING, "distckpt"):
        runner = build(case, epochs=5, resume=True, **words)
        runner.train()
    assert "epoch_4.pth is fetched" in caplog.text
    assert runner.iter == 20 and len(runner.message_hub.log_scalars["train/loss"].data[0]) == 20
    assert here(case) == ["epoch_4.pth", "epoch_5.pth"]
    assert copies(case, elsewhere) == ["epoch_4.pth", "epoch_5.pth", "last_checkpoint"]


def test_what_another_training_left_there_is_not_gone_on_with(case, elsewhere, caplog):
    build(case, epochs=3, interval=1, out_dir="elsewhere://").train()
    lose(case)
    build(case, epochs=2, interval=1).train()
    with caplog.at_level(logging.WARNING, "distckpt"):
        runner = build(case, epochs=3, interval=1, out_dir="elsewhere://", resume=True)
        runner.train()
    assert "is of another run" in caplog.text
    assert here(case) == ["epoch_1.pth", "epoch_2.pth", "epoch_3.pth"]


def test_what_cannot_be_asked_there_does_not_stop_a_run_that_is_here(case, elsewhere, caplog):
    words = dict(interval=1, out_dir="elsewhere://")
    build(case, epochs=2, **words).train()
    elsewhere.fails.append("isfile last_checkpoint")
    with caplog.at_level(logging.WARNING, "distckpt"):
        runner = build(case, epochs=3, resume=True, **words)
        runner.train()
    assert "the run goes on with what is in" in caplog.text and runner.iter == 12


def test_what_cannot_be_asked_there_is_an_error_where_nothing_is_here(case, elsewhere):
    words = dict(interval=1, out_dir="elsewhere://")
    build(case, epochs=2, **words).train()
    lose(case)
    elsewhere.fails.append("isfile last_checkpoint")
    with pytest.raises(RankFailure, match="last_checkpoint cannot be read, so it is not known what there is"):
        build(case, epochs=3, resume=True, **words).train()


def test_with_nothing_at_the_other_place_training_starts_anew(case, elsewhere):
    runner = build(case, interval=1, out_dir="elsewhere://", resume=True)
    runner.train()
    assert runner.iter == 12


def test_a_copy_that_is_missing_is_named(case, elsewhere):
    build(case, interval=1, out_dir="elsewhere://").train()
    lose(case)
    (elsewhere.folder / base(case) / "epoch_3.pth").unlink()
    with pytest.raises(NoCheckpoint, match="epoch_3.pth is not there, which .*last_checkpoint says to resume from"):
        build(case, interval=1, out_dir="elsewhere://", resume=True).train()


def test_a_copy_that_is_not_whole_is_not_resumed_from(case, elsewhere):
    build(case, interval=1, out_dir="elsewhere://").train()
    lose(case)
    copy = elsewhere.folder / base(case) / "epoch_3.pth"
    os.truncate(copy, copy.stat().st_size // 2)
    with pytest.raises(DamagedCheckpoint, match="epoch_3.pth is not whole"):
        build(case, interval=1, out_dir="elsewhere://", resume=True).train()
    assert here(case) == []


def test_copies_of_memory_come_back_too(case, memory):
    build(case, epochs=2, interval=1, out_dir=memory).train()
    lose(case)
    runner = build(case, epochs=3, interval=1, out_dir=memory, resume=True)
    runner.train()
    assert runner.iter == 12 and here(case) == ["epoch_2.pth", "epoch_3.pth"]


# What is refused


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (dict(backend_args=dict(backend="petrol")), "backend_args: there is no backend 'petrol'; there are .*fsspec"),
        (dict(file_client_args=dict(backend="petrol")), "file_client_args: there is no backend 'petrol'"),
        (dict(backend_args=dict(backend="lmdb")), r"'lmdb' \(LmdbBackend\) cannot be written to"),
        (dict(backend_args=dict(backend="memcached")), "'memcached' .* cannot be written to"),
        (dict(out_dir="https://host/x"), r"out_dir: the backend 'https' \(HTTPBackend\) cannot be written to"),
        (dict(out_dir="nowhere://x"), "Protocol not known: nowhere"),
        (dict(out_dir="s3://x", backend_args=dict(backend="local")), "writes to directories"),
        (dict(out_dir="dir://x::file:///y"), "chain of URLs"),
        (dict(out_dir="s3://x", format="sharded"), "should be a directory, is the URL"),
    ],
)
def test_what_cannot_be_written_to_is_refused_before_training(case, words, told):
    with pytest.raises(ValueError, match=told):
        build(case, interval=1, **words).train()
    assert here(case) == []


def test_a_package_that_is_missing_is_named(case):
    with pytest.raises(ImportError, match="pip install paramiko"):
        build(case, interval=1, out_dir="sftp://host/x").train()


def test_the_directory_itself_is_no_other_place(case):
    parent = Path(case.temp_dir.name).parent
    with pytest.raises(ValueError, match="leads to the work_dir itself"):
        build(case, interval=1, out_dir=f"file://{parent}").train()

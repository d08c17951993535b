"""The engine in a run: what a save that goes wrong costs it, what a process leaves behind, how much memory it takes."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.trainings import WIDTH, Training, adam, spelled
from safetensors.torch import load_file
from torch import nn

from distckpt import Checkpointer, SaveFailed
from distckpt.engine import copying, plan
from distckpt.errors import DistckptError
from distckpt.stores.file_sink import FileSink

pytestmark = pytest.mark.timeout(60)

SOON = timedelta(seconds=20)
MIB = 1024 * 1024


def start(folder: Path, training: Training, **words: Any) -> Checkpointer:
    words = {"snapshot": "lazy", "timeout": SOON, "save_last": False, **words}
    return Checkpointer(folder, training.parts(), **words)


def saved(folder: Path, step: int) -> Any:
    """The model in that checkpoint, by the stock reader."""
    return spelled(load_file(folder / f"step-{step:08}" / "model.safetensors"))


def model_of(training: Training) -> Any:
    return spelled(dict(training.model.state_dict()))


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def advance(training: Training, ckpt: Checkpointer) -> None:
    training.step()
    ckpt.step()


# Torn


def test_what_is_torn_at_the_end_fails_by_its_name_and_the_next_save_is_good(held, tmp_path):
    training = Training()
    with start(tmp_path, training) as ckpt:
        advance(training, ckpt)
        ckpt.save()
        training.weight.data.add_(1)
        with pytest.raises(
            SaveFailed, match=r"save of step 1 .*: rank 0: weight of model\.safetensors changed while it"
        ):
            ckpt.wait()
        assert ckpt.latest is None
        ckpt.save()
        training.weight.data.add_(1)  # which is copied at once by now
        now = model_of(training)
        training.weight.data.sub_(1)
        held.go.set()
        ckpt.wait()
        assert saved(tmp_path, 1) != now and ckpt.latest is not None


def test_a_run_that_ends_with_something_torn_says_so(held, tmp_path):
    training = Training()
    ckpt = start(tmp_path, training)
    advance(training, ckpt)
    ckpt.save()
    training.weight.data.add_(1)
    with pytest.raises(SaveFailed, match=r"weight of model\.safetensors changed"):
        ckpt.close()
    assert start(tmp_path, training).latest is None


def test_what_is_taken_again_is_as_it_is_before_the_step_and_told(held, tmp_path, caplog):
    training = Training()
    with start(tmp_path, training) as ckpt:
        advance(training, ckpt)
        ckpt.save()
        training.weight.data.add_(1)
        now = model_of(training)
        training.step()
        ckpt.wait()
        assert saved(tmp_path, 1) == now != model_of(training)
    assert "weight of model.safetensors changed while it was being copied" in caplog.text
    (event,) = [one for one in events(tmp_path) if one["event"] == "saved"]
    assert event["engine"]["retakes"] == 1 and event["engine"]["waited_seconds"] > 0


# Failures


class Broken(RuntimeError):
    pass


def break_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def move(*_: object) -> None:
        raise Broken("the memory is gone")

    for module in (copying, plan):
        monkeypatch.setattr(module, "move", move)


@pytest.mark.parametrize("snapshot", ["eager", "lazy"])
def test_a_snapshot_that_fails_is_a_save_that_failed_and_training_goes_on(snapshot, tmp_path, monkeypatch):
    training = Training()
    with start(tmp_path, training, snapshot=snapshot) as ckpt:
        advance(training, ckpt)
        ckpt.save(wait=True)
        before = saved(tmp_path, 1)
        advance(training, ckpt)
        with monkeypatch.context() as patched:
            break_copies(patched)
            ckpt.save()
            with pytest.raises(SaveFailed, match="save of step 2 .*: rank 0: Broken: the memory is gone"):
                ckpt.wait()
        assert ckpt.latest.progress.step == 1 and saved(tmp_path, 1) == before
        advance(training, ckpt)
        ckpt.save(wait=True)
        assert saved(tmp_path, 3) == model_of(training)


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("is_bounded", [False, True])
def test_a_snapshot_that_fails_on_one_rank_is_told_on_all(broken, is_bounded, small_blocks, tmp_path, run_ranks):
    def work(rank: int, folder: str) -> None:
        training = Training(model=nn.Linear(WIDTH, 10 * WIDTH, bias=False))
        words = {"arena_bytes": 2 * MIB, "snapshot": "eager"} if is_bounded else {}
        ckpt = start(Path(folder), training, **words)
        advance(training, ckpt)
        ckpt.save(wait=True)
        advance(training, ckpt)
        with pytest.MonkeyPatch.context() as patched:
            if rank == broken:
                break_copies(patched)
            with pytest.raises(SaveFailed, match=f"rank {broken}: Broken: the memory is gone"):
                ckpt.save(wait=True)
        assert ckpt.latest.progress.step == 1
        ckpt.save(wait=True)
        assert ckpt.latest.progress.step == 2
        ckpt.close()
        assert rank or saved(Path(folder), 2) == model_of(training)

    run_ranks(2, work, str(tmp_path))


@pytest.mark.parametrize("at", [1, 30])
def test_a_disk_that_fills_lets_training_go_on(at, small_blocks, tmp_path, monkeypatch):
    training = Training(model=nn.Linear(WIDTH, 10 * WIDTH, bias=False))
    with start(tmp_path, training, arena_bytes=2 * MIB) as ckpt:
        advance(training, ckpt)
        ckpt.save(wait=True)
        advance(training, ckpt)
        writes = 0
        write = FileSink.write

        def full(sink: FileSink, data: Any) -> None:
            nonlocal writes
            writes += 1
            if writes > at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")
            write(sink, data)

        with monkeypatch.context() as patched:
            patched.setattr(FileSink, "write", full)
            ckpt.save()
            with pytest.raises(SaveFailed, match="No space left on device"):
                ckpt.wait()
        assert ckpt.latest.progress.step == 1
        ckpt.save(wait=True)
        assert saved(tmp_path, 2) == model_of(training)


def test_a_writer_that_dies_is_no_writer_that_hangs(small_blocks, tmp_path, monkeypatch):
    training = Training(model=nn.Linear(WIDTH, 10 * WIDTH, bias=False))
    write = FileSink.write

    def die(sink: FileSink, data: Any) -> None:
        if len(data) == small_blocks:
            sys.exit("killed")
        write(sink, data)

    monkeypatch.setattr(FileSink, "write", die)
    with pytest.raises(SaveFailed, match="SystemExit: killed"), start(tmp_path, training, arena_bytes=2 * MIB) as ckpt:
        advance(training, ckpt)
        ckpt.save()
        ckpt.wait()
    assert not list(tmp_path.glob("*.committed"))


def test_an_interrupt_while_a_snapshot_is_taken_ends_training_and_leaves_what_was_saved(tmp_path, monkeypatch):
    training = Training()
    ckpt = start(tmp_path, training)
    advance(training, ckpt)
    ckpt.save(wait=True)
    advance(training, ckpt)
    with monkeypatch.context() as patched:
        patched.setattr(plan, "move", lambda *_: signal.raise_signal(signal.SIGINT))
        pytest.raises(KeyboardInterrupt, ckpt.save)
    with pytest.raises(SaveFailed, match="the snapshot was interrupted"):
        ckpt.close()
    assert start(tmp_path, training).latest.progress.step == 1


# Two in one process


def test_two_checkpointers_save_what_is_theirs_and_each_step_waits_for_both(held, tmp_path):
    pair = Training(), Training(lambda parameters: adam(parameters, fused=True))
    ckpts = [start(tmp_path / str(nth), training) for nth, training in enumerate(pair)]
    for training, ckpt in zip(pair, ckpts, strict=True):
        advance(training, ckpt)
    before = [model_of(training) for training in pair]
    for ckpt in ckpts:
        ckpt.save()
    pair[0].step()
    pair[1].weight.data.add_(1)  # of which nothing is being copied any more
    for nth, ckpt in enumerate(ckpts):
        ckpt.close()
        assert saved(tmp_path / str(nth), 1) == before[nth]


# Memory


def test_fifty_saves_take_no_more_memory_than_ten(scratch, run_ranks):
    def work(_: int, folder: str) -> list[int]:
        training = Training(model=nn.Linear(WIDTH, 10 * WIDTH, bias=False))
        taken, arenas = [], set()
        with start(Path(folder), training, max_keep_ckpts=1, interval=1) as ckpt:
            for step in range(50):
                advance(training, ckpt)
                arenas.add(id(ckpt._stager._arena))
                if step in (9, 49):
                    ckpt.wait()
                    taken.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
        assert len(arenas) == 1
        return taken

    ((ten, fifty),) = run_ranks(1, work, str(scratch / "run"))
    assert fifty - ten < 8 * MIB


def test_a_state_that_the_system_has_no_memory_for_is_refused_before_training(tmp_path, run_ranks):
    def work(_: int, folder: str) -> None:
        training = Training(torch.optim.SGD, nn.Linear(WIDTH, 300 * WIDTH, bias=False))  # 31 MB
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 24 * MIB, resource.RLIM_INFINITY))
        with pytest.raises(DistckptError, match=r"needs 3\d MB of host memory, which the system does not give"):
            start(Path(folder), training)

    run_ranks(1, work, str(tmp_path))


# The end of a process

SCRIPT = """
import atexit, os, sys, threading
import torch
from engine.trainings import Training
from distckpt import Checkpointer
from distckpt.engine.snapshot import Staging

torch.set_num_threads(1)  # or children could not be forked
Training()  # what torch imports with the first step is imported once
cases = [case.split(":") for case in sys.argv[1:]]
for folder, ends, what in cases:
    if not os.fork():
        break
else:
    for _ in cases:
        os.wait()
    sys.exit(0)

atexit.register(os._exit, 0)  # the last of all: what else the interpreter does at its end takes seconds
os.dup2(os.open(f"{folder}/words", os.O_WRONLY | os.O_CREAT), 2)
go, copy_late = threading.Event(), Staging._copy_late
Staging._copy_late = lambda staging: (go.wait(60), copy_late(staging))
training = Training()
ckpt = Checkpointer(f"{folder}/run", training.parts(), snapshot="lazy", save_last=False)
atexit.register(go.set)  # before the writer is waited for: what is registered last comes first
training.step()
ckpt.step()
torch.save(training.model.state_dict(), f"{folder}/before")
ckpt.save()
if what == "torn":
    training.weight.data.add_(1)
if ends == "sys.exit":
    sys.exit(0)
elif ends == "exception":
    raise RuntimeError("the loop has failed")
elif ends == "with":
    with ckpt:
        raise RuntimeError("the loop has failed")
"""

ENDS = ("falls off", "sys.exit", "exception", "with")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """The folders of processes that ended in each of these ways while a copy was under way."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    cases = [(ends, what) for ends in ENDS for what in ("whole", "torn")]
    folders = {case: tmp_path_factory.mktemp("ended") for case in cases}
    told = [":".join([str(folder), *case]) for case, folder in folders.items()]
    subprocess.run(
        [sys.executable, "-c", SCRIPT, *told], env={**os.environ, "PYTHONPATH": path}, check=True, timeout=50
    )
    return folders


@pytest.mark.parametrize("ends", ENDS)
def test_a_process_that_ends_while_a_copy_is_under_way_finishes_the_save(ends, ended):
    folder = ended[ends, "whole"]
    words = (folder / "words").read_text()
    assert saved(folder / "run", 1) == spelled(dict(torch.load(folder / "before", weights_only=True))), words
    assert ("the loop has failed" in words) == (ends in ("exception", "with"))


@pytest.mark.parametrize("ends", ENDS)
def test_a_process_that_ends_with_something_torn_commits_nothing_and_says_why(ends, ended):
    folder = ended[ends, "torn"]
    assert not list(folder.glob("run/*.committed"))
    (why,) = [one["why"] for one in events(folder / "run") if one["event"] == "failed"]
    assert why.startswith("save of step 1") and "weight of model.safetensors changed" in why

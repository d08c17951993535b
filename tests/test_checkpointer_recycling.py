"""With recycle=True a save is written over the files of a checkpoint that retention has deleted, and reads the same."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from distckpt import Checkpointer, SaveFailed, layout
from distckpt.catalog import scan
from distckpt.stores.local import LocalStore

SOON = timedelta(seconds=20)
MIB = 1024 * 1024

pytestmark = pytest.mark.timeout(60)


class Part:
    """Numbers that tell the step, more or fewer of them at each."""

    def __init__(self, mebibytes: int = 20) -> None:
        self.mebibytes = mebibytes
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"numbers": torch.full((self.mebibytes * MIB // 4 + self.step,), float(self.step))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["numbers"][-1])
        self.mebibytes = len(state["numbers"]) * 4 // MIB
        assert torch.equal(state["numbers"], self.state_dict()["numbers"])


def start(out_dir: Path, part: Part, **words: Any) -> Checkpointer:
    words = {"max_keep_ckpts": 1, "recycle": True, "save_last": False, "timeout": SOON, **words}
    return Checkpointer(out_dir, {"part": part}, **words)


def save(ckpt: Checkpointer, part: Part, mebibytes: int = 20) -> int:
    """Another step, saved; which file it is in."""
    part.step, part.mebibytes = part.step + 1, mebibytes
    ckpt.step()
    ckpt.save("interval", wait=True)
    return file_of(ckpt).stat().st_ino


def file_of(ckpt: Checkpointer) -> Path:
    return Path(ckpt._run.store.url) / ckpt.latest.name / "part.safetensors"


def numbers_of(place: Path) -> np.ndarray:
    return load_file(place)["numbers"]


def kept(out_dir: Path) -> list[str]:
    return [path.name for path in out_dir.glob(".spare-*")]


def resumed(out_dir: Path) -> int:
    """The step that is resumed from, every number of which is right."""
    part = Part()
    with start(out_dir, part, recycle=False) as ckpt:
        step = ckpt.resume()
    assert part.step == step
    return step


@pytest.fixture
def out_dir(scratch: Path) -> Path:
    return scratch / "run"


@pytest.mark.parametrize(("recycle", "files"), [(True, 2), (False, 5)])
def test_saves_take_turns_in_two_files_if_that_was_asked_for(out_dir, recycle, files):
    part, seen, held = Part(), [], []
    with start(out_dir, part, recycle=recycle) as ckpt:
        for _ in range(5):
            seen.append(save(ckpt, part))
            # An inode that is free is soon used again: while it is held, that it comes back is no chance.
            if not recycle:
                held.append(file_of(ckpt).open("rb"))
    for file in held:
        file.close()
    assert len(set(seen)) == files and (not recycle or seen[0::2] == [seen[0]] * 3)
    assert resumed(out_dir) == 5


def test_the_state_may_grow_and_shrink(out_dir):
    part = Part()
    with start(out_dir, part) as ckpt:
        for mebibytes in (20, 20, 30, 17, 40, 1, 20):
            save(ckpt, part, mebibytes)
            assert part.step == ckpt.latest.progress.step
            other = Part()
            other.load_state_dict({"numbers": torch.from_numpy(numbers_of(file_of(ckpt)))})
            assert (other.step, other.mebibytes) == (part.step, mebibytes)
    assert resumed(out_dir) == 7


def test_a_copy_of_the_run_whose_files_are_links_keeps_every_checkpoint(out_dir, scratch):
    part = Part()
    with start(out_dir, part) as ckpt:
        for step in range(1, 5):
            save(ckpt, part)
            shutil.copytree(out_dir, scratch / str(step), copy_function=os.link, symlinks=True)
            save(ckpt, part)
    for step in range(1, 5):
        (record,) = scan(LocalStore(scratch / str(step))).records
        assert record.progress.step == 2 * step - 1
        assert set(numbers_of(scratch / str(step) / record.name / "part.safetensors")) == {2.0 * step - 1}


def test_whoever_has_a_file_open_reads_what_it_opened(out_dir):
    part = Part()
    with start(out_dir, part) as ckpt:
        save(ckpt, part)
        with file_of(ckpt).open("rb") as first:
            for _ in range(3):
                save(ckpt, part)
            first.seek(-4, os.SEEK_END)
            assert np.frombuffer(first.read(), np.float32) == 1.0
    assert resumed(out_dir) == 4


def test_while_it_runs_one_file_more_is_there_and_none_when_it_ended(out_dir):
    part = Part()
    with start(out_dir, part) as ckpt:
        save(ckpt, part)
        assert kept(out_dir) == []
        save(ckpt, part)
        assert [name.rpartition("-")[0] for name in kept(out_dir)] == [".spare-part.safetensors"]
    assert kept(out_dir) == []


class Failed(Exception):
    pass


def test_none_is_left_by_a_run_that_fails(out_dir):
    part = Part()
    with pytest.raises(Failed), start(out_dir, part) as ckpt:
        save(ckpt, part)
        save(ckpt, part)
        assert kept(out_dir)
        raise Failed
    assert kept(out_dir) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=50m", "none", str(disk)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs to mount a file system: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_save_that_does_not_fit_fails_and_has_cost_only_what_was_deleted(small_disk):
    part = Part()
    out_dir = small_disk / "run"
    with start(out_dir, part) as ckpt:
        for _ in range(3):
            save(ckpt, part)
        with pytest.raises(SaveFailed, match="No space left on device"):
            save(ckpt, part, 40)
        assert kept(out_dir) == [] and ckpt.latest.progress.step == 3
        assert set(numbers_of(file_of(ckpt))) == {3.0}
        save(ckpt, part, 28)  # as much as is there, but for the one that is kept
    assert resumed(out_dir) == 5


def save_in_turns(rank: int, root: str, steps: int) -> list[int]:
    """Which file this rank wrote at each step."""
    part = torch.nn.Linear(4096, 3000, bias=False)  # 49 MB, of which each rank writes half
    seen = []
    words = {"max_keep_ckpts": 1, "recycle": True, "save_last": False, "timeout": SOON, "format": "sharded"}
    with Checkpointer(root, {"part": part}, **words) as ckpt:
        for _ in range(steps):
            with torch.no_grad():
                part.weight.fill_(float(len(seen)))
            ckpt.step()
            ckpt.save("interval", wait=True)
            torch.distributed.barrier()  # what was the last one is deleted
            seen.append((Path(root) / ckpt.latest.name / layout.shard_file(rank)).stat().st_ino)
            torch.distributed.barrier()
    return seen


@pytest.mark.timeout(120)
def test_each_rank_writes_over_what_it_wrote_before(run_ranks, out_dir):
    for seen in run_ranks(2, save_in_turns, str(out_dir), 5):
        assert seen[0::2] == [seen[0]] * 3 and seen[1::2] == [seen[1]] * 2
    part = torch.nn.Linear(4096, 3000, bias=False)
    with Checkpointer(out_dir, {"part": part}) as ckpt:
        assert ckpt.resume() == 5
    assert torch.equal(part.weight, torch.full_like(part.weight, 4.0))

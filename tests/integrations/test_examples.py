"""The examples, run as people run them: killed in the middle, they end as if they had not been."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch.distributed as dist
from launching import forget, launch

from distckpt.catalog import scan
from distckpt.stores.local import LocalStore

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"
PYTHON = [sys.executable]
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# With --cpu it starts one process, however many are asked for.
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
]
COMMANDS = {
    "accelerate_loop": ACCELERATE,
    "ddp_loop": TWO_RANKS,
    "fsdp2_loop": TWO_RANKS,
    "lightning_trainer": PYTHON,
    "transformers_trainer": PYTHON,
}

pytestmark = pytest.mark.timeout(240)


def start(name: str, folder: Path) -> subprocess.Popen[str]:
    words = [*COMMANDS[name], str(EXAMPLES / f"{name}.py"), "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def run(name: str, folder: Path) -> tuple[str, str]:
    """Its last line, and its log."""
    process = start(name, folder)
    said, told = process.communicate(timeout=100)
    assert process.returncode == 0, told
    return said.splitlines()[-1], told


def run_forked(rank: int, world_size: int, name: str, folder: Path) -> str:
    """Its last line, without the seconds that a launcher and imports take."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    dist.destroy_process_group()
    forget()
    if world_size > 1:
        launch(rank, world_size)
        words = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "LOCAL_WORLD_SIZE": world_size}
        words |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RUN_ID": "none"}
        os.environ.update({name: str(value) for name, value in words.items()})
    path = str(EXAMPLES / f"{name}.py")
    sys.argv = [path, "--out", str(folder)]
    with redirect_stdout(StringIO()) as said:
        runpy.run_path(path, run_name="__main__")
    return (said.getvalue().splitlines() or [""])[-1]


def test_each_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(COMMANDS)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_none_is_long(path):
    assert len(path.read_text().splitlines()) < 80


@pytest.mark.parametrize("name", COMMANDS)
def test_one_that_is_killed_ends_as_if_it_had_not_been(run_ranks, tmp_path, name):
    world_size = 1 if COMMANDS[name] is PYTHON else 2
    whole, *_ = run_ranks(world_size, run_forked, world_size, name, tmp_path / "whole")
    killed = start(name, tmp_path / "run")
    for line in killed.stderr:
        if line.startswith("saved step-00000030"):
            for pid in [*children(killed.pid), killed.pid]:
                os.kill(pid, signal.SIGKILL)
            break
    killed.communicate()
    again, told = run(name, tmp_path / "run")
    assert re.search("resumed step-000000[345]0", told)
    assert again == whole
    for record in scan(LocalStore(tmp_path / "run")).records:
        assert record.world_size == world_size, "its launcher starts as many as it is asked for"


def children(pid: int) -> list[int]:
    """torchrun starts its ranks in sessions of their own."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(word) for word in found.split()]

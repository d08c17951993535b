"""Shows that a training run survives being killed: the same losses and the same weights, bit for bit.

Trains scripts/demo_train.py once without interruption, and once more while it is killed at random moments and started
again with the same command; then compares the two. Exit code 0 means: not one bit differs.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from demo_job import RANKS, STEPS, Hit, Job, Kill, read_losses
from demo_picture import draw

from distckpt.best import parse_metrics
from distckpt.catalog import scan
from distckpt.retention import Retention
from distckpt.stores.local import LocalStore

BUILD = Path(__file__).resolve().parent.parent / "build" / "demo"
MARK = ".distckpt-demo"  # so that only a folder of an earlier demo is ever emptied


def plan(seed: int) -> list[Kill]:
    """Four kills at random moments: of one rank, of everything at once, and two of them in the middle of a write."""
    chance = random.Random(seed)
    return [
        Kill("rank 1", chance.randint(35, 70), in_a_write=False),
        Kill("everything", chance.randint(95, 130), in_a_write=True),
        Kill("rank 0", chance.randint(155, 190), in_a_write=True),
        Kill("everything", chance.randint(215, 270), in_a_write=False),
    ]


def train(out: Path, log: Path) -> None:
    """Trains to the end."""
    if Job(out, log).wait():
        raise SystemExit(f"training failed; see {log}")


def train_and_kill(out: Path, log: Path, kills: list[Kill]) -> list[Hit]:
    """Trains to the end, killed and started again with the same command. A write that had just ended was not hit: the
    kill is made up for at the next one."""
    hits = []
    for kill in kills:
        while True:
            hit = Job(out, log).kill(kill)
            hits.append(hit)
            tell(told(hit))
            if hit.unfinished or not kill.in_a_write:
                break
            kill = Kill(kill.whom, hit.step, in_a_write=True)
        tell("  the same command again")
    train(out, log)
    return hits


def told(hit: Hit) -> str:
    """What the kill hit, for people."""
    where = f"  SIGKILL to {hit.kill.whom} after step {hit.step}"
    if hit.unfinished:
        return f"{where}, in the middle of a write: {', '.join(hit.unfinished)} has no record"
    return where + (", just after a write: once more" if hit.kill.in_a_write else "")


def differences(reference: Path, killed: Path) -> list[str]:
    """Everything in which the two runs differ: losses of every step and rank, weights and optimizer at the end."""
    found = []
    for rank in range(RANKS):
        # A step that was computed more than once counts as it was the last time.
        wanted, got = dict(read_losses(reference, rank)), dict(read_losses(killed, rank))
        steps = [step for step in range(1, STEPS + 1) if step not in wanted or wanted[step] != got.get(step)]
        if steps:
            found.append(f"rank {rank}: the losses of {len(steps)} steps, the first at step {steps[0]}")
    for file in ("model.safetensors", "optimizer.safetensors"):
        first, second = (digest(newest(run) / file) for run in (reference, killed))
        tell(f"  {file:22} reference {first[:16]}  killed {second[:16]}")
        if first != second:
            found.append(file)
    return found


def newest(run: Path) -> Path:
    """The folder of the run's newest checkpoint."""
    return run / "checkpoints" / scan(LocalStore(run / "checkpoints")).records[-1].name


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def table(checkpoints: Path) -> str:
    """What is on disk, and why. The words are those of demo_train.py."""
    records = scan(LocalStore(checkpoints)).records
    retention = Retention.parse(max_keep_ckpts=2, keep_every=100, metrics=parse_metrics("val/acc"))
    kept = retention.kept(records, datetime.now(UTC))
    links = {path.name: str(path.readlink()) for path in checkpoints.iterdir() if path.is_symlink()}
    rows = [("checkpoint", "val/acc", "size", "saved because", "kept because", "links")]
    for record in records:
        accuracy = f"{record.metrics['val/acc']:.4f}" if record.metrics else ""
        to_it = ", ".join(sorted(link for link, target in links.items() if target == record.name))
        size = f"{record.total_bytes / 1e6:.2f} MB"
        rows.append((record.name, accuracy, size, ", ".join(record.reasons), kept.get(record.name, ""), to_it))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


_began = time.monotonic()


def tell(line: str) -> None:
    print(f"[{time.monotonic() - _began:5.1f} s] {line}", flush=True)


def empty(out: Path) -> None:
    """A folder for the output, without what an earlier demo left there."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not (out / MARK).exists():
        raise SystemExit(f"{out} is not empty, and not from an earlier demo: give another folder")
    (out / MARK).touch()
    for run in ("reference", "killed"):
        shutil.rmtree(out / run, ignore_errors=True)
        (out / f"{run}.log").unlink(missing_ok=True)


def main(out: Path, seed: int) -> int:
    empty(out)
    reference, killed = out / "reference", out / "killed"
    tell(f"training on {RANKS} ranks, {STEPS} steps, without interruption: {reference}")
    train(reference, out / "reference.log")
    tell(f"training again, killed at random moments (seed {seed}): {killed}")
    hits = train_and_kill(killed, out / "killed.log", plan(seed))
    again = len(read_losses(killed, 0)) - STEPS
    tell(f"done: {len(hits)} kills, {again} steps computed again. The newest checkpoints of both runs:")
    found = differences(reference, killed)
    title = "Killed and started again: " + ("NOT the same" if found else "not one bit differs")
    draw(reference, killed, hits, out / "demo.png", title)
    tell(f"on disk in {killed / 'checkpoints'}:\n{table(killed / 'checkpoints')}")
    tell(f"picture: {out / 'demo.png'}   logs: {out / 'killed.log'}")
    if found:
        tell("NOT the same: " + "; ".join(found))
        return 1
    tell(f"the same, bit for bit: the losses of all {STEPS} steps on both ranks, the weights, the optimizer")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=BUILD, help="default: build/demo")
    parser.add_argument("--seed", type=int, default=1, help="of the moments at which it is killed")
    arguments = parser.parse_args()
    sys.exit(main(arguments.out, arguments.seed))

"""What a loop around Accelerate pays for checkpoints, and whether it goes on exactly: distckpt beside ``save_state``.

Each trains alike, saves every few steps, and is started again in the middle of an epoch, in a process of its own. Both
end with weights that are compared with those of a run that was never stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distckpt

OURS, STOCK = "Checkpointer(out, accelerator)", "accelerator.save_state"
STEPS, EVERY, STOPPED_AT = 24, 4, 16
WIDTH = 2048  # 8 layers of it and their moments: 0.4 GB


def prepared() -> tuple[Accelerator, nn.Module, Any, Any]:
    set_seed(0)
    accelerator = Accelerator(cpu=True)
    layers = [layer for _ in range(8) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.1))]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    data = TensorDataset(torch.randn(80, WIDTH, generator=torch.Generator().manual_seed(1)))
    loader = DataLoader(data, batch_size=8, shuffle=True)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


def train(name: str, folder: Path, until: int) -> dict[str, Any]:
    """Goes on from what is in ``folder``. The steps with and without a save, and the weights in the end."""
    accelerator, model, optimizer, loader = prepared()
    ckpt = distckpt.Checkpointer(folder, accelerator, interval=EVERY, save_last=False) if name == OURS else None
    step, saved, batches = 0, sorted(folder.glob("step_*")), loader
    if ckpt is not None:
        step = ckpt.resume()
    elif saved:  # as its documentation has it
        accelerator.load_state(str(saved[-1]))
        step = int(saved[-1].name[5:])
        loader.set_epoch(step // len(loader))
        batches = accelerator.skip_first_batches(loader, step % len(loader))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    began = time.perf_counter()
    while step < until:
        for (batch,) in batches:
            loss = model(batch).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if ckpt is not None:
                ckpt.step()
            elif step % EVERY == 0:
                accelerator.save_state(str(folder / f"step_{step:04d}"))
            seconds[step % EVERY == 0].append(time.perf_counter() - began)
            began = time.perf_counter()
            if step == until:
                break
        batches = loader
    if ckpt is not None:
        ckpt.close()
    return {"seconds": seconds, "weights": [one.detach() for one in model.parameters()]}


def apart(name: str, folder: Path, until: int) -> dict[str, Any]:
    """The same in a process of its own."""
    told = folder.with_suffix(".pt")
    subprocess.run([sys.executable, __file__, "--only", name, "--dir", folder, "--until", str(until)], check=True)
    return dict(torch.load(told, weights_only=True))


def row(name: str, folder: Path) -> str:
    whole = apart(name, folder / "whole", STEPS)
    first = apart(name, folder / "run", STOPPED_AT)
    second = apart(name, folder / "run", STEPS)
    files = [path for path in (folder / "whole").rglob("*") if path.is_file() and not path.is_symlink()]
    gigabytes = sum(path.stat().st_size for path in files) / 1e9
    with_save, without = ([*first["seconds"][key], *second["seconds"][key]][1:] for key in (True, False))
    is_exact = all(map(torch.equal, whole["weights"], second["weights"]))
    waits = median(with_save) - median(without)
    told = [f"`{name}`", STEPS // EVERY, len(files), f"{gigabytes:.2f}", f"{waits:.3f}", "yes" if is_exact else "no"]
    return f"| {' | '.join(map(str, told))} |"


def main() -> None:
    called = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    called.add_argument("--only", help=argparse.SUPPRESS)
    called.add_argument("--until", type=int, default=STEPS, help=argparse.SUPPRESS)
    called.add_argument("--dir", type=Path, help="where to save (the temporary folder)")
    asked = called.parse_args()
    if asked.only:
        asked.dir.mkdir(parents=True, exist_ok=True)
        torch.save(train(asked.only, asked.dir, asked.until), asked.dir.with_suffix(".pt"))
        return
    print("| | saves | files | GB | a step with a save takes longer by, s | goes on exactly |\n|" + " --- |" * 6)
    for name in (OURS, STOCK):
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=asked.dir) as folder:
            print(row(name, Path(folder)), flush=True)


if __name__ == "__main__":
    main()

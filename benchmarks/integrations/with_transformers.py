"""What Hugging Face's Trainer pays for checkpoints, and whether it goes on exactly: distckpt beside its own.

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
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from distckpt.integrations.transformers import CheckpointCallback

OURS, STOCK = "CheckpointCallback", 'save_strategy="steps"'
STEPS, EVERY, STOPPED_AT = 24, 4, 16
CONFIG = dict(vocab_size=4096, n_positions=32, n_embd=768, n_layer=4, n_head=12, bos_token_id=0, eos_token_id=0)


class Noisy(Dataset):
    """Sentences, in each of which some word is another whenever it is read."""

    def __len__(self) -> int:
        return 80

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        words = (at * 37 + torch.arange(16) * (at % 7 + 1)) % 4096
        words[torch.randint(16, ())] = torch.randint(4096, ())
        return {"input_ids": words, "labels": words}


class Timed(TrainerCallback):
    """What lies between the beginnings of two steps is what the first took, with its save."""

    def __init__(self) -> None:
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        if self._began:
            self.seconds[state.global_step % EVERY == 0].append(now - self._began)
        self._began = now


class Stopped(TrainerCallback):
    """Ends training early, without a word to what saves."""

    def __init__(self, at: int) -> None:
        self._at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self._at


def train(name: str, folder: Path, until: int) -> dict[str, Any]:
    """Goes on from what is in ``folder``. The steps with and without a save, and the weights in the end."""
    words = dict(save_strategy="no") if name == OURS else dict(save_strategy="steps", save_steps=EVERY)
    args = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=8, use_cpu=True, disable_tqdm=True, report_to=[],
        logging_strategy="no", **words,
    )  # fmt: skip
    timed = Timed()
    ours = [CheckpointCallback(folder, interval=EVERY, save_last=False)] if name == OURS else []
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**CONFIG))
    trainer = Trainer(model=model, args=args, train_dataset=Noisy(), callbacks=[*ours, timed, Stopped(until)])
    trainer.train(resume_from_checkpoint=name == STOCK and any(folder.glob("checkpoint-*")))
    return {"seconds": timed.seconds, "weights": [one.detach() for one in model.parameters()]}


def apart(name: str, folder: Path, until: int) -> dict[str, Any]:
    """The same in a process of its own."""
    told = folder.with_suffix(".pt")
    words = [sys.executable, __file__, "--only", name, "--dir", folder, "--until", str(until)]
    subprocess.run(words, check=True, stdout=sys.stderr)
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

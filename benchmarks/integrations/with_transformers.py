"""What Hugging Face's ``Trainer`` pays for checkpoints, and how exactly it goes on: distckpt beside its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from side_by_side import BATCH, EVERY, STEPS, STEPS_IN_EPOCH, StepTimes, compare
from torch import nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from distckpt.integrations.transformers import CheckpointCallback

OURS, STOCK = "CheckpointCallback", 'save_strategy="steps"'
CONFIG = dict(vocab_size=4096, n_positions=32, n_embd=768, n_layer=4, n_head=12, bos_token_id=0, eos_token_id=0)


class Noisy(Dataset):
    """Sentences, in each of which some word is another whenever it is read."""

    def __len__(self) -> int:
        return BATCH * STEPS_IN_EPOCH

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        words = (at * 37 + torch.arange(16) * (at % 7 + 1)) % 4096
        words[torch.randint(16, ())] = torch.randint(4096, ())
        return {"input_ids": words, "labels": words}


class Timed(TrainerCallback):
    """What lies between the beginnings of two steps is what the first took, with its save."""

    def __init__(self) -> None:
        self.times = StepTimes()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.step(state.global_step)


class Stopped(TrainerCallback):
    """Ends training early, without a word to what saves."""

    def __init__(self, at: int) -> None:
        self._at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self._at


def train(name: str, folder: Path, until: int) -> tuple[dict[int, float], nn.Module]:
    words = dict(save_strategy="no") if name == OURS else dict(save_strategy="steps", save_steps=EVERY)
    quiet = dict(disable_tqdm=True, report_to=[], logging_strategy="no")
    args = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, use_cpu=True, **quiet, **words
    )
    timed = Timed()
    ours = [CheckpointCallback(folder, interval=EVERY, save_last=False)] if name == OURS else []
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**CONFIG))
    trainer = Trainer(model=model, args=args, train_dataset=Noisy(), callbacks=[*ours, timed, Stopped(until)])
    trainer.remove_callback(PrinterCallback)  # the table goes where it prints
    trainer.train(resume_from_checkpoint=name == STOCK and any(folder.glob("checkpoint-*")))
    return timed.times.seconds, model


if __name__ == "__main__":
    compare(train, (OURS, STOCK), __doc__)

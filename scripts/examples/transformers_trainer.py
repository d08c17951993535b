"""Hugging Face's Trainer, which may be killed at any moment: the same command goes on where it was.

python scripts/examples/transformers_trainer.py
torchrun --nproc-per-node 2 scripts/examples/transformers_trainer.py
"""

from __future__ import annotations

import argparse
import logging

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from distckpt.integrations.transformers import CheckpointCallback

STEPS, LENGTH, NUMBERS = 60, 16, 64


class Sequences(Dataset):
    """Arithmetic sequences of numbers below 64, a first number and a distance each."""

    def __len__(self) -> int:
        return NUMBERS * 8

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        first, distance = at % NUMBERS, at // NUMBERS + 1
        words = (first + distance * torch.arange(LENGTH)) % NUMBERS
        return {"input_ids": words, "labels": words}


def main() -> None:
    called = argparse.ArgumentParser()
    called.add_argument("--out", default="runs/transformers")
    out = called.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    args = TrainingArguments(
        f"{out}-trainer",
        save_strategy="no",  # distckpt does it
        max_steps=STEPS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        eval_strategy="steps",
        eval_steps=20,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=NUMBERS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2)
    config.bos_token_id = config.eos_token_id = 0
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=args,
        train_dataset=Sequences(),
        eval_dataset=[Sequences()[at] for at in range(0, len(Sequences()), 31)],
        callbacks=[CheckpointCallback(out, interval=10, max_keep_ckpts=2, save_best="eval_loss")],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        total = sum(one.sum() for one in trainer.model.parameters())
        print(f"step {trainer.state.global_step}, and weights that sum up to {total:.6f}")


if __name__ == "__main__":
    main()

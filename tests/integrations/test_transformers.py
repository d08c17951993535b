"""A ``Trainer`` with our callback is saved whole, and goes on bit for bit as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import DistributedType
from launching import forget, launch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import distckpt
from distckpt import triggers
from distckpt.integrations.transformers import CheckpointCallback

pytestmark = pytest.mark.timeout(120)

SIZE, BATCH, TOTAL = 22, 2, 14
CLOCKED = ("runtime", "per_second", "flos")


class Noisy(Dataset):
    """Sentences, in each of which some word is another whenever it is read."""

    def __init__(self, size: int = SIZE) -> None:
        self.words = torch.randint(0, 32, (size, 6), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        words = self.words[at].clone()
        words[torch.randint(6, ())] = torch.randint(32, ())
        return {"input_ids": words, "labels": words}


class Stream(IterableDataset):
    """The same sentences, of which nobody knows how many there are."""

    def __iter__(self):
        return iter([Noisy()[at] for at in range(12)])


class Killed(TrainerCallback):
    """Ends the process once what was saved by then is durable."""

    def __init__(self, at: int, saved_by: CheckpointCallback) -> None:
        self.at, self.saved_by = at, saved_by

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.at:
            self.saved_by._ckpt.wait()
            if dist.is_initialized():
                dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


class CutShort(TrainerCallback):
    """Ends each epoch after four steps."""

    def on_step_end(self, args, state, control, **_):
        control.should_epoch_stop = state.global_step % 4 == 0


class Watching(TrainerCallback):
    """Does something at one step."""

    def __init__(self, at: int, does: Any) -> None:
        self.at, self.does = at, does

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.at:
            self.does(control)


class Sharded(Trainer):
    """With FSDP2, which Accelerate turns on where there is an accelerator; all else of it runs without."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
        self.is_fsdp_enabled = True


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget()
    yield
    forget()


def model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def trainer(folder: Path | str, callbacks: list[Any], *, data: Any = None, kind: type = Trainer, **words: Any) -> Any:
    more = {name: words.pop(name) for name in ("compute_metrics", "processing_class") if name in words}
    told = dict(max_steps=TOTAL, save_strategy="no", per_device_train_batch_size=BATCH, learning_rate=0.01)
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=3, **{**told, **words}
    )
    torch.manual_seed(args.seed)
    return kind(
        model=model(), args=args, train_dataset=data or Noisy(), eval_dataset=Noisy(6), callbacks=callbacks, **more
    )


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.detach()


def told_by(one: Any) -> dict[str, Any]:
    """What a trainer has in the end."""
    logs = [{key: value for key, value in log.items() if not key.endswith(CLOCKED)} for log in one.state.log_history]
    return {
        "weights": [whole(value).numpy() for value in one.model.state_dict().values()],
        "rate": one.lr_scheduler.get_last_lr(),
        "random": torch.rand(3).numpy(),
        "step": one.state.global_step,
        "logs": [log for log in logs if "train_loss" not in log],
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for left, right in zip(one["weights"], other["weights"], strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(one["random"], other["random"])
    assert {key: one[key] for key in ("rate", "step", "logs")} == {key: other[key] for key in ("rate", "step", "logs")}


PROGRAMS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (2, {}),
    "gradients are accumulated": (2, {"gradient_accumulation_steps": 2}),
    "one rank reads for all": (2, {"accelerator_config": {"dispatch_batches": True}}),
    "evaluated between steps": (2, {"eval_strategy": "steps", "eval_steps": 5, "metric_for_best_model": "loss"}),
    "evaluated after epochs": (
        *(1, {"eval_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1, "ours": {"interval": 11}}),
    ),
    "bfloat16": (1, {"bf16": True}),
    "a sampler without a seed": (1, {"accelerator_config": {"use_seedable_sampler": False}}),
    "a stream": (1, {"data": Stream}),
    "epochs that are cut short": (1, {"cut_short": True, "ours": {"interval": 4}}),
    "every rank writes": (2, {"ours": {"format": "sharded"}, "eval_strategy": "steps", "eval_steps": 5}),
    "FSDP2": (2, {"kind": Sharded}),
    "patience": (
        *(1, {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "learning_rate": 0.0}),
    ),
}


def train(rank: int, world_size: int, root: str, words: dict[str, Any], killed_at: int | None, seed: int) -> Any:
    """Trains to its end, or until it is killed."""
    launch(rank, world_size)
    words = dict(words)
    ours = CheckpointCallback(root, **{"interval": 5, "max_keep_ckpts": 2, **words.pop("ours", {})})
    callbacks: list[TrainerCallback] = [ours, *([CutShort()] if words.pop("cut_short", False) else [])]
    if words.get("learning_rate") == 0.0:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=9, early_stopping_threshold=100))
    if killed_at is not None:
        callbacks.append(Killed(killed_at, ours))
    if data := words.pop("data", None):
        words["data"] = data()
    one = trainer(root + "-hf", callbacks, seed=seed, **words)
    one.train()
    return told_by(one)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_killed_run_ends_as_one_that_was_not(run_ranks, tmp_path, program):
    world_size, words = PROGRAMS[program]
    whole = run_ranks(world_size, train, world_size, str(tmp_path / "whole"), words, None, 3)
    killed_at = words.get("ours", {}).get("interval", 5) + 3
    run_ranks(world_size, train, world_size, str(tmp_path / "run"), words, killed_at, 3, lost=range(world_size))
    resumed = run_ranks(world_size, train, world_size, str(tmp_path / "run"), words, None, 77)
    for one, other in zip(whole, resumed, strict=True):
        assert_same(one, other)


def test_another_number_of_ranks_goes_on_behind_as_many_steps(run_ranks, tmp_path):
    run_ranks(2, train, 2, str(tmp_path / "run"), {}, 8, 3, lost=range(2))
    (told,) = run_ranks(1, train, 1, str(tmp_path / "run"), {}, None, 3)
    assert told["step"] == TOTAL
    assert [log["step"] for log in told["logs"]] == [3, 6, 9, 12]


# How far it is


def test_what_is_over_is_not_trained_on(tmp_path):
    def run() -> dict[str, Any]:
        one = trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run")])
        one.train()
        return told_by(one)

    assert_same(run(), run())


@pytest.mark.parametrize("due", [dict(interval=1, by_epoch=True), dict(interval=11, save_best="loss")])
def test_epochs_are_counted_and_kept_with_what_is_evaluated_after_them(tmp_path, due):
    words = dict(num_train_epochs=3, max_steps=-1, eval_strategy="epoch")
    trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run", **due)], **words).train()
    assert saved(tmp_path / "run") == ["step-00000011", "step-00000022", "step-00000033"]
    for record in (tmp_path / "run").glob("*.committed"):
        assert list(json.loads(record.read_text())["metrics"]) == ["eval_loss"]


def test_a_step_is_that_of_the_optimizer(tmp_path):
    words = dict(gradient_accumulation_steps=4, num_train_epochs=2, max_steps=-1)
    trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run", interval=2)], **words).train()
    assert saved(tmp_path / "run") == ["step-00000002", "step-00000004", "step-00000006"]


def test_a_file_stops_all_and_the_same_command_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(triggers, "_CONTROL_PERIOD", triggers._CONTROL_PERIOD * 0)
    whole = trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "whole")])
    whole.train()
    expected = told_by(whole)
    stopper = Watching(4, lambda control: (tmp_path / "run" / "STOP").touch())
    stopped = trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run"), stopper])
    stopped.train()
    assert stopped.state.global_step < TOTAL
    again = trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run")], seed=9)
    again.train()
    assert_same(expected, told_by(again))


def test_what_another_callback_asks_for_is_saved(tmp_path):
    asking = Watching(3, lambda control: setattr(control, "should_save", True))
    trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run", save_last=False), asking]).train()
    assert saved(tmp_path / "run") == ["step-00000003"]
    assert not list((tmp_path / "hf").glob("checkpoint-*"))


def saved(root: Path) -> list[str]:
    return sorted(path.stem for path in root.glob("*.committed"))


def test_a_training_that_fails_saves_nothing_more_and_frees_the_directory(tmp_path):
    failing = Watching(8, lambda control: control.does_not_exist)
    with pytest.raises(AttributeError):
        trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run", interval=5), failing]).train()
    assert saved(tmp_path / "run") == ["step-00000005"]
    one = trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run")], seed=9)
    one.train()
    assert one.state.log_history[-1]["step"] == TOTAL


def test_an_evaluation_before_all_draws_nothing(tmp_path):
    def run(root: Path, *more: TrainerCallback, **words: Any) -> Any:
        one = trainer(
            tmp_path / "hf",
            [CheckpointCallback(root, interval=5 if "8" in root.name else 11), *more],
            eval_on_start=True,
            **words,
        )
        one.train()
        return told_by(one) | {"logs": None}

    for at in (8, 13):  # the one in the first epoch, the other after its end
        expected = run(tmp_path / f"whole-{at}", eval_strategy="epoch")
        with pytest.raises(AttributeError):
            failing = Watching(at, lambda control: control.does_not_exist)
            run(tmp_path / f"run-{at}", failing, eval_strategy="epoch")
        assert_same(expected, run(tmp_path / f"run-{at}", eval_strategy="epoch", seed=9))


def test_without_the_callback_trainer_is_what_it_was(tmp_path):
    one = trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run")])
    one.remove_callback(CheckpointCallback)
    one.train()
    assert type(one) is Trainer and not (tmp_path / "run").exists()


# The best


def scores(values: list[float]) -> Any:
    left = iter(values)
    return lambda _: {"score": next(left)}


@pytest.mark.parametrize("by", ["metric_for_best_model", "save_best"])
def test_the_best_is_saved_and_loaded_at_the_end(tmp_path, by):
    ours = dict(save_best="score", rule="greater") if by == "save_best" else {}
    stock = dict(metric_for_best_model="score", greater_is_better=True) if by != "save_best" else {}
    callback = CheckpointCallback(tmp_path / "run", load_best_at_end=True, **ours)
    told = dict(eval_strategy="steps", eval_steps=4, compute_metrics=scores([1, 5, 3, 2]), **stock)
    one = trainer(tmp_path / "hf", [callback], **told)
    one.train()
    assert Path(one.state.best_model_checkpoint).name == "step-00000008"
    assert saved(tmp_path / "run") == ["step-00000008", "step-00000014"]
    other = model()
    best = distckpt.Checkpointer(tmp_path / "other", {"model": other}, init_from=one.state.best_model_checkpoint)
    best.resume()
    best.close()
    for name, value in other.state_dict().items():
        assert torch.equal(one.model.state_dict()[name], value), name


def test_a_metric_that_no_evaluation_has_is_named(tmp_path):
    callback = CheckpointCallback(tmp_path / "run", save_best="acc")
    with pytest.raises(KeyError, match="eval_acc"):
        trainer(tmp_path / "hf", [callback], eval_strategy="steps", eval_steps=4).train()


# What is resumed from


def test_one_that_is_named_is_resumed_from(tmp_path):
    def run(**words: Any) -> Any:
        one = trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run", interval=5)], seed=words.pop("seed", 3))
        one.train(**words)
        return one

    expected = told_by(run())
    for which in (tmp_path / "run" / "step-00000005", tmp_path / "run", True):
        assert_same(expected, told_by(run(seed=8, resume_from_checkpoint=which)))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "one")]).train()
    other = trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "other")])
    with pytest.raises(distckpt.RankFailure, match="is of another run: init_from="):
        other.train(resume_from_checkpoint=str(tmp_path / "one" / "step-00000014"))


def test_checkpoints_of_no_trainer_are_refused_by_a_word_that_helps(tmp_path):
    with distckpt.Checkpointer(tmp_path / "loop", {"model": model()}) as ckpt:
        ckpt.step()
    with pytest.raises(distckpt.StateMismatch, match="of a program without a Trainer: .* init_from="):
        trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "loop")]).train()
    trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run", init_from=tmp_path / "loop")]).train()


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    seen = []
    for _ in range(2):
        watching = Watching(TOTAL, lambda control: seen.extend((tmp_path / "temporary").iterdir()))
        trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run", interval=9), watching]).train()
        for path in (tmp_path / "run").glob("step-00000014*"):  # so that there is something left to do
            path.unlink() if path.is_file() else shutil.rmtree(path)
    assert seen == [] and not list((tmp_path / "temporary").iterdir())


def test_true_without_any_checkpoint_is_an_error_as_it_is_without_us(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run")]).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("program", [{}, {"gradient_accumulation_steps": 2}])
def test_one_that_trainer_saved_is_resumed_as_trainer_does(tmp_path, program):
    data = [Noisy()[at] for at in range(SIZE)]
    trainer(tmp_path / "hf", [], save_strategy="steps", save_steps=7, data=data, **program).train()
    theirs = str(tmp_path / "hf" / "checkpoint-7")
    stock = trainer(tmp_path / "hf", [], data=data, **program)
    stock.train(resume_from_checkpoint=theirs)
    expected = told_by(stock)["weights"]
    ours = trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run", interval=4)], data=data, **program)
    ours.train(resume_from_checkpoint=theirs)
    assert saved(tmp_path / "run") == ["step-00000008", "step-00000012", "step-00000014"]
    with pytest.raises(ValueError, match="holds checkpoints: they are resumed from without resume_from_checkpoint"):
        trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run")], data=data).train(resume_from_checkpoint=theirs)
    again = trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run")], data=data, seed=8, **program)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "step-00000008"))
    for one in (ours, again):
        for left, right in zip(expected, told_by(one)["weights"], strict=True):
            np.testing.assert_array_equal(left, right)


def test_of_a_damaged_one_the_one_before_is_taken(tmp_path):
    def run(seed: int) -> dict[str, Any]:
        one = trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run", interval=5)], seed=seed)
        one.train()
        return told_by(one)

    expected = run(3)
    (file,) = (tmp_path / "run" / "step-00000014").glob("model.safetensors")
    spoiled = bytearray(file.read_bytes())
    spoiled[-1] ^= 1
    file.write_bytes(spoiled)
    assert_same(expected, run(8))


# For others


def test_the_model_is_exported_for_from_pretrained(tmp_path):
    words = Tokenizer(WordLevel({f"w{nth}": nth for nth in range(32)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w0")
    one = trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run")], processing_class=tokenizer)
    one.train()
    distckpt.export(tmp_path / "run", tmp_path / "exported", to="hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").convert_tokens_to_ids(["w7"]) == [7]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert isinstance(found, GPT2LMHeadModel)
    for name, value in one.model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (dict(save_steps=5), "save_steps: Transformers's name; here it is interval="),
        (dict(state={}), "state: no such word"),
        (dict(interval="now"), "interval"),
        (dict(load_best_at_end=1), "load_best_at_end should be True or False"),
        (dict(save_best="f1"), "rule"),
    ],
)
def test_a_wrong_word_is_refused(tmp_path, words, message):
    with pytest.raises((TypeError, ValueError), match=message):
        CheckpointCallback(tmp_path, **words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (dict(save_strategy="steps"), 'save_strategy should be "no"'),
        (dict(ignore_data_skip=True), "ignore_data_skip cannot be used"),
        (dict(auto_find_batch_size=True), "auto_find_batch_size cannot be used"),
    ],
)
def test_an_argument_that_cannot_work_with_it_is_refused_when_trainer_is_made(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run")], **words)


def test_two_of_them_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two CheckpointCallbacks"):
        trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "one"), CheckpointCallback(tmp_path / "two")])


def test_the_best_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="load_best_at_end needs save_best"):
        trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run", load_best_at_end=True)])


def test_a_search_for_hyperparameters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a search for hyperparameters is many runs"):
        trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run")]).train(trial={})


def test_one_that_is_added_later_is_refused(tmp_path):
    one = trainer(tmp_path / "hf", [])
    one.add_callback(CheckpointCallback(tmp_path / "run"))
    with pytest.raises(RuntimeError, match=r"is given to Trainer\(callbacks="):
        one.train()


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_what_keeps_its_state_to_itself_is_refused(tmp_path, kind):
    class Other(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.state.distributed_type = DistributedType[kind]

    with pytest.raises(TypeError, match="cannot be saved"):
        trainer(tmp_path / "hf", [CheckpointCallback(tmp_path / "run")], kind=Other)


def test_an_older_version_is_refused_by_name(monkeypatch):
    import importlib

    from distckpt.integrations import transformers

    monkeypatch.setattr("importlib.metadata.version", lambda _: "5.2.9")
    with pytest.raises(ImportError, match=r"needs transformers>=5\.3, and 5\.2\.9 is installed: pip install 'distckpt"):
        importlib.reload(transformers)

import inspect
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file
from torch import nn

import distckpt

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
QUICK_START, OWN_LOOP, PLAIN_READING, EXPORTS, SHARDED, ACCELERATE, LIGHTNING, TRANSFORMERS, MMENGINE = SNIPPETS
SHORT_START = QUICK_START.replace("10_000", "2_000")


class Numbers:
    """Batches of random numbers that know how many they were."""

    def __init__(self) -> None:
        self.drawn = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.drawn += 1
        return torch.randn(4, 2)

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = state["drawn"]


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the snippets take for granted."""
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def train_step(batch):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)

    def evaluate():
        return model.weight.square().sum().item()

    state = dict(model=model, optimizer=optimizer, scheduler=scheduler, batches=Numbers())
    return state | dict(train_step=train_step, evaluate=evaluate)


def test_the_quick_start_trains_to_the_end_and_goes_on_from_there(names):
    exec(SHORT_START, names)
    assert names["batches"].drawn == 2000
    assert Path("runs/gpt/best-val_loss").resolve().name == names["ckpt"].best.name
    exec(QUICK_START.replace("10_000", "2_002"), names)
    assert names["batches"].drawn == 2002


def test_a_loop_of_ones_own_saves_by_epochs(names):
    exec("import distckpt\nstate = dict(model=model, batches=batches)\n" + OWN_LOOP, names)
    assert names["ckpt"].latest.progress == distckpt.progress.Progress(1000, 10)
    assert names["batches"].drawn == 1000


def test_what_was_saved_is_read_without_distckpt(names):
    exec(SHORT_START, names)
    trained = names["model"].weight.detach().clone()
    nn.init.zeros_(names["model"].weight)
    exec(PLAIN_READING, names)
    assert torch.equal(names["model"].weight, trained)


def test_what_was_cut_over_ranks_is_read_without_distckpt(names):
    exec(SHORT_START.replace("interval=", 'format="sharded", interval='), names)
    trained = names["model"].weight.detach().clone()
    nn.init.zeros_(names["model"].weight)
    exec(SHARDED, names)
    assert torch.equal(names["model"].weight, trained)


def test_what_was_saved_is_exported_for_others(names):
    exec(SHORT_START, names)
    Path("gpt-config").mkdir()
    Path("gpt-config/config.json").write_text("{}")
    exec("import distckpt\n" + EXPORTS, names)
    trained = names["model"].weight.detach()
    assert torch.equal(load_file("gpt.safetensors")["weight"], trained.bfloat16())
    best = load_file("runs/gpt/best-val_loss/model.safetensors")
    assert torch.equal(load_file("gpt-hf/model.safetensors")["weight"], best["weight"])
    state = {"model": {"weight": torch.zeros(1, 2)}}
    torch.distributed.checkpoint.load(state, checkpoint_id="gpt-dcp", no_dist=True)
    assert torch.equal(state["model"]["weight"], trained)


def test_what_an_accelerator_prepared_is_saved(names):
    names["loader"] = torch.utils.data.DataLoader(torch.randn(32, 2), batch_size=4, shuffle=True)
    exec("import distckpt\n" + ACCELERATE, names)
    for batch in names["loader"]:
        with names["accelerator"].accumulate(names["model"]):
            names["accelerator"].backward(names["model"](batch).sum())
            names["optimizer"].step()
        names["ckpt"].step()
    names["ckpt"].save("asked", wait=True)
    assert names["ckpt"].latest.progress.step == 4


def test_a_lightning_trainer_saves(names):
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = names["model"]

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.net(batch).square().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    loader = torch.utils.data.DataLoader(torch.randn(32, 2), batch_size=8)
    names |= dict(module=Module(), loader=loader, validation_loader=loader)
    exec(LIGHTNING.replace("callbacks=", 'logger=False, accelerator="cpu", callbacks='), names)
    assert Path("runs/lightning/latest").resolve().name == "step-00000040"
    assert Path("runs/lightning/best-val_loss").exists()


def test_a_trainer_of_hugging_face_saves(names):
    from transformers import GPT2Config, GPT2LMHeadModel

    words = torch.arange(8)
    data = [{"input_ids": words, "labels": words}] * 16
    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    names |= dict(model=GPT2LMHeadModel(config), train_data=data, eval_data=data)
    few = "use_cpu=True, report_to=[], max_steps=4, eval_steps=2)"
    exec(TRANSFORMERS.replace("eval_steps=500)", few).replace("interval=500", "interval=2"), names)
    assert Path("runs/trainer/latest").resolve().name == "step-00000004"
    assert Path("runs/trainer/best-eval_loss").exists()
    distckpt.export("runs/trainer", "model", to="hf")
    assert GPT2LMHeadModel.from_pretrained("model").config.n_embd == 8


def test_mmengine_builds_the_hook_from_the_config():
    from mmengine.registry import HOOKS

    config = {}
    exec(MMENGINE, config)
    assert type(HOOKS.build(config["default_hooks"]["checkpoint"])) is distckpt.CheckpointHook


def test_the_table_has_every_word_with_its_default():
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| (`[^|]+`|15 minutes) \|", README, re.MULTILINE)
    told = {word: default for words, default in rows for word in re.findall(r"[a-z_]+", words)}
    signature = inspect.signature(distckpt.Checkpointer).parameters.values()
    words = {word.name: word.default for word in signature if word.kind is word.KEYWORD_ONLY}
    assert words.pop("timeout") == timedelta(minutes=15) and told.pop("timeout") == "15 minutes"
    assert told == {word: "`" + repr(default).replace("'", '"') + "`" for word, default in words.items()}


def test_every_file_that_is_named_is_there():
    named = re.findall(r"\]\(([^):]+)\)", README) + re.findall(r"`((?:tests|scripts|benchmarks)/[\w./]+)`", README)
    assert len(named) > 8
    assert [path for path in named if not (ROOT / path).exists()] == []

"""What the checkpointer is given wrongly is refused by name, before anything is on disk."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from distckpt import Checkpointer, DirectoryInUse, NewerVersion, NoCheckpoint, RankFailure, policy, strict_json
from distckpt.manifest import Record, digest

SOON = timedelta(seconds=10)


def start(out_dir: Any, state: Any = None, **words: Any) -> Checkpointer:
    return Checkpointer(out_dir, {"model": nn.Linear(1, 1)} if state is None else state, **{"timeout": SOON, **words})


@pytest.fixture
def out_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


WRONG = [
    ("interval", "often", ValueError),
    ("interval", "15", ValueError),
    ("interval", "-3min", ValueError),
    ("interval", "0s", ValueError),
    ("interval", 1.5, TypeError),
    ("interval", True, TypeError),
    ("interval", None, TypeError),
    ("interval", [], ValueError),
    ("interval", [5, [6]], TypeError),
    ("interval", timedelta(seconds=-1), ValueError),
    ("by_epoch", 1, TypeError),
    ("by_epoch", None, TypeError),
    ("save_begin", -1, ValueError),
    ("save_begin", "5", TypeError),
    ("save_begin", True, TypeError),
    ("save_last", "yes", TypeError),
    ("save_last", None, TypeError),
    ("max_keep_ckpts", 2.0, TypeError),
    ("max_keep_ckpts", "3", TypeError),
    ("max_keep_ckpts", None, TypeError),
    ("max_keep_ckpts", True, TypeError),
    ("max_keep_best", 0, ValueError),
    ("max_keep_best", -1, ValueError),
    ("max_keep_best", "1", TypeError),
    ("keep_every", 0, ValueError),
    ("keep_every", -5, ValueError),
    ("keep_every", "1000", TypeError),
    ("keep_for", "3m", ValueError),
    ("keep_for", "for ever", ValueError),
    ("keep_for", 7, TypeError),
    ("keep_bytes", "many", ValueError),
    ("keep_bytes", "0GB", ValueError),
    ("keep_bytes", -1, ValueError),
    ("keep_bytes", 1e9, TypeError),
    ("format", "pickle", ValueError),
    ("format", None, ValueError),
    ("writers_per_node", 0, ValueError),
    ("writers_per_node", 1.0, TypeError),
    ("planner", "default", TypeError),
    ("format", ["full"], ValueError),
    ("async_save", "no", TypeError),
    ("async_save", 1, TypeError),
    ("when_busy", "drop", ValueError),
    ("when_busy", None, ValueError),
    ("sync_buffers", True, ValueError),
    ("sync_buffers", "sum", ValueError),
    ("sync_buffers", None, ValueError),
    ("per_rank", "model", TypeError),
    ("per_rank", 3, TypeError),
    ("per_rank", ["loader"], ValueError),
    ("snapshot", "async", ValueError),
    ("snapshot", None, ValueError),
    ("arena_bytes", "1GB", TypeError),
    ("arena_bytes", True, TypeError),
    ("arena_bytes", 1000, ValueError),
    ("recycle", 1, TypeError),
    ("recycle", "always", TypeError),
    ("init_from", 3, TypeError),
    ("init_from", b"weights.pth", TypeError),
    ("on_event", "print", TypeError),
    ("timeout", 900, TypeError),
    ("timeout", None, TypeError),
    ("timeout", timedelta(0), ValueError),
    ("timeout", timedelta(seconds=-1), ValueError),
    # As the specification of CheckpointHook has them:
    ("save_best", 3, AssertionError),
    ("save_best", ("loss", "acc"), AssertionError),
    ("save_best", ["loss", "loss"], AssertionError),
    ("save_best", ["auto", "loss"], AssertionError),
    ("save_best", ["a/loss", "a_loss"], ValueError),
    ("rule", 3, AssertionError),
    ("rule", ["less", "less", "less"], AssertionError),
    ("greater_keys", 3, AssertionError),
    ("less_keys", [None], AssertionError),
]


@pytest.mark.parametrize(("word", "value", "error"), WRONG, ids=lambda value: getattr(value, "__name__", repr(value)))
def test_a_wrong_word_is_refused_by_its_name_and_nothing_is_made(out_dir, word, value, error):
    more = {"save_best": "loss"} if word == "rule" else {}
    with pytest.raises(error, match=word) as raised:
        start(out_dir, **more, **{word: value})
    assert type(raised.value) is error
    assert not out_dir.exists()


@pytest.mark.parametrize(
    ("word", "value", "error"),
    [one for one in WRONG if one[0] not in ("per_rank", "planner")],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_a_wrong_word_is_known_to_be_before_there_is_a_state(word, value, error):
    more = {"save_best": "loss"} if word == "rule" else {}
    with pytest.raises(error, match=word):
        policy.check_for(Checkpointer, {"out_dir": "run", **more, word: value}, who="Somebody", without=())


@pytest.mark.parametrize("word", ["per_rank", "intervall"])
def test_a_word_that_is_not_for_everybody_is_refused_with_who_was_given_it(word):
    with pytest.raises(TypeError, match=f"Somebody: {word}: no such word"):
        policy.check_for(Checkpointer, {"out_dir": "run", word: 1}, who="Somebody", without=("state", "per_rank"))


def test_every_word_was_tried():
    known = [name for name, one in inspect.signature(Checkpointer).parameters.items() if one.kind is one.KEYWORD_ONLY]
    assert {word for word, _, _ in WRONG} == set(known)


@pytest.mark.parametrize("rule", ["bigger", "", "Greater"])
def test_a_rule_that_is_none_is_refused(out_dir, rule):
    with pytest.raises(KeyError, match="rule must be greater, less or None"):
        start(out_dir, save_best="loss", rule=rule)
    assert not out_dir.exists()


def test_a_metric_without_a_rule_is_refused_by_its_name(out_dir):
    with pytest.raises(ValueError, match="Cannot infer the rule for key perplexity"):
        start(out_dir, save_best="perplexity")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"save_top_k": 3}, "save_top_k: Lightning's name; here it is max_keep_best="),
        ({"save_total_limit": 3}, "here it is max_keep_ckpts="),
        ({"intervall": 3}, "intervall: no such word; did you mean interval="),
        ({"filename_tmpl": "x_{}"}, "filename_tmpl: no such word"),
        (
            {"a": 1, "monitor": "loss"},
            "Checkpointer: a: no such word.*monitor: Lightning's name; here it is save_best=",
        ),
    ],
)
def test_an_unknown_word_is_answered_with_the_right_one(out_dir, words, told):
    with pytest.raises(TypeError, match=told):
        start(out_dir, **words)
    assert not out_dir.exists()


@pytest.mark.parametrize("state", [None, {}, [], nn.Linear(1, 1)])
def test_a_state_that_is_no_dict_of_parts_is_refused(out_dir, state):
    with pytest.raises(TypeError, match="state should be a dict of names and objects with state_dict"):
        Checkpointer(out_dir, state)
    assert not out_dir.exists()


@pytest.mark.parametrize(
    ("name", "part", "error"),
    [("../model", nn.Linear(1, 1), ValueError), ("rng", nn.Linear(1, 1), ValueError), ("model", 3, TypeError),
     ("model", {"weight": 1}, TypeError)],
)  # fmt: skip
def test_a_part_that_cannot_be_one_is_refused_by_its_name(out_dir, name, part, error):
    with pytest.raises(error, match=name):
        start(out_dir, {name: part})
    assert not out_dir.exists()


@pytest.mark.parametrize(
    ("place", "error"),
    [(None, TypeError), (3, TypeError), ("", TypeError), (b"run", TypeError), (["run"], TypeError),
     ("s3://bucket/run", ValueError), ("file:///run", ValueError)],
)  # fmt: skip
def test_an_out_dir_that_is_no_path_is_refused(place, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match="out_dir should be"):
        start(place)
    assert not list(tmp_path.iterdir())


def test_parents_that_are_missing_are_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with start("a/b/c") as ckpt:
        ckpt.step()
    assert (tmp_path / "a/b/c/step-00000001.committed").exists()


def test_an_out_dir_with_characters_that_shells_trip_over_is_as_good_as_any(tmp_path):
    place = tmp_path / "run[1] *?'\"\n é"
    for step in (1, 2, 3):
        with start(place, max_keep_ckpts=1) as ckpt:
            assert ckpt.resume() == step - 1
            ckpt.step()
    assert [path.name for path in place.glob("*.committed")] == ["step-00000003.committed"]


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RankFailure, match=r"creation of .*rank 0: NotADirectoryError: .*file'"):
        start(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user may look into, unlike pytest's own."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


def start_as_nobody(rank: int, out_dir: Path, become: str) -> str:
    if os.geteuid() == 0:
        getattr(os, become)(65534)
    try:
        start(out_dir)
    except RankFailure as failure:
        return str(failure)
    return "nothing was raised"


@pytest.mark.parametrize("become", ["setuid", "seteuid"])
@pytest.mark.parametrize("inside", [".", "new"])
def test_a_directory_that_cannot_be_written_is_named(run_ranks, public, inside, become):
    (public / "run").mkdir(mode=0o555)
    (told,) = run_ranks(1, start_as_nobody, public / "run" / inside, become)
    assert "rank 0: PermissionError: [Errno 13]" in told and str(public / "run") in told
    assert not list((public / "run").iterdir())


def hold(out_dir: Path, is_held: Any, may_end: Any) -> None:
    start(out_dir)
    is_held.set()
    may_end.wait(60)
    os._exit(0)


def test_a_directory_in_which_another_process_saves_is_refused_with_its_name(out_dir):
    context = multiprocessing.get_context("fork")
    is_held, may_end = context.Event(), context.Event()
    other = context.Process(target=hold, args=(out_dir, is_held, may_end))
    other.start()
    assert is_held.wait(60)
    with pytest.raises(DirectoryInUse, match=rf"is in use by process {other.pid} on .*, since 20"):
        start(out_dir)
    may_end.set()
    other.join(60)
    with start(out_dir) as ckpt:
        ckpt.step()


def test_processes_of_a_launcher_that_do_not_know_of_one_another_are_refused(out_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE is 2, but torch.distributed is not initialised"):
        start(out_dir)
    assert not out_dir.exists()


def one_checkpoint(out_dir: Path) -> Path:
    with start(out_dir) as ckpt:
        ckpt.step()
    return out_dir / "step-00000001.committed"


def test_a_checkpoint_of_a_newer_version_is_refused_and_not_passed_over(out_dir):
    record = one_checkpoint(out_dir)
    newer = json.loads(record.read_text()) | {"version": 2, "name": "step-00000009", "something": "new"}
    del newer["self_xxh3_128"]
    newer["self_xxh3_128"] = digest(strict_json.dump(newer))
    (out_dir / "step-00000009.committed").write_bytes(strict_json.dump(newer))
    with start(out_dir) as ckpt, pytest.raises(NewerVersion, match=r"step-00000009\.committed has version 2"):
        ckpt.resume()


def test_a_checkpoint_of_an_unknown_format_is_refused_and_not_passed_over(out_dir):
    place = one_checkpoint(out_dir)
    record = Record.from_json(place.read_bytes(), "record")
    fields = {name: getattr(record, name) for name in record.__dataclass_fields__}
    place.write_bytes(Record(**fields | {"format": "holographic"}).to_json())
    with start(out_dir) as ckpt, pytest.raises(NewerVersion, match="the format 'holographic' is not known"):
        ckpt.resume()


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"version": 1, "version": 1}'])
def test_a_record_that_is_none_is_named(out_dir, data):
    one_checkpoint(out_dir).write_bytes(data)
    with (
        start(out_dir) as ckpt,
        pytest.raises(NoCheckpoint, match=r"no record there can be read: step-00000001\.committed"),
    ):
        ckpt.resume()

from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from distckpt import words
from distckpt.words import _FOREIGN, check_count, refuse_unknown

HOOK = {
    "interval", "by_epoch", "save_optimizer", "out_dir", "max_keep_ckpts", "save_last", "save_best", "rule",
    "filename_tmpl", "max_keep_best", "keep_every", "sync_buffers", "async_save",
}  # fmt: skip


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("save_top_k", "save_top_k: Lightning's name; here it is max_keep_best= (with save_best=)"),
        ("save_total_limit", "save_total_limit: Transformers's name; here it is max_keep_ckpts="),
        ("keep_latest_k", "here it is max_keep_ckpts="),
        ("max_to_keep", "here it is max_keep_ckpts="),
        ("monitor", "here it is save_best="),
        ("mode", "here it is rule= ("),
        ("every_n_train_steps", "here it is interval= (with by_epoch=False)"),
        ("every_n_epochs", "here it is interval= (with by_epoch=True)"),
        ("save_steps", "here it is interval="),
        ("dirpath", "here it is out_dir="),
        ("filename", "here it is filename_tmpl="),
        ("sync_buffer", "here it is sync_buffers="),
        ("create_symlink", "here there is none: last_checkpoint"),
    ],
)
def test_a_word_of_another_library_is_answered_with_ours(word, told):
    with pytest.raises(TypeError) as raised:
        refuse_unknown([word], HOOK, "CheckpointHook")
    assert told in str(raised.value)


def test_a_misspelt_word_is_answered_with_the_nearest_one():
    with pytest.raises(
        TypeError, match=r"^CheckpointHook: max_keep_ckpt: no such word; did you mean max_keep_ckpts=\?"
    ):
        refuse_unknown(["max_keep_ckpt"], HOOK, "CheckpointHook")


def test_a_word_like_no_other_is_answered_with_all_there_are():
    with pytest.raises(TypeError, match="there are interval, rule"):
        refuse_unknown(["zzz"], ["rule", "interval"], "Checkpointer")


def test_all_unknown_words_are_named_at_once():
    with pytest.raises(TypeError, match="monitor.*dirpath"):
        refuse_unknown(["interval", "monitor", "dirpath"], HOOK, "CheckpointHook")


def test_our_word_is_named_only_to_those_who_have_it():
    with pytest.raises(TypeError, match="filename: Lightning's name; here there is none: a checkpoint is called by"):
        refuse_unknown(["filename"], HOOK - {"filename_tmpl"}, "Checkpointer")


def test_known_words_pass():
    refuse_unknown(["interval", "rule"], HOOK, "CheckpointHook")


def test_every_foreign_word_has_an_answer():
    for word in _FOREIGN:
        with pytest.raises(TypeError, match=f"{word}: .*'s name; here (it is [a-z_]+=|there is none: )"):
            refuse_unknown([word], HOOK, "CheckpointHook")


@pytest.mark.parametrize(
    ("check", "value", "error"),
    [
        (words.check_timeout, timedelta(seconds=1), None),
        (words.check_timeout, timedelta(0), ValueError),
        (words.check_timeout, 3, TypeError),
        (words.check_directory, "runs/gpt", None),
        (words.check_directory, Path("runs"), None),
        (words.check_directory, "", TypeError),
        (words.check_directory, 3, TypeError),
        (words.check_directory, "s3://runs", ValueError),
        (partial(words.check_bytes, least=8), None, None),
        (partial(words.check_bytes, least=8), 8, None),
        (partial(words.check_bytes, least=8), 7, ValueError),
        (partial(words.check_bytes, least=8), 8.0, TypeError),
        (partial(words.check_bytes, least=8), True, TypeError),
    ],
)
def test_a_value_that_cannot_be_is_an_error_that_names_the_word(check, value, error):
    if error is None:
        assert check("it", value) is None
    else:
        with pytest.raises(error, match="^it should be"):
            check("it", value)


@pytest.mark.parametrize("value", [None, 1, 10])
def test_a_count_is_a_number_or_none(value):
    check_count("many", value)


@pytest.mark.parametrize("value, error", [(0, ValueError), (-1, ValueError), (True, TypeError), ("1", TypeError)])
def test_what_is_no_count_is_refused_by_the_name_of_the_word(value, error):
    with pytest.raises(error, match="many should be"):
        check_count("many", value)

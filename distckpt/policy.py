"""The policy words of `Checkpointer`, checked before there is a state to save."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from distckpt import words
from distckpt.best import parse_metrics
from distckpt.buffers import parse_mode
from distckpt.choosing import FORMATS
from distckpt.engine.stager import LEAST_ARENA_BYTES, MODES
from distckpt.retention import Retention
from distckpt.schedule import Schedule


def check(given: Mapping[str, Any]) -> None:
    """Each of ``given``, which are all the words there are, is right.

    Raises:
        TypeError, ValueError: naming the word that is not. AssertionError and KeyError as well for words that
            `CheckpointHook` has, too.
    """
    words.check_flags(**{word: given[word] for word in ("by_epoch", "save_last", "async_save", "recycle")})
    words.check_choice("format", given["format"], FORMATS)
    words.check_choice("when_busy", given["when_busy"], ("wait", "skip"))
    words.check_choice("snapshot", given["snapshot"], MODES)
    words.check_bytes("arena_bytes", given["arena_bytes"], least=LEAST_ARENA_BYTES)
    words.check_count("writers_per_node", given["writers_per_node"])
    words.check_timeout("timeout", given["timeout"])
    words.check_directory("out_dir", given["out_dir"])
    words.check_function("on_event", given["on_event"])
    words.check_path("init_from", given["init_from"])
    parse_mode(given["sync_buffers"])
    Schedule.parse(given["interval"], begin=given["save_begin"])
    metrics = parse_metrics(*(given[word] for word in ("save_best", "rule", "greater_keys", "less_keys")))
    kept = {word: given[word] for word in ("max_keep_ckpts", "keep_every", "keep_for", "keep_bytes", "max_keep_best")}
    Retention.parse(metrics=metrics, **kept)


def check_for(
    constructor: Callable[..., object], given: Mapping[str, Any], *, who: str, without: Collection[str]
) -> None:
    """``constructor``, that of `Checkpointer`, will take what ``who`` was ``given``. The words ``without`` are not for
    ``who``.

    Raises:
        TypeError, ValueError: as `check`, and for a word that is none.
    """
    known = inspect.signature(constructor).parameters
    words.refuse_unknown(given, [word for word in known if word not in without], who)
    defaults = {word: one.default for word, one in known.items() if one.default is not one.empty}
    check({**defaults, **given})

"""The policy words: those of other libraries and what they are called here, and checks of the simple ones."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class _Foreign:
    """A word of another library.

    Attributes:
        here: our word for it, and ``note`` what goes with it.
        otherwise: what is done instead, for those who do not have ``here``.
    """

    library: str
    here: str
    note: str = ""
    otherwise: str = ""


_STEPS = "with by_epoch=False"
_EPOCHS = "with by_epoch=True"
_EITHER = "with by_epoch="
_RULE = '"greater" or "less"'
_NAMED = "a checkpoint is called by its step"
_WHOLE = "a checkpoint holds what a run needs to resume; weights are exported from it"

_FOREIGN = {
    "save_top_k": _Foreign("Lightning", "max_keep_best", "with save_best="),
    "monitor": _Foreign("Lightning", "save_best"),
    "mode": _Foreign("Lightning", "rule", _RULE),
    "every_n_train_steps": _Foreign("Lightning", "interval", _STEPS),
    "every_n_epochs": _Foreign("Lightning", "interval", _EPOCHS),
    "train_time_interval": _Foreign("Lightning", "interval", 'such as "15min"'),
    "dirpath": _Foreign("Lightning", "out_dir"),
    "filename": _Foreign("Lightning", "filename_tmpl", otherwise=_NAMED),
    "save_weights_only": _Foreign("Lightning", "save_optimizer", otherwise=_WHOLE),
    "save_on_exception": _Foreign("Lightning", "save_last"),
    "save_total_limit": _Foreign("Transformers", "max_keep_ckpts"),
    "save_steps": _Foreign("Transformers", "interval", _STEPS),
    "save_strategy": _Foreign("Transformers", "interval", _EITHER),
    "save_only_model": _Foreign("Transformers", "save_optimizer", otherwise=_WHOLE),
    "metric_for_best_model": _Foreign("Transformers", "save_best"),
    "greater_is_better": _Foreign("Transformers", "rule", _RULE),
    "output_dir": _Foreign("Transformers", "out_dir"),
    "total_limit": _Foreign("Accelerate", "max_keep_ckpts"),
    "project_dir": _Foreign("Accelerate", "out_dir"),
    "keep_latest_k": _Foreign("torchtitan", "max_keep_ckpts"),
    "folder": _Foreign("torchtitan", "out_dir"),
    "async_mode": _Foreign("torchtitan", "async_save"),
    "max_to_keep": _Foreign("Orbax", "max_keep_ckpts"),
    "save_interval_steps": _Foreign("Orbax", "interval", _STEPS),
    "keep_period": _Foreign("Orbax", "keep_every"),
    "best_fn": _Foreign("Orbax", "save_best", "the name of the metric"),
    "best_mode": _Foreign("Orbax", "rule", _RULE),
    "n_saved": _Foreign("Ignite", "max_keep_ckpts"),
    "score_name": _Foreign("Ignite", "save_best"),
    "score_function": _Foreign("Ignite", "save_best", "the name of the metric"),
    "filename_prefix": _Foreign("Ignite", "filename_tmpl", otherwise=_NAMED),
    "filepath": _Foreign("Keras", "out_dir"),
    "save_best_only": _Foreign("Keras", "save_best", "with interval=-1"),
    "save_freq": _Foreign("Keras", "interval", _EITHER),
    "save_folder": _Foreign("Composer", "out_dir"),
    "save_interval": _Foreign("Composer", "interval", _EITHER),
    "save_num_checkpoints_to_keep": _Foreign("Composer", "max_keep_ckpts"),
    "save_dir": _Foreign("DeepSpeed", "out_dir"),
    "period": _Foreign("fvcore", "interval", _STEPS),
    "checkpoint_id": _Foreign("torch.distributed.checkpoint", "out_dir"),
    "sync_buffer": _Foreign("MMCV", "sync_buffers", '"mean", "broadcast" or False'),
    "create_symlink": _Foreign("MMCV", "", otherwise="last_checkpoint, or the link latest, is kept by itself"),
}


def refuse_unknown(given: Iterable[str], known: Iterable[str], who: str) -> None:
    """Every word that was ``given`` to ``who`` is one of those ``known``.

    Raises:
        TypeError: naming each other word, with the nearest right one, or with ours for that of another library.
    """
    right = sorted(known)
    told = [_explain(word, right) for word in given if word not in right]
    if told:
        raise TypeError(f"{who}: " + "; and ".join(told))


def _explain(word: str, known: list[str]) -> str:
    foreign = _FOREIGN.get(word)
    if foreign is not None and foreign.here in known:
        note = f" ({foreign.note})" if foreign.note else ""
        return f"{word}: {foreign.library}'s name; here it is {foreign.here}={note}"
    if foreign is not None and foreign.otherwise:
        return f"{word}: {foreign.library}'s name; here there is none: {foreign.otherwise}"
    near = difflib.get_close_matches(word, known, 1)
    return f"{word}: no such word" + (f"; did you mean {near[0]}=?" if near else f"; there are {', '.join(known)}")


def check_flags(**flags: object) -> None:
    """Each is True or False; ``TypeError`` naming the one that is not."""
    for word, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{word} should be True or False, is {value!r}")


def check_choice(word: str, value: object, choices: tuple[str, ...]) -> None:
    """``value`` is one of ``choices``; ``ValueError`` naming the word and them, if not."""
    if value not in choices:
        raise ValueError(f"{word} should be one of {', '.join(choices)}, is {value!r}")


def check_bytes(word: str, value: object, *, least: int) -> None:
    """``value`` is None, or a number of bytes of at least ``least``; ``TypeError`` or ``ValueError`` naming the word,
    if not."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{word} should be a number of bytes, is {value!r}")
    if value < least:
        raise ValueError(f"{word} should be at least {least} bytes ({least >> 20} MiB), is {value}")


def check_count(word: str, value: object) -> None:
    """``value`` is None, or a number of at least 1; ``TypeError`` or ``ValueError`` naming the word, if not."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{word} should be a number, is {value!r}")
    if value < 1:
        raise ValueError(f"{word} should be at least 1, is {value}")


def check_timeout(word: str, value: object) -> None:
    """``value`` is a ``timedelta`` longer than zero; ``TypeError`` or ``ValueError`` naming the word, if not."""
    if not isinstance(value, timedelta):
        raise TypeError(f"{word} should be a datetime.timedelta, is {value!r}")
    if value <= timedelta(0):
        raise ValueError(f"{word} should be longer than zero, is {value}")


def check_function(word: str, value: object) -> None:
    """``value`` is None, or can be called; ``TypeError`` naming the word, if not."""
    if value is not None and not callable(value):
        raise TypeError(f"{word} should be a function of one dict, is {value!r}")


def check_path(word: str, value: object) -> None:
    """``value`` is None, or a path; ``TypeError`` naming the word, if not."""
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{word} should be the path of a checkpoint or of a file, is {value!r}")


def check_directory(word: str, value: object) -> None:
    """``value`` is the path of a directory; ``TypeError`` or ``ValueError`` naming the word, if it cannot be."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise TypeError(f"{word} should be the path of a directory, is {value!r}")
    if "://" in os.fspath(value):
        raise ValueError(f"{word} should be a directory of a file system, {value!r} is a URL")

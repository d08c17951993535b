"""The words of `CheckpointHook`, checked when it is constructed: what is wrong fails before training, on all ranks."""

from __future__ import annotations

import os
import string
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from distckpt import layout
from distckpt.buffers import Mode, parse_mode
from distckpt.retention import Retention
from distckpt.schedule import parse_duration
from distckpt.words import check_choice, check_flags

# Words beyond the specification, with their defaults.
OURS: Mapping[str, Any] = {
    "format": "pth",
    "async_save": False,
    "sync_buffers": "mean",
    "timeout": timedelta(minutes=15),
    "max_keep_best": 1,
    "keep_every": None,
    "keep_for": None,
    "keep_bytes": None,
}


@dataclass(frozen=True)
class Extras:
    """The words beyond the specification. ``keeping`` are those of `Retention.parse`."""

    is_sharded: bool
    async_save: bool
    buffers_mode: Mode
    timeout: timedelta
    max_keep_best: int
    keeping: Mapping[str, Any]

    @classmethod
    def parse(cls, max_keep_ckpts: int, words: Mapping[str, Any]) -> Extras:
        """What ``max_keep_ckpts`` and the user's ``words``, each of them one of `OURS`, ask for.

        Raises:
            TypeError, ValueError: naming the word that is wrong.
        """
        asked = {**OURS, **words}
        check_choice("format", asked["format"], ("pth", "sharded"))
        check_flags(async_save=asked["async_save"])
        best = asked["max_keep_best"]
        if isinstance(best, bool) or not isinstance(best, int) or best < 1:
            raise ValueError(f"max_keep_best should be a number of checkpoints, at least 1, is {best!r}")
        keeping = {word: asked[word] for word in ("keep_every", "keep_for", "keep_bytes")}
        keeping["max_keep_ckpts"] = max_keep_ckpts
        Retention.parse(**keeping)  # finds wrong words
        return cls(
            is_sharded=asked["format"] == "sharded",
            async_save=asked["async_save"],
            buffers_mode=parse_mode(asked["sync_buffers"]),
            timeout=parse_duration(asked["timeout"], "timeout"),
            max_keep_best=best,
            keeping=keeping,
        )


def parse_template(filename_tmpl: object, *, by_epoch: bool) -> str:
    """How files are called: ``epoch_{}.pth`` or ``iter_{}.pth``, unless something else was asked for.

    Raises:
        TypeError: where it is no text.
        ValueError: where it has not one and only one ``{}``, or gives names that are no plain names of files.
    """
    if filename_tmpl is None:
        return "epoch_{}.pth" if by_epoch else "iter_{}.pth"
    if not isinstance(filename_tmpl, str):
        raise TypeError(f"filename_tmpl should be a text such as 'epoch_{{}}.pth', is {filename_tmpl!r}")
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(filename_tmpl) if field is not None]
        names = [filename_tmpl.format(count) for count in (1, 2)]
    except (ValueError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(f"filename_tmpl must contain one and only one '{{}}', but got {filename_tmpl!r}") from error
    if fields != [""] or names[0] == names[1]:
        raise ValueError(f"filename_tmpl must contain one and only one '{{}}', but got {filename_tmpl!r}")
    taken = {layout.RUN, layout.EVENTS, layout.COPIES, layout.LATEST, layout.LAST_CHECKPOINT, layout.SAVE, layout.STOP}
    for name in names:
        if not layout.is_safe(name) or name in taken or layout.StepName.parse(name) or layout.recorded_by(name):
            raise ValueError(
                f"filename_tmpl: {filename_tmpl!r} gives {name!r}, which cannot be the name of a file here"
            )
    return filename_tmpl


def parse_published_keys(published_keys: object) -> list[str] | tuple[str, ...] | None:
    """The keys to publish; a single one as a list.

    Raises:
        TypeError: where they are neither a str, nor a list or tuple of such, nor None.
        AssertionError: where one stands twice.
        ValueError: where there are none.
    """
    if published_keys is None:
        return None
    if isinstance(published_keys, str):
        return [published_keys]
    if not isinstance(published_keys, list | tuple) or not all(isinstance(key, str) for key in published_keys):
        raise TypeError(
            f'"published_keys" should be a str or a sequence of str or None, but got {type(published_keys)}'
        )
    # Raised, not asserted: `python -O` must refuse the same words.
    if len(published_keys) != len(set(published_keys)):
        raise AssertionError('Find duplicate elements in "published_keys".')
    if not published_keys:
        raise ValueError('"published_keys" is empty, so that nothing would be published; None publishes nothing')
    return published_keys


def parse_out_dir(out_dir: object) -> str | None:
    """The directory as a text; ``TypeError`` for what is no path."""
    if out_dir is None:
        return None
    if not isinstance(out_dir, str | os.PathLike) or not os.fspath(out_dir):
        raise TypeError(f"out_dir should be the path of a directory or None, is {out_dir!r}")
    return os.fsdecode(out_dir)


def nested(out_dir: str | None, work_dir: str) -> str:
    """Where checkpoints go: ``work_dir``, or in ``out_dir`` a directory that is called as ``work_dir`` is."""
    if out_dir is None or Path(out_dir).absolute() == Path(work_dir).absolute():
        return work_dir
    return os.path.join(out_dir, os.path.basename(work_dir.rstrip(os.sep)))  # noqa: PTH118, PTH119  as MMEngine spells it

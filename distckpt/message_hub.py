"""What a runner's message hub knows of checkpoints: the keys of MMEngine, which every file carries on to a resume."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from distckpt import layout
from distckpt.best import Metric, as_number

LAST_CKPT = "last_ckpt"
KEEP_CKPT_IDS = "keep_ckpt_ids"
RUN = "distckpt_run"  # whose checkpoint it is that was resumed


def recall(runner: Any, key: str) -> Any:
    """What the hub says under ``key``; None where it says nothing, and for a runner without one."""
    hub = getattr(runner, "message_hub", None)
    return None if hub is None else hub.runtime_info.get(key)


def tell(runner: Any, key: str, value: object) -> None:
    """The hub says ``value`` under ``key``, and so does each file that is written from now on."""
    hub = getattr(runner, "message_hub", None)
    if hub is not None:
        hub.update_info(key, value)


def best_keys(metric: str, *, is_only: bool) -> tuple[str, str]:
    """Under which keys the hub has the best score by ``metric``, and the path of its file."""
    return ("best_score", "best_ckpt") if is_only else (f"best_score_{metric}", f"best_ckpt_{metric}")


def recall_best(runner: Any, metric: Metric, *, is_only: bool) -> tuple[float, str] | None:
    """The best score by ``metric``, and the path of its file, as the hub has them.

    None also for what the hub has of another metric: where there is one only, its keys do not name it.
    """
    score, path = (recall(runner, key) for key in best_keys(metric.name, is_only=is_only))
    if score is None or not isinstance(path, str):
        return None
    if not PurePath(path).name.startswith(layout.best_prefix(metric.name)):
        return None
    try:
        number = as_number(score, metric.name)
    except TypeError:
        return None
    return None if number is None else (number, path)

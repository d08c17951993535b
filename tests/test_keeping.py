"""What becomes of older checkpoints, and the labels beside them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from distckpt.attempt import Attempt, Holder
from distckpt.best import AutoMetric, BestBy, Metric
from distckpt.catalog import Catalog
from distckpt.keeping import LabelledKeeping
from distckpt.manifest import Record
from distckpt.progress import Progress
from distckpt.stores.local import LocalStore

LOSS = Metric("val/loss", "less")
ACC = Metric("acc", "greater")


def record(step: int, *, age: timedelta = timedelta(0), size: int = 10, **metrics: float) -> Record:
    created = (datetime.now(UTC) - age).isoformat()
    known = {name.replace("_", "/"): value for name, value in metrics.items()}
    return Record(
        f"step-{step:08d}", Progress(step), "full", 1, ("interval",), created, "", 1, step, size, 0, "", known
    )


def keeping(*metrics: Metric, auto: bool = False, keep: int = 1, **words: Any) -> LabelledKeeping:
    return LabelledKeeping(words, BestBy(AutoMetric() if auto else metrics, keep))


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"max_keep_ckpts": 2}, [4, 5]),
        ({"max_keep_ckpts": 1, "keep_every": 2}, [2, 4, 5]),
        ({"max_keep_ckpts": 1, "keep_for": "25h"}, [3, 4, 5]),
        ({"keep_bytes": 30}, [3, 4, 5]),
    ],
)
def test_what_no_rule_keeps_is_to_delete(words, kept):
    ages = {1: timedelta(days=9), 2: timedelta(days=2), 3: timedelta(days=1), 4: timedelta(0), 5: timedelta(0)}
    records = [record(step, age=age) for step, age in ages.items()]
    gone = [one.progress.step for one in keeping(**words).to_delete(records)]
    assert gone == [step for step in ages if step not in kept]


def test_the_best_by_each_metric_are_kept():
    records = [record(1, val_loss=1.0), record(2, val_loss=3.0, acc=0.9), record(3, val_loss=2.0), record(4), record(5)]
    gone = keeping(LOSS, ACC, max_keep_ckpts=1).to_delete(records)
    assert [one.progress.step for one in gone] == [3, 4]
    gone = keeping(LOSS, ACC, keep=2, max_keep_ckpts=1).to_delete(records)
    assert [one.progress.step for one in gone] == [4]


def test_a_metric_that_auto_settles_later_is_kept_from_then_on():
    records = [record(1, val_loss=1.0), record(2, val_loss=3.0), record(3, val_loss=2.0)]
    best_by = BestBy(AutoMetric(), 1)
    one = LabelledKeeping({"max_keep_ckpts": 1}, best_by)
    best_by.settle({"val/loss": 9.0})
    assert [one.progress.step for one in one.to_delete(records)] == [2]


@pytest.mark.parametrize(
    ("words", "error"),
    [({"max_keep_ckpts": "3"}, TypeError), ({"keep_every": 0}, ValueError), ({"keep_for": "soon"}, ValueError),
     ({"keep_bytes": "2 apples"}, ValueError), ({"keep": 0}, ValueError)],
)  # fmt: skip
def test_wrong_words_are_found_at_once(words, error):
    with pytest.raises(error):
        keeping(**words)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    store = LocalStore(tmp_path)
    return Catalog(store, Attempt(store, "run", 1, Holder("here", 1, "now")))


def labels(catalog: Catalog) -> dict[str, str]:
    root = Path(catalog.store.url)
    return {path.name: str(path.readlink()) for path in root.iterdir() if path.is_symlink()}


def test_labels_point_to_the_newest_and_to_the_best(catalog):
    records = [record(1, val_loss=1.0, acc=0.1), record(2, val_loss=3.0, acc=0.9), record(3)]
    keeping(LOSS, ACC).label(catalog, records)
    assert labels(catalog) == {
        "latest": "step-00000003",
        "best-val_loss": "step-00000001",
        "best-acc": "step-00000002",
    }


def test_labels_move_with_what_they_say(catalog):
    one = keeping(LOSS)
    one.label(catalog, [record(1, val_loss=2.0)])
    one.label(catalog, [record(1, val_loss=2.0), record(2, val_loss=1.0)])
    assert labels(catalog) == {"latest": "step-00000002", "best-val_loss": "step-00000002"}


def test_without_records_or_numbers_there_is_nothing_to_label(catalog):
    keeping(LOSS).label(catalog, [])
    assert labels(catalog) == {}
    keeping(LOSS, auto=True).label(catalog, [record(1)])
    assert labels(catalog) == {"latest": "step-00000001"}

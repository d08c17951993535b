"""What becomes of older checkpoints, and which labels people find beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from distckpt import layout
from distckpt.best import BestBy, ranking
from distckpt.catalog import Catalog
from distckpt.manifest import Record
from distckpt.retention import Retention


class LabelledKeeping:
    """Deletes by a retention, and labels with links: ``latest`` and ``best-<metric>``; see `distckpt.run.Keeping`.

    Args:
        words: those of `Retention.parse`, but for the metrics.
        best_by: these.
    """

    def __init__(self, words: Mapping[str, Any], best_by: BestBy) -> None:
        self._words = dict(words)
        self._best_by = best_by
        self._retention()  # finds wrong words now, and not after the first save

    def to_delete(self, records: Sequence[Record]) -> list[Record]:
        return self._retention().to_delete(records, datetime.now(UTC))

    def label(self, catalog: Catalog, records: Sequence[Record]) -> None:
        if records:
            catalog.store.point(layout.LATEST, records[-1].name)
        for metric in self._best_by.metrics:
            if ranked := ranking(metric, records):
                catalog.store.point(layout.best_label(metric.name), ranked[0].name)

    def _retention(self) -> Retention:
        return Retention.parse(metrics=self._best_by.asked, max_keep_best=self._best_by.keep, **self._words)

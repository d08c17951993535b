"""The figures of a run as horizontal bars, ours in colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import Figure

OURS = "distckpt"
OUR_COLOUR, OTHER_COLOUR, LINE_COLOUR, INK = "#1f6f8b", "#c3c7cb", "#d1495b", "#555555"
BAR_INCHES = 0.42


@dataclass(frozen=True)
class Panel:
    """One figure of each contender.

    Attributes:
        limit: what no bar can be shorter than, and what that is.
    """

    title: str
    figures: Mapping[str, Figure | None]
    limit: Figure | None = None
    limit_word: str = ""


def draw(result: Mapping[str, Any], panels: Sequence[Panel], path: Path) -> None:
    """Panels side by side, with the same contenders in each; the first is on top."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(result["contenders"])[::-1]
    colours = [OUR_COLOUR if result["contenders"][name]["package"] == OURS else OTHER_COLOUR for name in names]
    size = (5 * len(panels) + 1, BAR_INCHES * len(names) + 1.4)
    drawing, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        _bars(axis, names, [panel.figures[name] for name in names], colours)
        axis.set_title(panel.title, fontsize=11, loc="left")
        if panel.limit is not None:
            axis.axvline(panel.limit.median, color=LINE_COLOUR, linewidth=1)
            axis.set_xlabel(f"line: {panel.limit_word}", fontsize=9, color=LINE_COLOUR, loc="left")
    words = f"{result['about_workload']} {result['state_bytes'] / 1e6:.0f} MB. Medians and quartiles."
    drawing.suptitle(words, fontsize=9, x=0.01, ha="left")
    drawing.savefig(path, dpi=160)
    pyplot.close(drawing)


def _bars(axis: Any, names: Sequence[str], figures: Sequence[Figure | None], colours: Sequence[str]) -> None:
    medians = [one.median if one else 0.0 for one in figures]
    reach = [[one.median - one.low, one.high - one.median] if one else [0.0, 0.0] for one in figures]
    axis.barh(names, medians, color=colours, height=0.7)
    axis.errorbar(medians, names, xerr=list(zip(*reach, strict=True)), fmt="none", ecolor=INK, elinewidth=1)
    for place, one in enumerate(figures):
        words = f"  {one.median:.3g}" if one else "  not measured"
        axis.text(max(0.0, one.high) if one else 0.0, place, words, va="center", fontsize=9)
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.margins(x=0.18)
    axis.locator_params(axis="x", nbins=6)
    axis.tick_params(left=False)
    axis.spines[["top", "right", "left"]].set_visible(False)

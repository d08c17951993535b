"""The picture of the demo: two loss curves on one another, and the starts of the run that was killed."""

from __future__ import annotations

from pathlib import Path

from demo_job import Hit, read_losses
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(reference: Path, killed: Path, hits: list[Hit], picture: Path, title: str) -> None:
    """Both loss curves with the kills, and below, from where to where each start of the killed run came."""
    figure = Figure(figsize=(9, 5.5), dpi=100, layout="constrained")
    losses, starts = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    draw_losses(losses, reference, "reference, not interrupted", color="0.75", lw=6)
    draw_losses(losses, killed, f"killed {len(hits)} times", color="C0", lw=1)
    losses.set(ylabel="training loss of rank 0", yscale="log", title=title)
    losses.legend(loc="lower left")
    draw_starts(starts, killed, hits)
    starts.set(xlabel="step", ylabel="start")
    for number, hit in enumerate(hits, start=1):
        what = f"{number}: {hit.kill.whom}" + (",\nin a write" if hit.unfinished else "")
        where = {"xycoords": losses.get_xaxis_transform(), "textcoords": "offset points"}
        losses.annotate(what, (hit.step, 1), (3, -3), va="top", color="C3", fontsize=8, **where)
        for axes in (losses, starts):
            axes.axvline(hit.step, color="C3", lw=1, ls="-" if hit.unfinished else "--")
    figure.savefig(picture)


def draw_losses(axes: Axes, run: Path, label: str, color: str, lw: float) -> None:
    steps, losses = zip(*sorted(dict(read_losses(run, 0)).items()), strict=True)
    axes.plot(steps, [float.fromhex(loss) for loss in losses], color=color, lw=lw, label=label)


def draw_starts(axes: Axes, killed: Path, hits: list[Hit]) -> None:
    steps = [step for step, _ in read_losses(killed, 0)]
    ends = [hit.computed for hit in hits] + [len(steps)]
    for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False), start=1):
        first, last = steps[begin], steps[end - 1]
        axes.barh(number, last - first + 1, left=first, height=0.6, color="C0")
    axes.set_yticks(range(1, len(ends) + 1))
    axes.invert_yaxis()

"""Tables as people read them, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of equal width."""
    cells = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(lines)


def abouts(result: Mapping[str, Any]) -> str:
    """What each contender is, and why others were not measured."""
    lines = [f"- {name} ({one['package']} {one['version']}): {one['about']}" for name, one in told(result)]
    lines += [f"- {name} ABSENT: {why}" for name, why in result["absent"].items()]
    return "\n".join(lines + [f"- {name} FAILED: {why}" for name, why in result["failures"].items()])


def setting(result: Mapping[str, Any]) -> str:
    """In what circumstances the figures came about."""
    before, after = result["load_average"]
    return (
        f"Workload: {result['about_workload']} State of {result['state_bytes'] / 1e6:.1f} MB in {result['tensors']} "
        f"tensors; torch {result['torch']} with {result['threads']} threads on {result['cores']} cores, "
        f"{result['file_system']}; load average {before:.2f} before, {after:.2f} after."
    )


def told(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The contenders that were measured, in their order."""
    return list(result["contenders"].items())

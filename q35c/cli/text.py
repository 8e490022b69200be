"""Write figures and tables for people."""

from __future__ import annotations

from collections.abc import Sequence

_MOST_WIDE = 500  # characters of a cell


def size_text(size: int) -> str:
    """Return bytes with a unit, such as `1.5 GiB`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _cut(cell: str) -> str:
    return cell if len(cell) <= _MOST_WIDE else cell[: _MOST_WIDE - 1] + "…"


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns; all but the first are flushed right."""
    # Every cell of a column is as wide as its widest, which a file may decide.
    lines = [[_cut(cell) for cell in line] for line in (header, *rows)]
    header, *rows = lines
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def written(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    return "\n".join([written(header), written(rule), *(written(row) for row in rows)])

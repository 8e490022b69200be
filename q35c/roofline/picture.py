"""The report as one HTML file with inline SVG: for every test a strip of its steps and a bar for each kernel.

The strip shows the steps in order, as wide as their time; a colour from red (far from the limit) to green (at it). A
bar is a kernel's time, its filled part the limit. Pointing at either shows the figures. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from q35c.roofline.machine import Limits
from q35c.roofline.report import (
    KernelRow,
    Test,
    kernel_rows,
    limits_text,
    microseconds,
    percent,
    summary_of,
    table_of,
)

_WIDTH, _LABEL, _ROW, _STRIP = 1100, 380, 20, 36  # pixels
_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
svg { display: block; margin: 0.5em 0; max-width: 100% } text { font-size: 12px }
table { border-collapse: collapse; font-size: 12px } th, td { padding: 1px 8px; text-align: right }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left } tr:nth-child(even) { background: #f4f4f4 }
"""


def html_report(title: str, tests: Sequence[Test], limits: Limits, threads: int) -> str:
    """Return the whole page for measured tests."""
    parts = [f"<h1>{escape(title)}</h1><p>{escape(limits_text(limits, threads))}</p>"]
    for test in tests:
        parts.append(f"<h2>{escape(test.name)}</h2><p>{escape(summary_of(test, limits))}</p>")
        parts += [strip(test, limits), bars(test, limits), html_table(test, limits)]
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def strip(test: Test, limits: Limits) -> str:
    """Return the steps in order, side by side."""
    total = sum(step.seconds or 0.0 for step in test.steps) or 1.0
    shapes: list[str] = []
    at = 0.0
    for number, step in enumerate(test.steps):
        seconds, limit = step.seconds or 0.0, limits.seconds(step.cost)
        width = _WIDTH * seconds / total
        said = f"step {number}: {step.kernel.name} {step.weight}, {_figures(limit, seconds)}"
        shapes.append(rectangle(at, 0, width, _STRIP, colour(limit, seconds), said))
        at += width
    return svg(_STRIP, shapes)


def bars(test: Test, limits: Limits) -> str:
    """Return a bar for each kernel: its time, and in it the limit."""
    rows = sorted(kernel_rows(test.steps, limits), key=lambda row: -(row.seconds or 0.0))
    longest = max((max(row.seconds or 0.0, row.limit_seconds) for row in rows), default=1.0) or 1.0
    scale = (_WIDTH - _LABEL - 150) / longest
    shapes = [shape for n, row in enumerate(rows) for shape in _bar(row, n * _ROW, scale)]
    return svg(len(rows) * _ROW, shapes)


def _bar(row: KernelRow, top: float, scale: float) -> list[str]:
    seconds = row.seconds or 0.0
    label = f"{row.kernel.name} {' '.join(row.weights)}"
    said = f"{label}: {row.shape}, {row.calls} calls, {_figures(row.limit_seconds, seconds)}, {row.bound}"
    shade = colour(row.limit_seconds, seconds)
    end = _LABEL + 8 + max(seconds, row.limit_seconds) * scale
    return [
        text(_LABEL, top + 14, label if len(label) <= 56 else label[:55] + "…", "end"),
        rectangle(_LABEL + 4, top + 3, seconds * scale, _ROW - 6, "#ddd", said),
        rectangle(_LABEL + 4, top + 6, row.limit_seconds * scale, _ROW - 12, shade, said),
        text(end, top + 14, f"{microseconds(seconds)} us, {percent(row.limit_seconds, seconds)}"),
    ]


def html_table(test: Test, limits: Limits) -> str:
    header, rows = table_of(test, limits)
    lines = [_line("th", header), *(_line("td", row) for row in rows)]
    return "<table>" + "\n".join(lines) + "</table>"


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _figures(limit: float, seconds: float) -> str:
    return f"{microseconds(seconds)} us, limit {microseconds(limit)} us, {percent(limit, seconds)}"


def colour(limit: float, seconds: float) -> str:
    """Return red for a small fraction of the limit, yellow for half, green for all of it."""
    share = min(1.0, limit / seconds) if seconds else 1.0
    return f"hsl({120 * share:.0f} 65% 50%)"


def svg(height: float, shapes: Sequence[str]) -> str:
    inner = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}">{inner}</svg>'
    )


def rectangle(x: float, y: float, width: float, height: float, fill: str, said: str) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" fill="{fill}">'
        f"<title>{escape(said)}</title></rect>"
    )


def text(x: float, y: float, said: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(said)}</text>'

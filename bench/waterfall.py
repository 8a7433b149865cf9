"""A waterfall picture (SVG) of where the time of starts went: the median of each step of some start ledgers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, NAMES, RIGHT = 900, 190, 80
ROW, TOP = 20, 46
STYLE = """<style>
text { fill: #1f2328 } .page { fill: #ffffff } .step { fill: #2563eb } .part { fill: #93c5fd } .line { stroke: #d0d7de }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .page { fill: #0d1117 } .step { fill: #58a6ff } .part { fill: #1f4f8f }
.line { stroke: #30363d } }
</style>"""


def medians(ledgers: Sequence[dict[str, Any]]) -> list[tuple[str, float, float, bool]]:
    """Name, start and duration in milliseconds, and whether it is a part of a step; parts below their steps.

    Args:
        ledgers: Of several starts (`kata inspect`, ``start``). A step that less than half of them have is left out.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for ledger in ledgers:
        for step in ledger["steps"]:
            found.setdefault(step["name"], []).append(step)
    rows = [
        (
            name,
            1e3 * statistics.median(one["start_seconds"] for one in steps),
            1e3 * statistics.median(one["duration_seconds"] for one in steps),
            "part_of" in steps[0],
        )
        for name, steps in found.items()
        if 2 * len(steps) >= len(ledgers)
    ]
    first = [step["name"] for step in ledgers[0]["steps"]]
    return sorted(rows, key=lambda row: first.index(row[0]) if row[0] in first else len(first))


def picture(title: str, rows: Sequence[tuple[str, float, float, bool]]) -> str:
    """The picture, for light and dark pages.

    Args:
        title: Above it.
        rows: See `medians`.
    """
    whole = max((start + lasts for _, start, lasts, _ in rows), default=0.0) or 1.0
    room = WIDTH - NAMES - RIGHT
    height = TOP + ROW * len(rows) + 12
    grid = next(step for step in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10**9) if whole / step <= 10)
    said = ", ".join(f"{name} {lasts:.0f} ms" for name, _, lasts, is_part in rows if not is_part)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
        ' role="img" aria-labelledby="t d" font-family="system-ui, sans-serif" font-size="12">',
        f'<title id="t">{escape(title)}</title>',
        f'<desc id="d">{escape(said)}</desc>',
        STYLE,
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        f'<text x="8" y="16" font-weight="bold">{escape(title)}</text>',
    ]
    for number in range(int(whole // grid) + 1):
        x = NAMES + room * number * grid / whole
        lines.append(
            f'<line x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{height - 8}" class="line"/>'
            f'<text x="{x:.1f}" y="{TOP - 12}" text-anchor="middle">{number * grid} ms</text>'
        )
    for number, (name, start, lasts, is_part) in enumerate(rows):
        y = TOP + ROW * number
        kind = "part" if is_part else "step"
        x, wide = NAMES + room * start / whole, max(1.0, room * lasts / whole)
        lines.append(
            f'<text x="{22 if is_part else 8}" y="{y + 13}">{escape(name)}</text>'
            f'<rect x="{x:.1f}" y="{y + 3}" width="{wide:.1f}" height="{ROW - 7}"'
            f' class="{kind}"/>'
            f'<text x="{x + wide + 4:.1f}" y="{y + 13}">{lasts:.1f}</text>'
        )
    return "\n".join((*lines, "</svg>\n"))

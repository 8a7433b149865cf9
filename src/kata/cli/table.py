"""Prints tables and JSON, and formats sizes and ages for users."""

from __future__ import annotations

import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any


def show(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a left-aligned table to stdout, the last column unpadded.

    Args:
        headings: One for each column.
        rows: Cells of each row, as many as there are headings; escaped before they are printed.
    """
    table = [list(headings), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    for row in table:
        line = "   ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")


def show_fields(
    columns: Sequence[str], headings: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Print a table of some of the fields of rows.

    Args:
        columns: The fields, from left to right.
        headings: Field -> its heading.
        rows: Field -> text, or a function without arguments that returns it.
    """

    def cell(value: Any) -> str:
        return str(value() if callable(value) else value)

    show([headings[name] for name in columns], [[cell(row[name]) for name in columns] for row in rows])


def show_json(content: Any) -> None:
    """Print JSON to stdout, indented, keys in the order given."""
    import json

    json.dump(content, sys.stdout, indent=2)
    sys.stdout.write("\n")


def show_json_line(content: Any) -> None:
    """Print JSON to stdout, in one line without spaces."""
    import json

    sys.stdout.write(json.dumps(content, separators=(",", ":")) + "\n")


def labels(found: Mapping[str, str]) -> str:
    """Labels as a list has them: sorted, ``KEY=VALUE`` with commas between."""
    return ",".join(f"{key}={value}" for key, value in sorted(found.items()))


def printable(text: str) -> str:
    """Escape characters that control a terminal: names and commands come from images and guests."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def human_size(count: float) -> str:
    """Bytes in the largest fitting binary unit: ``1.4MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f}{unit}" if unit == "B" else f"{count:.4g}{unit}"
        count /= 1024
    return f"{count:.4g}TiB"


def seconds_of(timestamp: str) -> float | None:
    """Unix time of an RFC 3339 UTC timestamp, with its fraction; None if it is not one."""
    import calendar

    whole, _, fraction = timestamp.rstrip("Z").partition(".")
    try:
        seconds = calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S"))
        return seconds + (float(f"0.{fraction}") if fraction else 0.0)
    except ValueError:
        return None


def age(timestamp: str) -> str:
    """The time since an RFC 3339 timestamp, as text: ``3 minutes``."""
    then = seconds_of(timestamp)
    return "unknown" if then is None else lapse(time.time() - then)


def lapse(seconds: float) -> str:
    """A duration as text, in its largest unit: ``3 minutes``."""
    passed = max(int(seconds), 0)
    for size, word in (
        (86400 * 365, "year"),
        (86400 * 30, "month"),
        (86400, "day"),
        (3600, "hour"),
        (60, "minute"),
    ):
        if passed >= size:
            count = passed // size
            return f"{count} {word}{'s' if count > 1 else ''}"
    return "less than a second" if passed < 1 else f"{passed} second{'s' if passed > 1 else ''}"

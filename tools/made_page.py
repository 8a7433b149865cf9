"""Writes or checks a page of docs/ that is made from the sources: for metrics_table.py and settings_table.py."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_or_check(page: Path, made: str) -> int:
    """Write a page, or with ``--check`` print how it differs from what it has to be.

    Args:
        page: Its path, below `ROOT`.
        made: Its content.

    Returns:
        The exit status: 1 where ``--check`` found a difference.
    """
    if "--check" not in sys.argv[1:]:
        page.write_text(made)
        return 0
    found = page.read_text() if page.exists() else ""
    name = str(page.relative_to(ROOT))
    sys.stdout.writelines(
        difflib.unified_diff(found.splitlines(True), made.splitlines(True), name, "made anew")
    )
    return int(found != made)

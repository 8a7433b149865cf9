"""Pages of docs/ of which a part is written by a suite, between two marks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def lines_of(page: Path, begin: str, end: str) -> list[str]:
    """What stands between the marks, each of which has a line of its own.

    Raises:
        ValueError: The page has no such marks.
    """
    return _parts(page, begin, end)[1].splitlines()


def write(page: Path, begin: str, end: str, lines: Iterable[str]) -> None:
    """Replace what stands between the marks.

    Raises:
        ValueError: The page has no such marks.
    """
    before, _, after = _parts(page, begin, end)
    page.write_text("\n".join([before + begin, *lines, end + after]))


def _parts(page: Path, begin: str, end: str) -> tuple[str, str, str]:
    before, found, rest = page.read_text().partition(begin + "\n")
    there, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{page} has no place for what goes between {begin!r} and {end!r}")
    return before, there, after

"""Completion candidates for ``kata-monitor``; see `kata.cli.complete`."""

from __future__ import annotations

from kata.cli.complete import of_options
from kata.monitor.options import OPTIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kata.cli.complete import Candidates


def complete(before: Sequence[str], word: str) -> Candidates:
    """Return the candidates.

    Args:
        before: The words before the one being typed, without the program.
        word: The beginning of the word being typed.
    """
    return of_options(OPTIONS, before, word)

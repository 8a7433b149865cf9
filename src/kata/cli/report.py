"""Prints errors for users."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.errors import KataError


def report(error: KataError) -> None:
    """Print an error and its hint to stderr, coloured on a terminal unless NO_COLOR is set.

    Quoted input (an argument, a line of a file) is escaped, so that it cannot control the terminal.
    """
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    red, cyan, off = ("\x1b[1;31m", "\x1b[36m", "\x1b[0m") if colour else ("", "", "")
    lines = f"{red}error:{off} {_printable(error.message)}\n"
    if error.hint:
        lines += f"{cyan}hint:{off} {_printable(error.hint)}\n"
    try:
        sys.stderr.write(lines)
        sys.stderr.flush()
    except OSError:
        pass  # only the exit status reports the error


def _printable(text: str) -> str:
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )

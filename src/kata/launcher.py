"""The command that starts another kata process.

Imported on every start, so it imports next to nothing.
"""

from __future__ import annotations

import os
import sys


def command() -> list[str]:
    """The argv that starts a new kata process; the caller appends its arguments.

    Works from a checkout, an installation and under pytest alike: the interpreter is the one that runs now,
    and ``__main__.py`` finds the packages from its own place, so neither the environment nor the working
    directory matters.

    Returns:
        ``[interpreter, "-I", "-S", ".../kata/__main__.py"]``, absolute paths.
    """
    package = os.path.dirname(os.path.abspath(__file__))
    return [sys.executable, "-I", "-S", os.path.join(package, "__main__.py")]

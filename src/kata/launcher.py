"""Which command starts another kata process, and which part of the package a process runs.

Imported before anything else on every start, so it imports next to nothing.
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


def main() -> int:
    """Run what `sys.argv` names: ``engine`` is the process of one sandbox, all else the human command line.

    Returns:
        The exit status.
    """
    if sys.argv[1:2] == ["engine"]:
        from kata.engine.main import main as run
    else:
        from kata.cli.main import main as run
    return run()

#!/usr/bin/python3 -IS
"""Entry point of ``kata-log-parser``. It finds its package in the same way as ``kata/__main__.py``."""

import os
import sys

_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
if _root not in sys.path:
    sys.path.append(_root)


def main() -> int:
    """Run the command line. Returns the exit status."""
    from kata import launcher

    launcher.settle()
    from kata.log_parser.main import main as command

    return launcher.let_go(command())


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/python3 -IS
"""kata as containerd's shim and as engine, with the stop points of `faults.stops` put around its steps.

The product knows nothing of them: this program takes the place of ``kata/__main__.py``, for the shim's commands and,
by way of `kata.launcher.command`, for the engines that they start.
"""

import os
import sys

_tests = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if _tests not in sys.path:
    sys.path.append(_tests)

from faults import on_path  # noqa: E402, F401 - the product is found from here on


def main() -> int:
    """Run what `sys.argv` names, as ``kata/__main__.py`` would."""
    from faults import stops
    from kata import __main__ as program
    from kata import launcher

    launcher.command = lambda: [sys.executable, "-I", "-S", os.path.realpath(__file__)]
    directory = os.environ.get(stops.VARIABLE)
    if directory:
        where = {"engine": "engine", "make-template": "maker", "wait-for-sandbox": "waiter"}
        stops.install(directory, where.get("".join(sys.argv[1:2]), "shim"))
    return program.main()


if __name__ == "__main__":
    sys.exit(main())

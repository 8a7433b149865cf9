#!/usr/bin/python3 -IS
"""`kata-runtime` with the stop points of `faults.stops` put around its steps; the engines that it starts have theirs.

It takes the place of ``kata/oci_runtime/__main__.py``, as `faults.shim` does of ``kata/__main__.py``.
"""

import os
import sys

_tests = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if _tests not in sys.path:
    sys.path.append(_tests)

from faults import on_path  # noqa: E402 - the product is found from here on


def main() -> int:
    """Run the command line."""
    from kata import launcher

    launcher.settle()
    from faults import stops
    from kata.oci_runtime.main import main as command

    engine = os.path.join(on_path.TESTS, "faults/shim.py")
    launcher.command = lambda: [sys.executable, "-I", "-S", engine]
    if directory := os.environ.get(stops.VARIABLE):
        stops.install(directory, "runtime")
    return launcher.let_go(command())


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/python3 -IS
"""`kata-runtime` with the stop points of `faults.stops` put around its steps; the engines that it starts have theirs.

It takes the place of ``kata/oci_runtime/__main__.py``, as `faults.shim` does of ``kata/__main__.py``.
"""

import os
import sys

_tests = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_root = os.path.dirname(_tests)
_version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
_places = (
    os.path.join(_root, "src"),
    _tests,
    os.path.join(_root, ".venv", "lib", _version, "site-packages"),
)
sys.path.extend(place for place in _places if place not in sys.path)


def main() -> int:
    """Run the command line."""
    from kata import launcher

    launcher.settle()
    from faults import stops
    from kata.oci_runtime.main import main as command

    engine = os.path.join(_tests, "faults/shim.py")
    launcher.command = lambda: [sys.executable, "-I", "-S", engine]
    if directory := os.environ.get(stops.VARIABLE):
        stops.install(directory, "runtime")
    return launcher.let_go(command())


if __name__ == "__main__":
    sys.exit(main())

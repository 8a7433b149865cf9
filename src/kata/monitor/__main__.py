#!/usr/bin/python3 -IS
"""Entry point of ``kata-monitor``. It finds its package in the same way as ``kata/__main__.py``, and beside it the
packages that only it imports: installed in ``monitor-packages``, in a checkout in ``build/monitor-env``.
"""

import os
import sys

_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
_above = os.path.dirname(_root)
_places = [_root, os.path.join(_above, "monitor-packages")]
if os.path.basename(_root) not in ("site-packages", "dist-packages"):
    _version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    _places[1:] = [
        os.path.join(_above, "build", "monitor-env"),
        os.path.join(_above, ".venv", "lib", _version, "site-packages"),
    ]
sys.path.extend(place for place in _places if place not in sys.path)


def main() -> int:
    """Run the command line. Returns the exit status."""
    from kata import launcher

    launcher.settle()
    from kata.monitor.main import main as command

    return launcher.let_go(command())


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/python3 -IS
"""Entry point of ``kata-runtime``. It finds its packages in the same way as ``kata/__main__.py``."""

import os
import sys

_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
_places = [_root]
if os.path.basename(_root) not in ("site-packages", "dist-packages"):
    _version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    _places.append(os.path.join(os.path.dirname(_root), ".venv", "lib", _version, "site-packages"))
sys.path.extend(place for place in _places if place not in sys.path)


def main() -> int:
    """Run the command line. Returns the exit status."""
    from kata import launcher

    launcher.settle()
    from kata.oci_runtime.main import main as command

    return launcher.let_go(command())


if __name__ == "__main__":
    _status = main()
    from kata import launcher as _launcher

    _launcher.leave(_status)

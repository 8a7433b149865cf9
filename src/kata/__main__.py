#!/usr/bin/python3 -IS
"""Where every kata process starts: ``python -I -S .../kata/__main__.py ARGUMENT...``.

``-I -S`` keeps the caller's ``PYTHON*`` variables and working directory out and saves the ten to thirty
milliseconds that ``site`` and ``.pth`` files cost, so this file itself puts two directories behind the
standard library on `sys.path`: the one that holds this package, and the one with the packages we depend on.
Installed, they are the same (``.../site-packages``); in a checkout the second is its ``.venv``.
"""

import os
import sys

_root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_places = [_root]
if os.path.basename(_root) not in ("site-packages", "dist-packages"):
    _version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    _places.append(os.path.join(os.path.dirname(_root), ".venv", "lib", _version, "site-packages"))
sys.path.extend(place for place in _places if place not in sys.path)


SHIM = "containerd-shim-kata-v2"
"""What containerd executes for ``io.containerd.kata.v2``: a link to this file."""


def main() -> int:
    """Run what was asked for, and tell of what nobody expected in one sentence.

    Returns:
        The exit status.
    """
    try:
        status = _run()
    except SystemExit as asked:  # by --help
        status = int(asked.code or 0)
    except Exception as error:
        from kata import crash

        kind = next((word for word in ("engine", "shim") if sys.argv[1:2] == [word]), "")
        if os.path.basename(sys.argv[0]) == SHIM:
            kind = "shim"
        status = crash.last_resort(
            error, SHIM if kind == "shim" else crash.name_of(sys.argv), 1 if kind else 125
        )
    from kata import launcher

    return launcher.let_go(status)


def _run() -> int:
    """Run what `sys.argv` names: ``engine`` is the process of one sandbox, ``wait-for-sandbox`` waits to be one, and
    ``engine-parent`` forks such; ``export-spans``, ``layer-image`` and ``make-template`` are helpers of its. Under
    containerd's name for it, or as ``shim``, it is a command of containerd's; all else is the human command line.

    Returns:
        The exit status.
    """
    from kata import launcher

    launcher.settle()
    if sys.argv[1:2] == ["engine"]:
        from kata.engine.main import main as engine

        return engine()
    if sys.argv[1:2] == ["engine-parent"]:
        from kata.engine.parent import main as parent

        if not parent():
            return 0
        from kata.engine.main import main as engine  # this process is one now

        return engine(forked=True)
    if sys.argv[1:2] == ["export-spans"]:
        from kata.trace_export import main as export

        return export()
    if sys.argv[1:2] == ["make-template"]:
        from kata.engine.factory.maker import main as make_template

        return make_template()
    if sys.argv[1:2] == ["wait-for-sandbox"]:
        from kata.engine.factory.waiting import main as wait_for_sandbox

        return wait_for_sandbox()
    if sys.argv[1:2] == ["layer-image"]:
        from kata.storage.layer_images import main as layer_image

        return layer_image(sys.argv[2:])
    named = os.path.basename(sys.argv[0]) == SHIM
    if named or sys.argv[1:2] == ["shim"]:
        from kata.shim.main import main as shim

        return shim(sys.argv[1 if named else 2 :])
    from kata.cli.main import main as command

    return command()


if __name__ == "__main__":
    _status = main()
    from kata import launcher as _launcher

    _launcher.leave(_status)

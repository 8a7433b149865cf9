"""Programs in the place of others: a command with words and an environment of its own."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_script(path: Path, command: Sequence[object], environment: Mapping[str, object]) -> None:
    """Write a program that executes a command with these variables set, and with its own arguments behind.

    conmon, podman and systemd call a runtime without the environment that a test gave to them.

    Args:
        path: The program's; its directory is there.
        command: Its words.
        environment: What is set besides what the caller has.
    """
    exports = "".join(f"export {name}={shlex.quote(str(value))}\n" for name, value in environment.items())
    path.write_text(f'#!/bin/sh\n{exports}exec {shlex.join(map(str, command))} "$@"\n')
    path.chmod(0o755)

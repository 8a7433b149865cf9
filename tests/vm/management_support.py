"""Asks engines' management sockets with curl, and looks at what that costs an engine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def curl(path: Path, target: str, *arguments: str) -> tuple[int, str, str]:
    """Ask an engine.

    Args:
        path: Its management socket.
        target: What for.
        arguments: Further ones for curl.

    Returns:
        Status, content type, content.

    Raises:
        CalledProcessError: There was no answer.
        FileNotFoundError: The socket's directory is gone.
    """
    # By a name in the working directory: the whole path may be too long for curl.
    command = ["curl", "-sS", "--max-time", "60", "--unix-socket", path.name, "-o", "-"]
    command += ["-w", "\n%{http_code} %{content_type}", *arguments, f"http://sandbox{target}"]
    done = subprocess.run(command, capture_output=True, check=True, cwd=path.parent)
    body, _, words = done.stdout.decode().rpartition("\n")
    status, _, kind = words.partition(" ")
    return int(status), kind, body


def descriptors(pid: int) -> int:
    """How many a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def private_kib(pid: int) -> int:
    """Memory of a process that it shares with nobody and has written to, in KiB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1])
    raise AssertionError("no Private_Dirty in smaps_rollup")

"""What was found out about this host once, kept for as long as it is about the same thing.

A small file: a key, which says what the answer is about (a boot, a program's inode), then the answer. Not to have it is
no error, only slower. Plain strings: these are read on every container start.
"""

from __future__ import annotations

import os

from kata import paths, sysio


def read(path: str, key: str) -> list[str]:
    """The lines of the answer.

    Args:
        path: The file.
        key: What the answer has to be about; without newlines.

    Returns:
        The lines; none where there is no answer, or one about something else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            first, *lines = file.read().split("\n")
    except (OSError, UnicodeDecodeError):
        return []
    return lines[:-1] if first == key else []


def write(path: str, key: str, *lines: str) -> None:
    """Keep an answer; whoever reads meanwhile finds this one or the last."""
    try:
        paths.make_dirs(os.path.dirname(path), 0o711)
        sysio.replace_file(path, "".join(f"{line}\n" for line in (key, *lines)).encode())
    except OSError:
        pass  # it will be found out again


def program_key(binary: str) -> str:
    """A key for what was found out about a program; another one after each change of it.

    Args:
        binary: Its absolute path.

    Raises:
        OSError: There is none.
    """
    status = os.stat(binary)
    return f"1 {binary} {status.st_dev} {status.st_ino} {status.st_mtime_ns} {status.st_size}"

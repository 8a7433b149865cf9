"""What a guest has said as text that is safe to look at: the ends of its console and of a container's log."""

from __future__ import annotations

import json
import os
from binascii import a2b_base64

MAX_TAIL = 1 << 20
"""Bytes that are handed out at most, before escaping."""
_MAX_FILES = 16
_MAX_READ = 8 << 20
"""From here on no more is read of a file: it holds `MAX_TAIL` bytes of output however they are written."""
_PLAIN = str.maketrans(
    {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
)


def of_console(path: str, limit: int) -> bytes:
    """The end of a console.

    Args:
        path: Its newest file; ``path.1`` is older.
        limit: Bytes, before escaping.

    Returns:
        Text in UTF-8; empty if the guest has said nothing.
    """
    data = b""
    for name in (path, f"{path}.1"):
        if len(data) < limit:
            data = _end_of(name, limit - len(data)) + data
    return escaped(data)


def of_log(path: str, limit: int) -> bytes:
    """The end of a log that `kata.engine.standard_streams.logfile` writes.

    Args:
        path: Its newest file; ``path.1`` is older, and so on.
        limit: Bytes of output, before escaping.

    Returns:
        What the container has written, both streams, in UTF-8; empty if nothing is kept.
    """
    output = b""
    for number in range(_MAX_FILES):
        name = f"{path}.{number}" if number else path
        if len(output) >= limit or not os.path.lexists(name):
            break
        output = _end_of_output(name, limit - len(output)) + output
    return escaped(output[-limit:] if limit else b"")


def _end_of_output(path: str, limit: int) -> bytes:
    # A record takes more than what it holds, up to six times as much: quotes, time, and escaped characters.
    want = 2 * limit + (64 << 10)
    while True:
        raw = _end_of(path, want)
        output = b"".join(map(_output, raw.split(b"\n")))
        if len(output) >= limit or len(raw) < want or want >= _MAX_READ:
            return output
        want *= 4


def _output(line: bytes) -> bytes:
    try:
        record = json.loads(line)
        if "log64" in record:
            return a2b_base64(record["log64"])
        return str(record["log"]).encode("utf-8", "surrogatepass")
    except (ValueError, KeyError, TypeError):
        return b""  # the first of a file's end is often a part of one


def _end_of(path: str, limit: int) -> bytes:
    """The last bytes of a file; empty if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return b""
    try:
        size = os.fstat(fd).st_size
        return os.pread(fd, limit, max(0, size - limit))
    finally:
        os.close(fd)


def escaped(data: bytes) -> bytes:
    """What a guest has said as text in UTF-8, without what would control a terminal."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    return text.translate(_PLAIN).encode("utf-8", "replace")

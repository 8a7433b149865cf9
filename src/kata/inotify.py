"""What happens in directories of the host, as the kernel tells it (inotify(7)).

All calls raise `OSError` with errno and, where there is one, the path. Descriptors are the caller's to close.
"""

from __future__ import annotations

import os
import sys

from kata import sysio

IN_MODIFY = 0x0000_0002
IN_MOVED_FROM = 0x0000_0040
IN_MOVED_TO = 0x0000_0080
IN_CREATE = 0x0000_0100
IN_DELETE = 0x0000_0200
IN_DELETE_SELF = 0x0000_0400
IN_MOVE_SELF = 0x0000_0800
IN_Q_OVERFLOW = 0x0000_4000
IN_IGNORED = 0x0000_8000
IN_ONLYDIR = 0x0100_0000


def init() -> int:
    """inotify_init1(2): a new queue of file system events, non-blocking. Returns its descriptor."""
    return sysio.check(sysio.c_library().inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))


def add_watch(fd: int, path: str, mask: int) -> int:
    """inotify_add_watch(2). Returns the number of the watch: the same again for a file that is watched already."""
    return sysio.check(sysio.c_library().inotify_add_watch(fd, os.fsencode(path), mask), path)


def rm_watch(fd: int, watch: int) -> None:
    """inotify_rm_watch(2)."""
    sysio.check(sysio.c_library().inotify_rm_watch(fd, watch))


def read(fd: int) -> list[tuple[int, int, str]]:
    """The events that are waiting, up to 64 KiB of them (inotify(7)).

    Args:
        fd: From `init`.

    Returns:
        Of each the watch (-1 for `IN_Q_OVERFLOW`), what has happened (`IN_*`), and the name in the watched directory,
        or an empty one.
    """
    try:
        raw = os.read(fd, 1 << 16)
    except BlockingIOError:
        return []
    events, at = [], 0
    while at + 16 <= len(raw):
        watch = int.from_bytes(raw[at : at + 4], sys.byteorder, signed=True)
        mask = int.from_bytes(raw[at + 4 : at + 8], sys.byteorder)
        length = int.from_bytes(raw[at + 12 : at + 16], sys.byteorder)
        events.append((watch, mask, os.fsdecode(raw[at + 16 : at + 16 + length].rstrip(b"\0"))))
        at += 16 + length
    return events

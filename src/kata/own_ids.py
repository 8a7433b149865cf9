"""User ids for the programs of a sandbox in a user namespace: the last of an ordinary user's subordinate ones.

A sandbox holds its ids by a lock on a byte of one file, for as long as its engine lives; its programs end with that.
Ids beneath the last ones are those that containers' users have, and files in volumes.

Source: fcntl(2), "Open file description locks".
"""

from __future__ import annotations

import fcntl
import os
import struct

from kata import paths, sysio

_F_OFD_SETLK = 37
_LOCK = "users.lock"
_NOBODY = 65534
_PER_SANDBOX = 2
_SANDBOXES = 1024
"""How many can have ids at one time."""
_LEAST = 4096
"""A user namespace with fewer ids is one for containers' users alone."""

_taken: tuple[int, int] | None = None
"""The process that took ids, and the last of them."""


def take(which: int) -> int:
    """An id that no other sandbox of this user has.

    Args:
        which: Of the sandbox's, from 0.

    Returns:
        The id, of a user and a group; 0 where there is none to be had.
    """
    global _taken
    if _taken is None or _taken[0] != os.getpid():
        last = _claim()
        if not last:
            return 0
        _taken = os.getpid(), last
    return _taken[1] - which


def last_id() -> int:
    """The last id that can be taken; 0 where this namespace has too few."""
    users, groups = (
        {(inside, count) for inside, _, count in sysio.id_map(kind) if count >= _LEAST}
        for kind in ("uid", "gid")
    )
    both = users & groups
    return max((min(inside + count, _NOBODY) - 1 for inside, count in both if inside < _NOBODY), default=0)


def _claim() -> int:
    """Take a sandbox's ids, for as long as this process lives. Returns the last of them, or 0."""
    last = last_id()
    if not last:
        return 0
    try:
        paths.make_dirs(paths.run_dir(), 0o711)
        fd = os.open(
            os.path.join(paths.run_dir(), _LOCK),
            os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC,
            0o600,
        )
    except OSError:
        return 0
    for offset in range(_SANDBOXES):
        slot = (os.getpid() + offset) % _SANDBOXES
        # struct flock of 64-bit machines: type, whence, start, length, pid.
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, slot, 1, 0)
        try:
            fcntl.fcntl(fd, _F_OFD_SETLK, lock)
        except OSError:
            continue
        return last - _PER_SANDBOX * slot  # the descriptor stays open
    os.close(fd)
    return 0

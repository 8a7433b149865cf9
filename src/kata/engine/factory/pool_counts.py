"""What has become of the warm pool's machines, counted since the host booted: a file beside their directory.

Nobody stays who could count: who waits becomes a sandbox's engine, or ends. So each adds to the file what it has done.
A figure is worth no start, so whatever is wrong with the file is passed over.
"""

from __future__ import annotations

import fcntl
import os
import time

from kata import paths, sysio

MADE, TAKEN, MISSED = "made", "taken", "missed"
"""A machine has come to wait; one was used by a start; a start could have used one, and none waited for it."""
TOTALS = (MADE, TAKEN, MISSED)
DROPPED = "dropped"
MEMORY, TEMPLATE, MACHINE, TOLD = "memory", "template", "machine", "told"
SILENT, UNFIT, FAILED, KILLED = "silent", "unfit", "failed", "killed"
REASONS = {
    MEMORY: "the host was short of memory",
    TEMPLATE: "its template was gone, or no longer that of such machines",
    MACHINE: "it ended, or its file server",
    TOLD: "it was told to: by kata factory destroy, or to make room for another kind",
    SILENT: "whoever asked for it did not go on",
    UNFIT: "a start has asked for it, and could not use it",
    FAILED: "it did not come so far that it waited",
    KILLED: "somebody killed the process that waited",
}
"""Why a machine was dropped, and what that means."""
_PATIENCE = 50
_PATIENCE_S = 0.001
_LARGEST = 4096


def path() -> str:
    """The file."""
    return os.path.join(paths.run_dir(), f"{paths.POOL}.counts")


def count(what: str, times: int = 1) -> None:
    """Add to a count.

    Args:
        what: `MADE`, `TAKEN`, `MISSED` or what `dropped` says.
        times: How often it has happened.
    """
    try:
        with sysio.Fd(os.open(path(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as file:
            if _lock(file.raw):
                counts = _parsed(os.pread(file.raw, _LARGEST, 0))
                counts[what] = counts.get(what, 0) + times
                # It only gets longer, so a single write leaves it whole.
                text = "".join(f"{name} {number}\n" for name, number in counts.items())
                os.pwrite(file.raw, text.encode(), 0)
    except OSError:
        pass


def dropped(reason: str) -> str:
    """The name of a count: machines that were dropped for one of `REASONS`."""
    return f"{DROPPED}-{reason}"


def read() -> dict[str, int]:
    """All counts by name, those of `MADE`, `TAKEN`, `MISSED` and of each reason always among them."""
    found = dict.fromkeys((*TOTALS, *map(dropped, REASONS)), 0)
    try:
        with open(path(), "rb") as file:
            found.update(_parsed(file.read(_LARGEST)))
    except OSError:
        pass  # the pool has never been on
    return found


def by_reason(counts: dict[str, int]) -> dict[str, int]:
    """How many of `read` were dropped for each reason."""
    return {reason: counts[dropped(reason)] for reason in REASONS}


def _lock(fd: int) -> bool:
    """Be the only one who adds, within a moment: somebody who has the lock may just be stopped."""
    for _ in range(_PATIENCE):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(_PATIENCE_S)
    return False


def _parsed(text: bytes) -> dict[str, int]:
    found = {}
    for line in text.decode("ascii", "replace").split("\n"):
        name, _, number = line.partition(" ")
        if name and number.isdecimal():
            found[name] = int(number)
    return found

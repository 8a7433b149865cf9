"""Figures of a monitor's process, from /proc."""

from __future__ import annotations

import os
import time

KEPT_S = 5.0
"""How long the size of the guest's memory on the host is kept, in seconds: it is the dearest figure (2 ms, emulated
6 ms), and who looks every second can do without."""
_CHUNK = 1 << 13
_RESIDENT = b"\nRss:"
_FLAGS = b"\nVmFlags:"
_NOT_DUMPED = b" dd"
_HUGE = b" ht"
_HUGE_SIZES = (b"\nShared_Hugetlb:", b"\nPrivate_Hugetlb:")
"""Of huge pages that are set aside, which are in no ``Rss``."""


class Figures:
    """Looks at a monitor.

    Args:
        pid: Its process id.
    """

    __slots__ = ("_at_s", "_pid", "_resident")

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._resident = 0
        self._at_s = -KEPT_S

    def look(self) -> dict[str, int]:
        """See `kata.hypervisor.protocols.Machine.metrics`."""
        try:
            with open(f"/proc/{self._pid}/stat", "rb") as file:
                fields = file.read().rpartition(b") ")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return {}
        tick_ns = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
        found = {
            "rss_bytes": int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
            "cpu_ns": (int(fields[11]) + int(fields[12])) * tick_ns,
            "threads": int(fields[17]),
        }
        if time.monotonic() - self._at_s >= KEPT_S:
            try:
                self._resident = guest_resident_bytes(self._pid)
            except OSError:  # it has just ended, or may not be looked at
                self._resident = 0
            self._at_s = time.monotonic()
        if self._resident:
            found["guest_resident_bytes"] = self._resident
        return found


def guest_resident_bytes(pid: int) -> int:
    """How much of the guest's memory takes memory of the host, in bytes.

    The guest's memory is told from what the monitor itself takes (under emulation far more than a small guest does) by
    a flag: it is what the monitor has asked the kernel to leave out of core dumps (``dd``; proc_pid_smaps(5)). Of one
    that does not ask, it is not known.

    Args:
        pid: The monitor's process id.

    Returns:
        0 for a process that has ended and was not reaped, or where it is not known.

    Raises:
        OSError: There is no such process, or it may not be looked at.
    """
    total_kb = 0
    rest = b""
    fd = os.open(f"/proc/{pid}/smaps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while part := os.read(fd, _CHUNK):
            rest += part
            done = rest.rfind(b"\n")
            at = 0
            # Of each mapping, ``Rss:`` is among the first lines, and ``VmFlags:`` is the last.
            while 0 <= (flags := rest.find(_FLAGS, at)) < done:
                end = rest.index(b"\n", flags + 1)
                if _NOT_DUMPED in rest[flags:end]:
                    for name in _HUGE_SIZES if _HUGE in rest[flags:end] else (_RESIDENT,):
                        size = rest.index(name, at) + len(name)
                        total_kb += int(rest[size : rest.index(b"kB", size)])
                at = end
            rest = rest[at:]
    finally:
        os.close(fd)
    return total_kb * 1024

"""Whether the host has memory for machines that nobody uses yet."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_PRESSURE = 20.0
"""Percent of the last ten seconds in which something on the host waited for memory (PSI, the kernel's
``Documentation/accounting/psi.rst``): with more, nothing waits."""
_FILES = (
    ("memory.max", "memory.current", b"inactive_file "),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", b"total_inactive_file "),
)
"""Of version 2 and 1: the limit, what is used, and what of that the kernel takes back first (a line of memory.stat)."""


def cgroups() -> list[str]:
    """Directories of the memory cgroups that this process is in, its own first, whose limits may be reached before the
    host's memory is: a service's ``MemoryMax``, a container's.
    """
    from kata.resources import host_cgroup

    try:
        found = [one for one in host_cgroup.hierarchies() if "memory" in one.controllers]
    except OSError:
        return []
    directories = []
    for hierarchy in found:
        place = hierarchy.own.rstrip("/")
        while len(place) > len(hierarchy.top.rstrip("/")):
            directories.append(place)
            place = place.rpartition("/")[0]
        directories.append(hierarchy.top)
    return directories


def shortage(free_mib: int, within: Sequence[str] = ()) -> str:
    """Why nothing should wait now, as a clause; empty if something may.

    Args:
        free_mib: MiB that have to be available.
        within: Directories of memory cgroups: as much has to be available in each.
    """
    try:
        with open("/proc/meminfo", "rb") as file:
            available = next(int(line.split()[1]) for line in file if line.startswith(b"MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return "how much memory is available is not known"
    if available >> 10 < free_mib:
        return f"{available >> 10} MiB are available, and {free_mib} have to be"
    for directory in within:
        left = _left_in(directory)
        if left is not None and left >> 20 < free_mib:
            return f"{left >> 20} MiB are available in {directory}, and {free_mib} have to be"
    try:
        with open("/proc/pressure/memory", "rb") as file:
            pressure = float(file.readline().split(b"avg10=")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return ""  # this kernel does not say
    return f"memory is short (some avg10={pressure:g})" if pressure > MOST_PRESSURE else ""


def _left_in(directory: str) -> int | None:
    """Bytes that a memory cgroup may still take; None where it has no limit."""
    for limit, used, inactive in _FILES:
        try:
            with open(f"{directory}/{limit}", "rb") as file:
                most = int(file.read())
            with open(f"{directory}/{used}", "rb") as file:
                now = int(file.read())
            with open(f"{directory}/memory.stat", "rb") as file:
                cache = next(int(line.split()[1]) for line in file if line.startswith(inactive))
        except (OSError, ValueError, StopIteration):
            continue  # of the other version; or ``max``
        return max(0, most - now + cache)
    return None

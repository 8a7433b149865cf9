"""Memory of guests in huge pages of the host (hugetlbfs), which the host's owner sets aside.

They are 2 MiB each. None can be given back while they are set aside, and no cgroup of memory counts them. Source: the
kernel's Documentation/admin-guide/mm/hugetlbpage.rst.
"""

from __future__ import annotations

from kata.errors import ResourceExhaustedError, UnsupportedError

MIB = 2
_PLACE = "/sys/kernel/mm/hugepages/hugepages-2048kB"


def whole(mib: int) -> int:
    """So much memory in whole pages, in MiB."""
    return -(-mib // MIB) * MIB


def check(mib: int, place: str = _PLACE) -> None:
    """Say at once, and better than a monitor would, that a machine does not fit.

    Args:
        mib: Memory of the machine.
        place: The kernel's directory about pages of that size.

    Raises:
        UnsupportedError: The host's kernel has none.
        ResourceExhaustedError: Too few are free.
    """
    try:
        free, reserved = (_number(f"{place}/{name}_hugepages") for name in ("free", "resv"))
    except OSError as error:
        raise UnsupportedError(
            f"this host has no huge pages of {MIB} MiB: {place}: {error.strerror}",
            "enable_hugepages = false",
        ) from error
    needed = whole(mib) // MIB
    there = max(free - reserved, 0)
    if there < needed:
        raise ResourceExhaustedError(
            f"the virtual machine needs {needed} huge pages of {MIB} MiB, and the host has {there} free",
            f"sysctl vm.nr_hugepages=N sets some aside; {needed - there} are missing. Or enable_hugepages = false.",
        )


def _number(path: str) -> int:
    with open(path, encoding="ascii") as file:
        return int(file.read())

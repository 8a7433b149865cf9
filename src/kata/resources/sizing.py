"""How large a virtual machine is: one formula.

* **vCPUs**: the CPUs asked for, rounded up; 1 when nothing is asked. The fraction is a cgroup limit in the guest.
* **Memory**: what was asked for, plus what the guest's kernel keeps for itself, so that ``MemTotal`` in the guest
  is at least what was asked for and at most 5 % more; with a least size below which no guest comes up. 2 GiB when
  nothing is asked (half of the host's memory where that is less): only what is touched costs.

What the kernel keeps is a fixed part (its code and data, its first tables) and one that grows with the memory:
``struct page`` is 64 bytes for every 4096, and hash tables add an eighth to that. Measured as the difference between
QEMU's ``-m`` and ``MemTotal``, from 64 MiB to 12 GiB; `tests/vm/test_hypervisor.py` holds the guest to it.
"""

from __future__ import annotations

import os

from ..errors import ResourceExhaustedError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

MIB = 1 << 20
DEFAULT_MEMORY_MIB = 2048
KERNEL_MIB = {"small": 21, "distro": 50}
"""The fixed part, by kind of kernel."""
GROWING_PART = 64 / 4096 * (1 + 1 / 8)
LEAST_MIB = {"small": 64, "distro": 192}
"""With less the guest does not come up: the initrd has to fit twice while it is unpacked."""


HOST_FIXED_MIB = {"kvm": 256, "tcg": 384}
"""What running a machine takes on the host besides the guest's memory, by accelerator: hypervisor (under emulation
with its translated code), engine, network helper, and some page cache of its disks to work with."""
HOST_GROWING_PART = 1 / 32
"""The same, for each byte of the guest's: page tables, the emulator's table of pages."""
HOST_CPUS = 1.0
"""Processors for engine, devices and network helper besides the virtual ones."""


class Size:
    """The size of a machine.

    Attributes:
        vcpus: Virtual CPUs.
        memory_mib: Memory of the machine in MiB.
    """

    __slots__ = ("memory_mib", "vcpus")

    def __init__(self, vcpus: int, memory_mib: int) -> None:
        self.vcpus = vcpus
        self.memory_mib = memory_mib


def plan(cpus: float | None, memory: int | None, kernel: str = "small") -> Size:
    """The machine for what was asked.

    Args:
        cpus: Number of CPUs, or None.
        memory: Bytes, or None.
        kernel: Kind of the guest's kernel, ``small`` or ``distro``.

    Raises:
        UsageError: More CPUs than the host has.
        ResourceExhaustedError: More memory than the host has.
    """
    vcpus = 1 if cpus is None else max(1, -int(-cpus // 1))
    online = len(os.sched_getaffinity(0))
    if vcpus > online:
        raise UsageError(
            f"{cpus:g} CPUs were asked for, and this host has {online}", f"at most --cpus {online}"
        )
    if memory is None:
        return Size(vcpus, min(DEFAULT_MEMORY_MIB, max(_total_mib() // 2, 256)))
    asked = -(-memory // MIB)
    needed = max(int((asked + KERNEL_MIB[kernel]) / (1 - GROWING_PART)) + 1, LEAST_MIB[kernel])
    total = _total_mib()
    if needed > total:
        raise ResourceExhaustedError(
            f"{asked} MiB of memory were asked for, and this host has {total} MiB in all",
            "ask for less with -m",
        )
    return Size(vcpus, needed)


def host_memory(memory_mib: int, accel: str) -> int:
    """Bytes that a machine of this size and its helpers may use on the host.

    Args:
        memory_mib: The machine's memory.
        accel: ``kvm`` or ``tcg``.
    """
    return (memory_mib + HOST_FIXED_MIB[accel] + int(memory_mib * HOST_GROWING_PART)) * MIB


def host_cpus(vcpus: int) -> float:
    """Processors of the host that a machine with so many and its helpers may use."""
    return vcpus + HOST_CPUS


def host_available_mib() -> int:
    """MiB that new processes can have without swapping (``MemAvailable``)."""
    return _meminfo()["MemAvailable"] >> 10


def _total_mib() -> int:
    return _meminfo()["MemTotal"] >> 10


def _meminfo() -> Mapping[str, int]:
    found = {}
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            found[name] = int(rest.split()[0])
    return found

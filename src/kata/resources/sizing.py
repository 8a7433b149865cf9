"""How large a virtual machine is: one formula. docs/sizing.md has it for readers, `kata explain` with numbers.

* **CPUs**: those asked for, rounded up; without a quota the processors of the cpuset; `default_vcpus` when none are
  asked. The fraction is a cgroup limit in the guest, which holds from a container's first process on, and not for the
  boot.
* **Memory**: what was asked for, plus what the guest's kernel keeps for itself, plus what the guest uses beside its
  containers, so that a container's own limit is what ends it; with a least size below which no guest comes up.
  `default_memory` when nothing is asked (half of the host's memory where that is less): only what is touched costs.

What the kernel keeps is a fixed part (its code and data, its first tables) and one that grows with the memory:
``struct page`` is 64 bytes for every 4096, and hash tables add an eighth to that. Measured as the difference between
the machine's memory and ``MemTotal``, from 64 MiB to 12 GiB; `tests/vm/test_hypervisor.py` holds the guest to it.

What a pod asks for is what its CRI says of the sandbox, and at least the sum of its containers' limits; and
`default_memory` on top for those of its containers that have no limit while others have one.
"""

from __future__ import annotations

import os

from kata.errors import ResourceExhaustedError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

MIB = 1 << 20
DEFAULT_VCPUS = 1
DEFAULT_MEMORY_MIB = 2048
KERNEL_MIB = {"small": 21, "distro": 50}
"""The fixed part, by kind of kernel."""
GROWING_PART = 64 / 4096 * (1 + 1 / 8)
BESIDE_MIB = 9
"""What the guest uses beside its containers, and what no limit of theirs counts: the agent, buffers of the devices,
and the free pages that the kernel keeps in reserve. (What its devices take is on top: `hypervisor.protocols.Started`.)
About 2 MiB less than that, so that it is the guest that is out of memory just before the container is at its limit:
Linux ends a process at once then, while a group at its limit goes on giving up and reading back its program's pages,
for minutes under emulation."""
BESIDE_PART = 0.01
"""The same, for each byte that is asked for: page tables, and what the kernel keeps of files."""
RESERVE_MIB = 20
"""Reserve for each zone of memory (ZONE_DMA32, ZONE_NORMAL, and ZONE_DMA in distributions' kernels) in a guest with
transparent huge pages, which those of less than `HUGE_PAGES_MIB` have not (khugepaged's recommended_min_free_kbytes in
mm/khugepaged.c: 22 MiB, in place of 2)."""
RESERVE_PART = 0.05
"""All zones' reserve is no larger part of the memory than this."""
HUGE_PAGES_MIB = 504
NORMAL_MIB = 2816
"""Beyond this a PC has memory above 4 GiB."""
LEAST_MIB = {"small": 64, "distro": 192}
"""With less the guest does not come up: the initrd has to fit twice while it is unpacked."""
SLACK = 0.04
"""Part of the machine's memory that may stay when it shrinks: so `MemTotal` is within 5 % of what was asked."""
SHRUNK_MIB = 128
"""No balloon takes memory of a guest that would have less than this then: one that was started with more holds more."""
MOST_CPUSET = 1 << 13
"""More processors than this no kernel has (CONFIG_NR_CPUS)."""
MOST_VCPUS = 16
"""So many a machine may grow to where `default_maxvcpus` is not set: each is a thread of the host, used or not."""
OF_SANDBOX = "the sandbox's annotations"
"""How `ResourceRequest.source` begins when it is a CRI that asks for a pod as a whole."""


HOST_GROWING_PART = 1 / 32
"""What running a machine takes on the host for each byte of the guest's memory: page tables, the emulator's table of
pages. (The fixed part is the hypervisor's to say: `kata.hypervisor.protocols.Monitor.host_overhead_mib`.)"""
HOST_CPUS = 1.0
"""Processors for engine, devices and network helper besides the virtual ones."""


class ResourceRequest:
    """What somebody asks for.

    Attributes:
        cpus: Number of CPUs, or None.
        memory: Bytes, or None.
        source: Who asks, in words.
        cpuset: The host's processors that a container without a quota may run on; empty for all.
    """

    __slots__ = ("cpus", "cpuset", "memory", "source")

    def __init__(
        self,
        cpus: float | None = None,
        memory: int | None = None,
        source: str = "",
        cpuset: frozenset[int] = frozenset(),
    ) -> None:
        self.cpus = cpus
        self.memory = memory
        self.source = source
        self.cpuset = cpuset


class Limits:
    """What the host's owner says about sizes; 0 is "nothing".

    Attributes:
        default_vcpus: CPUs when none are asked; negative for all of the host's.
        default_memory_mib: Memory of the machine when none is asked.
        max_vcpus, max_memory_mib: No machine has more.
        fixed: A machine keeps the size that it is started with.
        fixed_memory: It keeps its memory.
    """

    __slots__ = (
        "default_memory_mib",
        "default_vcpus",
        "fixed",
        "fixed_memory",
        "max_memory_mib",
        "max_vcpus",
    )

    def __init__(
        self,
        *,
        default_vcpus: float = 0,
        default_memory_mib: int = 0,
        max_vcpus: int = 0,
        max_memory_mib: int = 0,
        fixed: bool = False,
        fixed_memory: bool = False,
    ) -> None:
        self.default_vcpus = default_vcpus
        self.default_memory_mib = default_memory_mib
        self.max_vcpus = max_vcpus
        self.max_memory_mib = max_memory_mib
        self.fixed = fixed
        self.fixed_memory = fixed_memory


class Size:
    """The size of a machine.

    Attributes:
        vcpus: Virtual CPUs.
        memory_mib: Memory of the machine in MiB.
        max_vcpus, max_memory_mib: Up to where it may grow while it runs.
        kernel: Kind of the guest's kernel.
        asked: What it was planned for.
        default_mib: Memory of a machine for which none is asked.
    """

    __slots__ = ("asked", "default_mib", "kernel", "max_memory_mib", "max_vcpus", "memory_mib", "vcpus")

    def __init__(
        self,
        vcpus: int,
        memory_mib: int,
        max_vcpus: int,
        max_memory_mib: int,
        kernel: str,
        asked: ResourceRequest,
        default_mib: int,
    ) -> None:
        self.vcpus = vcpus
        self.memory_mib = memory_mib
        self.max_vcpus = max_vcpus
        self.max_memory_mib = max_memory_mib
        self.kernel = kernel
        self.asked = asked
        self.default_mib = default_mib


def plan(asked: ResourceRequest, kernel: str = "small", limits: Limits | None = None) -> Size:
    """The machine for what is asked.

    Args:
        asked: CPUs and memory.
        kernel: Kind of the guest's kernel, ``small`` or ``distro``.
        limits: The host owner's.

    Raises:
        UsageError: More CPUs than there are, or may be.
        ResourceExhaustedError: More memory than there is, or may be.
    """
    limits = limits or Limits()
    online, total = len(os.sched_getaffinity(0)), _total_mib()
    most_cpus = min(limits.max_vcpus or online, online)
    grows_to = limits.max_vcpus or MOST_VCPUS
    most_memory = min(limits.max_memory_mib or total, total)
    if asked.cpus is None and asked.cpuset:
        vcpus = min(len(asked.cpuset), most_cpus, grows_to)
    elif asked.cpus is None:
        default = online if limits.default_vcpus < 0 else limits.default_vcpus or DEFAULT_VCPUS
        vcpus = min(cpus_of(default), most_cpus)
    else:
        vcpus = cpus_of(asked.cpus)
        if vcpus > online:
            raise UsageError(
                f"{asked.cpus:g} CPUs were asked for, and this host has {online}", f"at most --cpus {online}"
            )
        if vcpus > most_cpus:
            raise UsageError(
                f"{asked.cpus:g} CPUs were asked for, and default_maxvcpus is {most_cpus}",
                "kata config show says where it was set",
            )
    default_mib = limits.default_memory_mib or min(DEFAULT_MEMORY_MIB, max(total // 2, 256))
    default_mib = max(min(default_mib, most_memory), LEAST_MIB[kernel])
    memory = default_mib if asked.memory is None else memory_of(asked.memory, kernel)
    if memory > most_memory:
        what = f"{(asked.memory or 0) / MIB:.0f} MiB of memory were asked for"
        if memory > total:
            raise ResourceExhaustedError(
                f"{what}, and this host has {total} MiB in all", "ask for less with -m"
            )
        raise ResourceExhaustedError(
            f"{what}, and default_maxmemory is {most_memory} MiB", "kata config show says where it was set"
        )
    most_cpus = vcpus if limits.fixed else max(vcpus, min(most_cpus, grows_to))
    if limits.fixed or limits.fixed_memory:
        most_memory = memory
    return Size(vcpus, memory, most_cpus, most_memory, kernel, asked, default_mib)


def cpus_of(asked: float) -> int:
    """Virtual CPUs for so many that are asked for."""
    return max(1, -int(-asked // 1))


def total_of(asked: int, kernel: str) -> int:
    """``MemTotal`` in bytes of a guest in which a container with this limit, in bytes, can use it."""
    total = int(asked * (1 + BESIDE_PART)) + BESIDE_MIB * MIB
    if total < HUGE_PAGES_MIB * MIB:
        return total
    zones = 1 + (kernel == "distro") + (total >= NORMAL_MIB * MIB)
    return total + min(zones * RESERVE_MIB * MIB, int(total * RESERVE_PART))


def memory_of(asked: int, kernel: str) -> int:
    """MiB of a machine in whose guest a container with this limit, in bytes, can use it."""
    total_mib = -(-total_of(-(-asked // MIB) * MIB, kernel) // MIB)
    return max(int((total_mib + KERNEL_MIB[kernel]) / (1 - GROWING_PART)) + 1, LEAST_MIB[kernel])


def container_request(resources: Mapping[str, Any]) -> ResourceRequest:
    """What the limits of a container (``linux.resources`` of the runtime specification) ask for."""
    cpu, memory = resources.get("cpu") or {}, resources.get("memory") or {}
    quota, limit = number(cpu.get("quota")), number(memory.get("limit"))
    return ResourceRequest(
        quota / (number(cpu.get("period")) or 100_000) if quota > 0 else None,
        # "No limit" is also written as the largest number that fits.
        limit if 0 < limit < 1 << 60 else None,
        "the container's limits",
        frozenset() if quota > 0 else cpuset(cpu.get("cpus")),
    )


def cpuset(text: object) -> frozenset[int]:
    """The processors of a list as the kernel writes them, ``0-3,8``; none of a malformed one."""
    found: set[int] = set()
    for part in str(text or "").split(","):
        first, _, last = part.strip().partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()) or int(last or first) >= MOST_CPUSET:
            return frozenset()
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


_CONTAINERD = (
    "io.kubernetes.cri.sandbox-cpu-quota",
    "io.kubernetes.cri.sandbox-cpu-period",
    "io.kubernetes.cri.sandbox-memory",
)
_CRIO = "io.kubernetes.cri-o.LinuxResources"


def sandbox_request(annotations: Mapping[str, Any]) -> ResourceRequest:
    """What a CRI says of a pod as a whole, by the annotations of its sandbox.

    Sources: containerd's ``pkg/cri/annotations``; CRI-O's ``LinuxResources`` (CRI's ``LinuxContainerResources``
    as JSON).
    """
    quota, period, memory = (number(annotations.get(name)) for name in _CONTAINERD)
    source = f"{OF_SANDBOX} (containerd)"
    if not (quota or memory) and annotations.get(_CRIO):
        import json

        try:
            found = json.loads(str(annotations[_CRIO]))
        except ValueError:
            found = {}
        if isinstance(found, dict):
            quota, period = number(found.get("cpu_quota")), number(found.get("cpu_period"))
            memory = number(found.get("memory_limit_in_bytes"))
            source = f"{OF_SANDBOX} (CRI-O)"
    return ResourceRequest(
        quota / (period or 100_000) if quota > 0 else None, memory if memory > 0 else None, source
    )


def number(value: object) -> int:
    """A whole number that somebody else wrote; 0 where it is none."""
    try:
        return int(str(value))
    except ValueError:
        return 0


def request_of(spec: Mapping[str, Any]) -> ResourceRequest:
    """What the first container of a sandbox asks for: for its pod, where a CRI says so, else for itself."""
    pod = sandbox_request(spec.get("annotations") or {})
    own = container_request((spec.get("linux") or {}).get("resources") or {})
    if pod.cpus is None and pod.memory is None:
        return own
    return ResourceRequest(
        own.cpus if pod.cpus is None else pod.cpus,
        own.memory if pod.memory is None else pod.memory,
        pod.source,
        own.cpuset if pod.cpus is None else frozenset(),
    )


def host_memory(memory_mib: int, overhead_mib: int) -> int:
    """Bytes that a machine of this size and its helpers may use on the host.

    Args:
        memory_mib: The machine's memory.
        overhead_mib: What running it takes besides (`kata.hypervisor.protocols.Monitor.host_overhead_mib`).
    """
    return (memory_mib + overhead_mib + int(memory_mib * HOST_GROWING_PART)) * MIB


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

"""The formula for the size of a virtual machine. docs/sizing.md explains it, `kata explain` shows it with numbers.

* **CPUs**: the requested number, rounded up. Without a quota, the number of processors in the cpuset; without either,
  `default_vcpus`. A fraction is enforced by a cgroup limit in the guest, which applies to containers but not to the
  boot.
* **Memory**: the requested memory, plus what the guest's kernel reserves, plus what the guest uses besides its
  containers, so that a container reaches its own limit before the guest runs out; but at least the size that a guest
  needs to boot. Without a request, `default_memory`, or half of the host's memory if that is less: only memory that the
  guest touches costs anything.

The kernel's reserve has a fixed part (its code and data, its first tables) and a part that grows with the memory:
``struct page`` takes 64 bytes for every 4096, and hash tables add an eighth to that. It was measured as the difference
between the machine's memory and ``MemTotal``, from 64 MiB to 12 GiB; `tests/vm/test_hypervisor.py` verifies it.

A pod's request is what its CRI states for the sandbox, and at least the sum of its containers' limits. If some of its
containers have no limit while others have one, `default_memory` is added for those without.
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
"""Fixed part of the kernel's reserve, by kind of kernel."""
GROWING_PART = 64 / 4096 * (1 + 1 / 8)
BESIDE_MIB = 9
"""What the guest uses besides its containers and outside their limits: the agent, device buffers, and the free pages
that the kernel keeps in reserve. (Memory of particular devices is added: `hypervisor.protocols.Started`.)

It is about 2 MiB less than measured, so that the guest runs out of memory just before a container reaches its limit.
Linux then kills a process at once, whereas a cgroup at its limit keeps dropping and re-reading pages of its program,
for minutes under emulation."""
BESIDE_PART = 0.01
"""What the guest uses besides its containers for each byte that is requested: page tables and metadata of files."""
RESERVE_MIB = 20
"""Additional reserve for each memory zone (ZONE_DMA32, ZONE_NORMAL, and ZONE_DMA in distributions' kernels) in a guest
with transparent huge pages, that is, with at least `HUGE_PAGES_MIB` (khugepaged's recommended_min_free_kbytes in
mm/khugepaged.c: 22 MiB instead of 2)."""
RESERVE_PART = 0.05
"""The reserve of all zones together is at most this part of the memory."""
HUGE_PAGES_MIB = 504
NORMAL_MIB = 2816
"""With more than this, a PC has memory above 4 GiB."""
LEAST_MIB = {"small": 64, "distro": 192}
"""With less the guest does not boot: the initrd has to fit into memory twice while it is unpacked."""
SLACK = 0.04
"""Part of the machine's memory that may remain when it shrinks, so that `MemTotal` is within 5 % of the request."""
SHRUNK_MIB = 128
"""Lower bound for ballooning: a guest is never shrunk below this."""
MOST_CPUSET = 1 << 13
"""Upper bound of processor numbers: no kernel has more processors (CONFIG_NR_CPUS)."""
MOST_VCPUS = 16
"""Number of processors that a machine may grow to if `default_maxvcpus` is not set. Each one is a thread of the host,
even if it is not used."""
OF_SANDBOX = "the sandbox's annotations"
"""Beginning of `ResourceRequest.source` when a CRI states a request for the whole pod."""


HOST_GROWING_PART = 1 / 32
"""What a machine costs the host for each byte of the guest's memory: page tables, the emulator's table of pages. (The
fixed part depends on the hypervisor: `kata.hypervisor.protocols.Monitor.host_overhead_mib`.)"""
HOST_CPUS = 1.0
"""Processors for engine, devices and network helper, in addition to the virtual ones."""


class ResourceRequest:
    """Requested resources.

    Attributes:
        cpus: Number of CPUs; None if not requested.
        memory: Bytes; None if not requested.
        source: Origin of the request, as a phrase for messages.
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
    """The configuration's settings of sizes; 0 means "not set".

    Attributes:
        default_vcpus: CPUs of a machine without a request; negative for all of the host's.
        default_memory_mib: Memory of a machine without a request, in MiB.
        max_vcpus: Maximum number of CPUs of any machine.
        max_memory_mib: Maximum memory of any machine, in MiB.
        fixed: A machine keeps the size that it is started with.
        fixed_memory: A machine keeps the memory that it is started with.
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
        vcpus: Number of virtual CPUs at the start.
        memory_mib: Memory at the start, in MiB.
        max_vcpus: Number of virtual CPUs to which it may grow while it runs.
        max_memory_mib: Memory to which it may grow while it runs, in MiB.
        kernel: Kind of the guest's kernel.
        asked: The request that it was planned for.
        default_mib: Memory of a machine without a request, in MiB.
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
    """Return the size of the machine for a request.

    Args:
        asked: The requested CPUs and memory.
        kernel: Kind of the guest's kernel, ``small`` or ``distro``.
        limits: The configuration's settings; None for the defaults.

    Raises:
        UsageError: The request has more CPUs than the host has, or than the configuration allows.
        ResourceExhaustedError: The request has more memory than the host has, or than the configuration allows.
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
    """Number of virtual CPUs for a requested number, which may be fractional."""
    return max(1, -int(-asked // 1))


def total_of(asked: int, kernel: str) -> int:
    """``MemTotal`` (bytes) of a guest in which a container can use all of its limit *asked* (bytes)."""
    total = int(asked * (1 + BESIDE_PART)) + BESIDE_MIB * MIB
    if total < HUGE_PAGES_MIB * MIB:
        return total
    zones = 1 + (kernel == "distro") + (total >= NORMAL_MIB * MIB)
    return total + min(zones * RESERVE_MIB * MIB, int(total * RESERVE_PART))


def memory_of(asked: int, kernel: str) -> int:
    """Memory (MiB) of a machine in whose guest a container can use all of its limit *asked* (bytes)."""
    total_mib = -(-total_of(-(-asked // MIB) * MIB, kernel) // MIB)
    return max(int((total_mib + KERNEL_MIB[kernel]) / (1 - GROWING_PART)) + 1, LEAST_MIB[kernel])


def container_request(resources: Mapping[str, Any]) -> ResourceRequest:
    """The request that follows from a container's limits (``linux.resources`` of the runtime specification)."""
    cpu, memory = resources.get("cpu") or {}, resources.get("memory") or {}
    quota, limit = number(cpu.get("quota")), number(memory.get("limit"))
    return ResourceRequest(
        quota / (number(cpu.get("period")) or 100_000) if quota > 0 else None,
        # Clients also write "no limit" as the largest number that fits.
        limit if 0 < limit < 1 << 60 else None,
        "the container's limits",
        frozenset() if quota > 0 else cpuset(cpu.get("cpus")),
    )


def cpuset(text: object) -> frozenset[int]:
    """Parse a list of processors in the kernel's form (``0-3,8``); empty if it is malformed."""
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
    """The request for a whole pod, which a CRI states in the annotations of its sandbox.

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
    """Parse a whole number from untrusted input; 0 if it is malformed."""
    try:
        return int(str(value))
    except ValueError:
        return 0


def request_of(spec: Mapping[str, Any]) -> ResourceRequest:
    """The request of a sandbox's first container: the one for its pod if a CRI states it, otherwise its own."""
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
    """Bytes that a machine and its helpers may use on the host.

    Args:
        memory_mib: The machine's memory, in MiB.
        overhead_mib: Fixed overhead in MiB (`kata.hypervisor.protocols.Monitor.host_overhead_mib`).
    """
    return (memory_mib + overhead_mib + int(memory_mib * HOST_GROWING_PART)) * MIB


def host_cpus(vcpus: int) -> float:
    """Number of the host's processors that a machine with *vcpus* processors and its helpers may use."""
    return vcpus + HOST_CPUS


def host_available_mib() -> int:
    """Memory (MiB) available to new processes without swapping (``MemAvailable``)."""
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

"""What a container uses: the agent's figures in the shape that containerd's clients read.

containerd does not say which of the two shapes it wants. v1 is understood by all; v2 is given only where
``/sys/fs/cgroup`` itself is cgroup2 and the client asks for the host's shape. Clients that were made before v2 had room
for the network skip that part.
"""

from __future__ import annotations

import os

from kata.proto import cgroups_v1_pb as v1
from kata.proto import cgroups_v2_pb as v2
from kata.proto import google_pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.proto import agent_pb

V1_TYPE = "io.containerd.cgroups.v1.Metrics"
V2_TYPE = "io.containerd.cgroups.v2.Metrics"

_OF_CARD = (
    "name",
    *(f"{way}_{what}" for way in ("rx", "tx") for what in ("bytes", "packets", "errors", "dropped")),
)
_V1_MEMORY = (
    "cache",
    "rss",
    "rss_huge",
    "mapped_file",
    "dirty",
    "writeback",
    "pg_pg_in",
    "pg_pg_out",
    "pg_fault",
    "pg_maj_fault",
    "inactive_anon",
    "active_anon",
    "inactive_file",
    "active_file",
    "unevictable",
    "hierarchical_memory_limit",
)
_V1_FROM_V2 = {
    "cache": "file",
    "rss": "anon",
    "rss_huge": "anon_thp",
    "mapped_file": "file_mapped",
    "dirty": "file_dirty",
    "writeback": "file_writeback",
    "pg_fault": "pgfault",
    "pg_maj_fault": "pgmajfault",
}
"""The guest has cgroup v2, so ``memory.stat`` has v2's names."""
_V2_MEMORY = (
    "anon",
    "file",
    "kernel_stack",
    "slab",
    "sock",
    "shmem",
    "file_mapped",
    "file_dirty",
    "file_writeback",
    "anon_thp",
    "inactive_anon",
    "active_anon",
    "inactive_file",
    "active_file",
    "unevictable",
    "slab_reclaimable",
    "slab_unreclaimable",
    "pgfault",
    "pgmajfault",
    "pgrefill",
    "pgscan",
    "pgsteal",
    "pgactivate",
    "pgdeactivate",
    "pglazyfree",
    "pglazyfreed",
    "thp_fault_alloc",
    "thp_collapse_alloc",
)
_V2_SPLIT = ("workingset_refault", "workingset_activate")
"""One number when the shape was made; the kernel counts anonymous memory and files since 5.9."""
_BLKIO = (
    "io_service_bytes_recursive",
    "io_serviced_recursive",
    "io_queued_recursive",
    "io_service_time_recursive",
    "io_wait_time_recursive",
    "io_merged_recursive",
    "io_time_recursive",
    "sectors_recursive",
)


def host_has_v2() -> bool:
    """Whether ``/sys/fs/cgroup`` itself is a cgroup2 file system; a hybrid counts as v1."""
    return os.path.exists("/sys/fs/cgroup/cgroup.controllers")


def metrics(answer: agent_pb.StatsContainerResponse, *, shape_v2: bool) -> google_pb.Any:
    """The agent's answer as an Any of one of the two Metrics messages."""
    if shape_v2:
        return google_pb.Any(type_url=V2_TYPE, value=_v2(answer).encode())
    return google_pb.Any(type_url=V1_TYPE, value=_v1(answer).encode())


def of_host(cpu_ns: int, memory: int, *, shape_v2: bool) -> google_pb.Any:
    """What a sandbox uses on the host, as an Any of one of the two Metrics messages."""
    if shape_v2:
        new = v2.Metrics(cpu=v2.CPUStat(usage_usec=cpu_ns // 1000), memory=v2.MemoryStat(usage=memory))
        return google_pb.Any(type_url=V2_TYPE, value=new.encode())
    cpu = v1.CPUStat(usage=v1.CPUUsage(total=cpu_ns))
    old = v1.Metrics(cpu=cpu, memory=v1.MemoryStat(usage=v1.MemoryEntry(usage=memory)))
    return google_pb.Any(type_url=V1_TYPE, value=old.encode())


def _of_card(card: agent_pb.NetworkStats) -> dict[str, Any]:
    """The fields of an interface, which both shapes have by the same names."""
    return {name: getattr(card, name) for name in _OF_CARD}


def _v1(answer: agent_pb.StatsContainerResponse) -> v1.Metrics:  # noqa: C901, PLR0912
    out = v1.Metrics()
    group = answer.cgroup_stats
    out.network = [v1.NetworkStat(**_of_card(card)) for card in answer.network_stats]
    if group is None:
        return _complete(out)
    if group.pids_stats is not None:
        out.pids = v1.PidsStat(current=group.pids_stats.current, limit=group.pids_stats.limit)
    cpu = group.cpu_stats
    if cpu is not None:
        out.cpu = v1.CPUStat()
        if cpu.cpu_usage is not None:
            usage = cpu.cpu_usage
            out.cpu.usage = v1.CPUUsage(
                total=usage.total_usage,
                kernel=usage.usage_in_kernelmode,
                user=usage.usage_in_usermode,
                per_cpu=list(usage.percpu_usage),
            )
        throttled = cpu.throttling_data
        if throttled is not None:
            out.cpu.throttling = v1.Throttle(
                periods=throttled.periods,
                throttled_periods=throttled.throttled_periods,
                throttled_time=throttled.throttled_time,
            )
    memory = group.memory_stats
    if memory is not None:
        out.memory = v1.MemoryStat()
        for name in _V1_MEMORY:
            value = memory.stats.get(name, memory.stats.get(_V1_FROM_V2.get(name, ""), 0))
            setattr(out.memory, name, value)
            if name != "hierarchical_memory_limit":
                setattr(out.memory, f"total_{name}", memory.stats.get(f"total_{name}", value))
        out.memory.cache = out.memory.cache or memory.cache
        for name, data in (
            ("usage", memory.usage),
            ("swap", memory.swap_usage),
            ("kernel", memory.kernel_usage),
        ):
            if data is not None:
                entry = v1.MemoryEntry(
                    limit=data.limit, usage=data.usage, max=data.max_usage, failcnt=data.failcnt
                )
                setattr(out.memory, name, entry)
        if memory.usage is not None:
            out.memory.hierarchical_memory_limit = memory.usage.limit
        sockets = memory.stats.get("sock", 0)
        out.memory.kernel_tcp = v1.MemoryEntry(usage=sockets, max=sockets)
        out.memory_oom_control = v1.MemoryOomControl(oom_kill=memory.stats.get("oom_kill", 0))
    if group.blkio_stats is not None:
        out.blkio = v1.BlkIOStat()
        for name in _BLKIO:
            entries = [
                v1.BlkIOEntry(
                    op=one.op,
                    device=f"{one.major}:{one.minor}",
                    major=one.major,
                    minor=one.minor,
                    value=one.value,
                )
                for one in getattr(group.blkio_stats, name)
            ]
            setattr(out.blkio, name, entries)
    for size, huge in group.hugetlb_stats.items():
        out.hugetlb.append(
            v1.HugetlbStat(usage=huge.usage, max=huge.max_usage, failcnt=huge.failcnt, pagesize=size)
        )
    return _complete(out)


def _complete(out: v1.Metrics) -> v1.Metrics:
    """*out* with every part that runc's shim always gives: CRI-O ends with a nil pointer where one is missing."""
    out.pids = out.pids or v1.PidsStat()
    out.cpu = out.cpu or v1.CPUStat()
    out.cpu.usage = out.cpu.usage or v1.CPUUsage()
    out.cpu.throttling = out.cpu.throttling or v1.Throttle()
    out.memory = out.memory or v1.MemoryStat()
    for name in ("usage", "swap", "kernel", "kernel_tcp"):
        if getattr(out.memory, name) is None:
            setattr(out.memory, name, v1.MemoryEntry())
    return out


def _v2(answer: agent_pb.StatsContainerResponse) -> v2.Metrics:  # noqa: C901, PLR0912
    out = v2.Metrics()
    group = answer.cgroup_stats
    out.network = [v2.NetworkStat(**_of_card(card)) for card in answer.network_stats]
    if group is None:
        return out
    if group.pids_stats is not None:
        out.pids = v2.PidsStat(current=group.pids_stats.current, limit=group.pids_stats.limit)
    cpu = group.cpu_stats
    if cpu is not None:
        out.cpu = v2.CPUStat()
        if cpu.cpu_usage is not None:  # the protocol counts nanoseconds
            out.cpu.usage_usec = cpu.cpu_usage.total_usage // 1000
            out.cpu.user_usec = cpu.cpu_usage.usage_in_usermode // 1000
            out.cpu.system_usec = cpu.cpu_usage.usage_in_kernelmode // 1000
        if cpu.throttling_data is not None:
            out.cpu.nr_periods = cpu.throttling_data.periods
            out.cpu.nr_throttled = cpu.throttling_data.throttled_periods
            out.cpu.throttled_usec = cpu.throttling_data.throttled_time // 1000
    memory = group.memory_stats
    if memory is not None:
        out.memory = v2.MemoryStat()
        for name in _V2_MEMORY:
            setattr(out.memory, name, memory.stats.get(name, 0))
        for name in _V2_SPLIT:
            value = memory.stats.get(f"{name}_anon", 0) + memory.stats.get(f"{name}_file", 0)
            setattr(out.memory, name, memory.stats.get(name, value))
        if memory.usage is not None:
            out.memory.usage = memory.usage.usage
            out.memory.usage_limit = memory.usage.limit
            out.memory.max_usage = memory.usage.max_usage
            out.memory_events = v2.MemoryEvents(
                max=memory.usage.failcnt,
                **{name: memory.stats.get(name, 0) for name in ("low", "high", "oom", "oom_kill")},
            )
        if memory.swap_usage is not None:
            out.memory.swap_usage = memory.swap_usage.usage
            out.memory.swap_limit = memory.swap_usage.limit
            out.memory.swap_max_usage = memory.swap_usage.max_usage
    if group.blkio_stats is not None:
        devices: dict[tuple[int, int], v2.IOEntry] = {}
        for source, read, written in (
            (group.blkio_stats.io_service_bytes_recursive, "rbytes", "wbytes"),
            (group.blkio_stats.io_serviced_recursive, "rios", "wios"),
        ):
            for one in source:
                field = {"read": read, "write": written}.get(one.op.lower())
                if field:
                    key = (one.major, one.minor)
                    entry = devices.setdefault(key, v2.IOEntry(major=one.major, minor=one.minor))
                    setattr(entry, field, one.value)
        out.io = v2.IOStat(usage=list(devices.values()))
    for size, huge in group.hugetlb_stats.items():
        out.hugetlb.append(v2.HugeTlbStat(current=huge.usage, max=huge.max_usage, pagesize=size))
    return out

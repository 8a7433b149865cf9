"""The guest's numbers in the shapes that containerd reads."""

from __future__ import annotations

from kata.engine.services import stats
from kata.proto import agent_pb, cgroups_v1_pb, cgroups_v2_pb


def usage() -> agent_pb.StatsContainerResponse:
    return agent_pb.StatsContainerResponse(
        cgroup_stats=agent_pb.CgroupStats(
            cpu_stats=agent_pb.CpuStats(
                cpu_usage=agent_pb.CpuUsage(
                    total_usage=3_000_000, usage_in_kernelmode=1_000_000, usage_in_usermode=2_000_000
                )
            ),
            memory_stats=agent_pb.MemoryStats(
                cache=5,
                usage=agent_pb.MemoryData(usage=4096, limit=8192, max_usage=5000),
                swap_usage=agent_pb.MemoryData(usage=1, limit=3, max_usage=2),
                stats={
                    "anon": 7,
                    "file": 9,
                    "inactive_file": 3,
                    "sock": 4,
                    "workingset_refault_anon": 20,
                    "workingset_refault_file": 1,
                    "low": 1,
                    "high": 2,
                    "oom": 3,
                    "oom_kill": 4,
                },
            ),
            pids_stats=agent_pb.PidsStats(current=2, limit=10),
            blkio_stats=agent_pb.BlkioStats(
                io_service_bytes_recursive=[
                    agent_pb.BlkioStatsEntry(major=254, minor=0, op="Read", value=11),
                    agent_pb.BlkioStatsEntry(major=254, minor=0, op="Write", value=12),
                    agent_pb.BlkioStatsEntry(major=254, minor=16, op="Read", value=13),
                ],
                io_serviced_recursive=[
                    agent_pb.BlkioStatsEntry(major=254, minor=16, op="Read", value=1),
                ],
            ),
        ),
        network_stats=[agent_pb.NetworkStats(name="eth0", rx_bytes=1, tx_bytes=2)],
    )


def test_statistics_in_the_shape_of_v1() -> None:
    wrapped = stats.metrics(usage(), shape_v2=False)
    assert wrapped.type_url == "io.containerd.cgroups.v1.Metrics"
    found = cgroups_v1_pb.Metrics.decode(wrapped.value)
    assert found.memory is not None
    assert (found.memory.rss, found.memory.cache, found.memory.total_inactive_file) == (7, 9, 3)
    assert found.memory.hierarchical_memory_limit == 8192
    assert found.memory.kernel_tcp is not None
    assert found.memory.kernel_tcp.usage == 4
    assert found.memory_oom_control is not None
    assert found.memory_oom_control.oom_kill == 4
    assert found.cpu is not None
    assert found.cpu.usage is not None
    assert found.cpu.usage.total == 3_000_000
    assert [(card.name, card.rx_bytes) for card in found.network] == [("eth0", 1)]


def test_statistics_in_the_shape_of_v2() -> None:
    wrapped = stats.metrics(usage(), shape_v2=True)
    assert wrapped.type_url == "io.containerd.cgroups.v2.Metrics"
    found = cgroups_v2_pb.Metrics.decode(wrapped.value)
    assert found.cpu is not None
    assert (found.cpu.usage_usec, found.cpu.user_usec, found.cpu.system_usec) == (3000, 2000, 1000)
    assert found.memory is not None
    assert (found.memory.anon, found.memory.usage_limit) == (7, 8192)
    assert (found.memory.swap_max_usage, found.memory.workingset_refault) == (2, 21)
    events = found.memory_events
    assert events is not None
    assert (events.low, events.high, events.max, events.oom, events.oom_kill) == (1, 2, 0, 3, 4)
    assert found.io is not None
    assert [(one.minor, one.rbytes, one.wbytes, one.rios) for one in found.io.usage] == [
        (0, 11, 12, 0),
        (16, 13, 0, 1),
    ]
    assert [(card.name, card.rx_bytes, card.tx_bytes) for card in found.network] == [("eth0", 1, 2)]

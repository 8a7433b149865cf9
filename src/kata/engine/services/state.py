"""A sandbox's present state and figures as one JSON document, for `kata top`, `kata stats` and the monitor's page.

docs/reference.md has its members. Sizes are in bytes and times in seconds; null is what is not known. Strings are
bounded, and not escaped: whoever shows them does that.
"""

from __future__ import annotations

from kata.engine.containers.described import described
from kata.engine.services import figures, metrics
from kata.metrics import families

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kata.engine.containers.container import Container
    from kata.engine.lifecycle.sandbox import Sandbox
    from kata.engine.services.figures import Figures

MAX_TEXT = 256
MAX_LABELS = 64


async def state(sandbox: Sandbox) -> dict[str, Any]:
    """The document, as JSON values."""
    found = await figures.look(sandbox)
    settings = sandbox.settings
    machine = settings.machine
    runtime = sandbox.runtime
    guest = _guest(found)
    inside_s = sum(metrics.container_cpu_s(found).values())
    containers = [
        _container(sandbox, one, found)
        for one in list(sandbox.containers.values())[: figures.MAX_CONTAINERS]
    ]
    first = containers[0] if containers else {}
    return {
        "time": found.at_s,
        "id": sandbox.id,
        "client": settings.client.name,
        "namespace": settings.client.namespace,
        "state": sandbox.life.state.value,
        "error": _text(sandbox.life.lost_reason if sandbox.life.failed else ""),
        "created": sandbox.life.created_ns / 1e9,
        "name": first.get("name", ""),
        "labels": first.get("labels", {}),
        "hypervisor": {
            "name": runtime.machine.monitor.name if runtime.machine.monitor is not None else "",
            "version": runtime.vm.version if runtime.vm is not None else "",
            "pid": runtime.vm.pid if runtime.vm is not None else 0,
            "accelerator": machine.hypervisor.accel if machine is not None else "",
            "channel": runtime.vm.channel.kind if runtime.vm is not None else "",
        },
        "vcpus": sandbox.resizer.vcpus,
        "memory_bytes": sandbox.resizer.memory_mib << 20,
        "host": {
            "cpu_seconds": found.cpu_s,
            "memory_bytes": found.memory_bytes,
            "processes": [
                {
                    "role": one.role,
                    "pid": one.pid,
                    "cpu_seconds": one.cpu_s,
                    "rss_bytes": one.resident_bytes,
                    "pss_bytes": None,  # which would cost more than all the rest
                    "threads": one.threads,
                    "read_bytes": one.io.get("read_bytes"),
                    "written_bytes": one.io.get("write_bytes"),
                }
                for one in found.processes
            ],
        },
        "guest": {
            **guest,
            "memory_resident_bytes": found.resident_bytes,
            "memory_returned_bytes": found.returned_bytes,
        },
        "overhead": {
            "cpu_seconds": max(0.0, found.cpu_s - inside_s) if found.is_whole else None,
            "memory_bytes": max(0, found.memory_bytes - metrics.container_memory(found))
            if found.is_whole
            else None,
        },
        "network": _network(found),
        "disk_error": _text(runtime.disk_error),
        "disk_errors": runtime.disk_errors,
        "containers": containers,
        "start": {"path": sandbox.timings.path, "reason": _text(sandbox.timings.reason)},
        "timings": sandbox.timings.in_seconds(),
    }


def _text(value: str) -> str:
    return value if len(value) <= MAX_TEXT else value[: MAX_TEXT - 1] + "\u2026"


def _guest(found: Figures) -> dict[str, float | None]:
    """Figures of the guest's kernel, out of what it says for Prometheus."""
    from kata.metrics.exposition import known_samples

    meminfo, load, cpu = "kata_guest_meminfo", "kata_guest_load", "kata_guest_cpu_time"
    values: dict[str, float] = {}
    wanted = {name: families.OF_GUEST[name] for name in (meminfo, load, cpu)}
    known, _ = known_samples(found.guest_text or "", wanted)
    for lines in known.values():
        for line in lines:
            series, _, value = line.rpartition(" ")
            if value != "+Inf":  # which JSON has no word for
                values[series] = float(value)
    busy: list[float] = [
        value
        for series, value in values.items()
        if series.startswith(f'{cpu}{{cpu="total"')
        and not series.endswith(('"idle"}', '"iowait"}', '"steal"}'))
    ]
    return {
        "memory_total_bytes": values.get(f'{meminfo}{{item="mem_total"}}'),
        "memory_available_bytes": values.get(f'{meminfo}{{item="mem_available"}}'),
        "cpu_seconds": sum(busy) / 100 if busy else None,
        "load1": values.get(f'{load}{{item="load1"}}'),
    }


def _network(found: Figures) -> list[dict[str, Any]]:
    answer = next(iter(found.containers.values()), None)
    return [
        {
            "interface": _text(card.name),
            "received_bytes": card.rx_bytes,
            "received_packets": card.rx_packets,
            "sent_bytes": card.tx_bytes,
            "sent_packets": card.tx_packets,
        }
        for card in (answer.network_stats[: metrics.MAX_CARDS] if answer is not None else ())
    ]


def _labels(labels: Mapping[str, Any]) -> dict[str, str]:
    items = list(labels.items())[:MAX_LABELS]
    return {_text(str(name)): _text(str(value)) for name, value in items}


def _container(sandbox: Sandbox, container: Container, found: Figures) -> dict[str, Any]:
    about = described(sandbox.settings, container.id, container.config)
    init = container.init
    out: dict[str, Any] = {
        "id": container.id,
        "name": _text(about["name"]),
        "image": _text(about["image"]),
        "labels": _labels(about["labels"]),
        "state": str(init.state),
        "error": _text(init.error),
        "created": container.created_at_ns / 1e9,
        "started": init.started_at_ns / 1e9 if init.started_at_ns else None,
        "pid": init.pid,
        "exit_code": init.exit_status if init.exited_at_ns else None,
        "finished": init.exited_at_ns / 1e9 if init.exited_at_ns else None,
        "oom_killed": init.oom_killed,
        "oom_kills": container.oom_kills,
        "cpu_seconds": None,
        "memory_bytes": None,
        "memory_limit_bytes": None,
    }
    out |= dict.fromkeys(("throttled_seconds", "throttled_periods", "pids", "read_bytes", "written_bytes"))
    answer = found.containers.get(container.id)
    group = answer.cgroup_stats if answer is not None else None
    if group is None:
        return out
    if group.cpu_stats is not None:
        usage, throttled = group.cpu_stats.cpu_usage, group.cpu_stats.throttling_data
        out["cpu_seconds"] = usage.total_usage / 1e9 if usage is not None else None
        if throttled is not None:
            out["throttled_seconds"] = throttled.throttled_time / 1e9
            out["throttled_periods"] = throttled.throttled_periods
    if group.memory_stats is not None:
        out["memory_bytes"] = metrics.working_set(group.memory_stats)
        usage_data = group.memory_stats.usage
        if usage_data is not None and 0 < usage_data.limit < metrics.NO_LIMIT:
            out["memory_limit_bytes"] = usage_data.limit
    if group.pids_stats is not None:
        out["pids"] = group.pids_stats.current
    if group.blkio_stats is not None:
        for key, operation in (("read_bytes", "read"), ("written_bytes", "write")):
            entries = group.blkio_stats.io_service_bytes_recursive[:256]
            out[key] = sum(one.value for one in entries if one.op.lower() == operation)
    return out

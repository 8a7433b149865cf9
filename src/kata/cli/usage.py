"""`kata stats`: the resource usage of containers, from two readings of the engine's counters."""

from __future__ import annotations

import sys
import time

from kata.cli import records, table
from kata.engine.client import EngineClient
from kata.errors import AgentError, KataError
from kata.proto import cgroups_v1_pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.cli.records import Container


class _Look:
    """The counters of one container at one time; sizes in bytes, times in ns."""

    __slots__ = (
        "at_ns",
        "blkio_read",
        "blkio_written",
        "cpu_ns",
        "memory",
        "memory_limit",
        "pids",
        "received",
        "sent",
    )

    def __init__(self, metrics: cgroups_v1_pb.Metrics) -> None:
        self.at_ns = time.monotonic_ns()
        usage = metrics.memory.usage if metrics.memory else None
        cache = metrics.memory.inactive_file if metrics.memory else 0
        self.cpu_ns = metrics.cpu.usage.total if metrics.cpu and metrics.cpu.usage else 0
        # Page cache that the kernel can reclaim at once is not counted, as in `docker stats`.
        self.memory = max((usage.usage if usage else 0) - cache, 0)
        self.memory_limit = usage.limit if usage else 0
        self.pids = metrics.pids.current if metrics.pids else 0
        entries = metrics.blkio.io_service_bytes_recursive if metrics.blkio else []
        self.blkio_read = sum(entry.value for entry in entries if entry.op.lower() == "read")
        self.blkio_written = sum(entry.value for entry in entries if entry.op.lower() == "write")
        links = [link for link in metrics.network if link.name != "lo"]
        self.received = sum(link.rx_bytes for link in links)
        self.sent = sum(link.tx_bytes for link in links)


def _look(container: Container) -> _Look | None:
    try:
        with EngineClient(container.socket) as engine:
            answer = engine.stats(container.id)
            return _Look(cgroups_v1_pb.Metrics.decode(answer.value if answer else b""))
    except AgentError as error:
        sys.stderr.write(f"warning: no statistics of {container.name}: {error.message}\n")
        return None
    except (KataError, OSError):
        return None  # it ended


def _row(container: Container, before: _Look | None, now: _Look) -> dict[str, Any]:
    cpu = 0.0
    if before is not None and now.at_ns > before.at_ns:
        cpu = 100.0 * max(now.cpu_ns - before.cpu_ns, 0) / (now.at_ns - before.at_ns)
    return {
        "id": container.id,
        "name": container.name,
        "cpu_percent": round(cpu, 2),
        "memory_bytes": now.memory,
        "memory_limit_bytes": now.memory_limit,
        "network_received_bytes": now.received,
        "network_sent_bytes": now.sent,
        "block_read_bytes": now.blkio_read,
        "block_written_bytes": now.blkio_written,
        "pids": now.pids,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    size = table.human_size
    return [
        row["id"][:12],
        row["name"],
        f"{row['cpu_percent']:.2f}%",
        f"{size(row['memory_bytes'])} / {size(row['memory_limit_bytes'])}",
        f"{size(row['network_received_bytes'])} / {size(row['network_sent_bytes'])}",
        f"{size(row['block_read_bytes'])} / {size(row['block_written_bytes'])}",
        str(row["pids"]),
    ]


_HEADINGS = ["CONTAINER ID", "NAME", "CPU", "MEMORY / LIMIT", "NET IN / OUT", "BLOCK READ / WRITTEN", "PIDS"]


def show(chosen: list[Container], *, seconds: float, stream: bool, as_json: bool) -> int:
    """Print the table or JSON, once or every *seconds* until interrupted.

    Args:
        chosen: The containers; all running ones if empty.
        seconds: Time between two readings.
        stream: Whether to continue until interrupted.
        as_json: Whether to print JSON.

    Returns:
        The exit status.
    """

    def containers() -> list[Container]:
        return chosen or [container for container in records.all_containers() if container.running()]

    before = {container.id: _look(container) for container in containers()}
    while True:
        time.sleep(seconds)
        rows = []
        for container in containers():
            now = _look(container)
            if now is not None:
                rows.append(_row(container, before.get(container.id), now))
            before[container.id] = now
        if as_json:
            table.show_json(rows)
        else:
            if stream:
                sys.stdout.write("\x1b[H\x1b[J")
            table.show(_HEADINGS, [_cells(row) for row in rows])
            sys.stdout.flush()
        if not stream:
            return 0

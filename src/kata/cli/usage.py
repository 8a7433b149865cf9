"""`kata stats`: the resource usage of containers of all clients, from two readings of their engines' figures."""

from __future__ import annotations

import sys
import time

from kata.cli import live, sandboxes, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.cli.live import Row

_STREAM_PATIENCE_S = 1.0
"""How long a table that goes on waits for sandboxes that are slow, in seconds: they come with the next one."""
_HEADINGS = [
    *("CONTAINER ID", "NAME", "CPU", "MEMORY / LIMIT", "NET IN / OUT", "BLOCK READ / WRITTEN", "PIDS"),
    *("OVERHEAD", "GIVEN BACK"),
]


def _rows(sandbox: Row) -> list[dict[str, Any]]:
    """A row for each container that runs. Network, overhead and memory given back are the sandbox's."""
    document, rows = sandbox.document, []
    for one in sandbox.containers:
        if one.get("state") not in ("running", "paused") or live.number(one.get("memory_bytes")) is None:
            continue
        identity = str(one.get("id"))
        rows.append(
            {
                "id": identity,
                "name": str(one.get("name") or ""),
                "sandbox": sandbox.id,
                "client": str(document.get("client") or ""),
                "namespace": str(document.get("namespace") or ""),
                "cpu_percent": round(100 * (sandbox.container_rates.get(identity) or 0.0), 2),
                "memory_bytes": _whole(one.get("memory_bytes")),
                "memory_limit_bytes": _whole(one.get("memory_limit_bytes")),
                "network_received_bytes": _whole(sandbox.counters["received"]),
                "network_sent_bytes": _whole(sandbox.counters["sent"]),
                "block_read_bytes": _whole(one.get("read_bytes")),
                "block_written_bytes": _whole(one.get("written_bytes")),
                "pids": _whole(one.get("pids")),
                "overhead_bytes": _whole(sandbox.overhead),
                "memory_returned_bytes": _whole(sandbox.returned),
            }
        )
    return rows


def _whole(value: object) -> int:
    return int(live.number(value) or 0)


def _cells(row: dict[str, Any], *, is_first: bool) -> list[str]:
    size = table.human_size
    of_sandbox = [
        f"{size(row['network_received_bytes'])} / {size(row['network_sent_bytes'])}",
        size(row["overhead_bytes"]),
        size(row["memory_returned_bytes"]),
    ]
    network, overhead, returned = of_sandbox if is_first else ["-"] * 3
    return [
        row["id"][:12],
        live.clean(row["name"], 64) or "-",
        f"{row['cpu_percent']:.2f}%",
        f"{size(row['memory_bytes'])} / {size(row['memory_limit_bytes'])}",
        network,
        f"{size(row['block_read_bytes'])} / {size(row['block_written_bytes'])}",
        str(row["pids"]),
        overhead,
        returned,
    ]


def show(chosen: list[str], *, seconds: float, stream: bool, as_json: bool) -> int:
    """Print the table or JSON, once or every *seconds* until interrupted.

    Args:
        chosen: Run directories of sandboxes; all there are if empty.
        seconds: Time between two readings.
        stream: Whether to continue until interrupted.
        as_json: Whether to print JSON.

    Returns:
        The exit status: 125 if one of *chosen* has not answered, which is told on stderr.
    """
    sampler = live.Sampler(list_directories=lambda: chosen or list(sandboxes.settings_by_directory()))
    sampler.sample()
    warned: set[str] = set()
    while True:
        time.sleep(seconds)
        sampler.sample(_STREAM_PATIENCE_S if stream else live.ASK_S)
        answered = []
        for sandbox in sorted(sampler.rows.values(), key=lambda one: -(one.created or 0.0)):
            if not sandbox.problem:
                answered.append(_rows(sandbox))
            elif sandbox.directory not in warned:
                warned.add(sandbox.directory)
                sys.stderr.write(
                    f"warning: no statistics of {sandbox.name}: {live.clean(sandbox.problem)}\n"
                )
        if as_json:
            table.show_json([row for rows in answered for row in rows])
        else:
            if stream:
                sys.stdout.write("\x1b[H\x1b[J")
            cells = [_cells(row, is_first=not index) for rows in answered for index, row in enumerate(rows)]
            table.show(_HEADINGS, cells)
            sys.stdout.flush()
        if not stream:
            return 125 if chosen and warned else 0

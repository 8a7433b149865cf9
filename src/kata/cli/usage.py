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
FIELDS = {
    "ID": "CONTAINER ID",
    "Name": "NAME",
    "CPUPerc": "CPU %",
    "MemUsage": "MEM USAGE / LIMIT",
    "MemPerc": "MEM %",
    "NetIO": "NET I/O",
    "BlockIO": "BLOCK I/O",
    "PIDs": "PIDS",
    "Overhead": "OVERHEAD",
    "GivenBack": "GIVEN BACK",
    "Container": "CONTAINER",
    **{f"{name.title()}Mem": f"{name.upper()} MEM" for name in live.PARTS},
}
"""The fields of --format with their headings: Docker's, what the machine takes and has given back, and what each part
of it has resident."""
_COLUMNS = tuple(FIELDS)[: tuple(FIELDS).index("Container")]
"""Those of the table."""


def _rows(sandbox: Row) -> list[dict[str, Any]]:
    """A row for each container that runs. Network, overhead, memory given back and its parts are the sandbox's."""
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
                "memory_parts": sandbox.parts,
            }
        )
    return rows


def _whole(value: object) -> int:
    return int(live.number(value) or 0)


def _parts(parts: dict[str, float | None]) -> dict[str, str]:
    return {
        f"{name.title()}Mem": "-" if value is None else table.human_size(value)
        for name, value in parts.items()
    }


def _fields(row: dict[str, Any], *, is_first: bool, digits: int | None = 12) -> dict[str, Any]:
    size = table.human_size
    limit = row["memory_limit_bytes"]
    of_sandbox = {
        "NetIO": f"{size(row['network_received_bytes'])} / {size(row['network_sent_bytes'])}",
        "Overhead": size(row["overhead_bytes"]),
        "GivenBack": size(row["memory_returned_bytes"]),
        **_parts(row["memory_parts"]),
    }
    return {
        "ID": row["id"][:digits],
        "Name": live.clean(row["name"], 64) or "-",
        "CPUPerc": f"{row['cpu_percent']:.2f}%",
        "MemUsage": f"{size(row['memory_bytes'])} / {size(limit)}",
        "MemPerc": f"{100 * row['memory_bytes'] / limit if limit else 0:.2f}%",
        "BlockIO": f"{size(row['block_read_bytes'])} / {size(row['block_written_bytes'])}",
        "PIDs": str(row["pids"]),
        "Container": row["id"][:digits],
        **(of_sandbox if is_first else dict.fromkeys(of_sandbox, "-")),
    }


def show(
    chosen: list[str],
    *,
    seconds: float,
    stream: bool,
    as_json: bool,
    form: str | None = None,
    digits: int | None = 12,
) -> int:
    """Print the table or JSON, once or every *seconds* until interrupted.

    Args:
        chosen: Run directories of sandboxes; all there are if empty.
        seconds: Time between two readings.
        stream: Whether to continue until interrupted.
        as_json: Whether to print JSON.
        form: What to print instead, as `template.Rows` has it.
        digits: How much of an id to show; None for all.

    Returns:
        The exit status: 125 if one of *chosen* has not answered, which is told on stderr.
    """
    rows = None
    if form:
        from kata.cli.template import Rows

        rows = Rows(form, FIELDS, _COLUMNS)  # a mistake in it is told before the readings
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
            table.show_json([row for of_one in answered for row in of_one])
        else:
            if stream:
                sys.stdout.write("\x1b[H\x1b[J")
            fields = [
                _fields(row, is_first=not index, digits=digits)
                for of_one in answered
                for index, row in enumerate(of_one)
            ]
            if rows is not None:
                rows.show(fields)
            else:
                table.show_fields(_COLUMNS, FIELDS, fields)
            sys.stdout.flush()
        if not stream:
            return 125 if chosen and warned else 0

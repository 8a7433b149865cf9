"""``list``, ``ps``, ``events`` and ``update``: what runs, what it uses, and what it may use."""

from __future__ import annotations

import sys
import time

from kata.errors import ConfigError, KataError, NotFoundError, StateError, UsageError
from kata.oci_runtime import containers, records

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from kata.cli.args import Arguments
    from kata.oci_runtime.global_options import GlobalOptions
    from kata.oci_runtime.records import Record
    from kata.proto.cgroups_v1_pb import MemoryEntry, Metrics

INTERVAL_S = 5.0
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_MAX_BYTES = 1 << 20


def _format(arguments: Arguments) -> str:
    """``table`` or ``json``.

    Raises:
        UsageError: It is neither.
    """
    chosen = arguments.value("format") or "table"
    if chosen not in ("table", "json"):
        raise UsageError(f"there is no format {chosen!r}", "--format table, or json")
    return chosen


def _print_table(rows: Iterable[tuple[str, ...]]) -> None:
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        sys.stdout.write("   ".join(cells).rstrip() + "\n")


def _list(arguments: Arguments, options: GlobalOptions) -> int:
    found = [
        containers.state_of(record) if not arguments.flag("quiet") else {"id": record.id}
        for record in records.every(options.state_root)
    ]
    if arguments.flag("quiet"):
        sys.stdout.write("".join(f"{one['id']}\n" for one in found))
    elif _format(arguments) == "json":
        from kata.json_text import dumps

        sys.stdout.write(dumps(found) + "\n")
    else:
        members = ("id", "pid", "status", "bundle", "created")
        head = tuple(name.upper() for name in members)
        _print_table([head, *(tuple(str(one[name]) for name in members) for one in found)])
    return 0


def _ps(arguments: Arguments, options: GlobalOptions) -> int:
    from kata.agent.text import escape_line

    record = records.require(options.state_root, arguments.rest[0])
    chosen = _format(arguments)
    with containers.engine_of(record) as engine:
        found = engine.processes(record.id)
    if chosen == "json":
        from kata.json_text import dumps

        sys.stdout.write(dumps([one.pid for one in found]) + "\n")
        return 0
    rows = [
        (
            str(one.uid),
            str(one.pid),
            str(one.ppid),
            escape_line(b" ".join(one.command).decode(errors="replace")),
        )
        for one in found
    ]
    _print_table([("UID", "PID", "PPID", "CMD"), *rows])
    return 0


def _events(arguments: Arguments, options: GlobalOptions) -> int:
    record = records.require(options.state_root, arguments.rest[0])
    interval_s = _seconds(arguments.value("interval"))
    if arguments.flag("stats"):
        if (found := _metrics(record)) is None:
            raise StateError(f"container {record.id} is not running", f"kata-runtime state {record.id}")
        _tell(record, "stats", data=stats(found))
        return 0
    killed: int | None = None
    while (found := _metrics(record)) is not None:
        control = found.memory_oom_control
        now = control.oom_kill if control is not None else 0
        if killed is not None and now > killed:
            _tell(record, "oom")
        killed = now
        _tell(record, "stats", data=stats(found))
        sys.stdout.flush()
        time.sleep(interval_s)
    return 0


def _seconds(text: str | None) -> float:
    """A number of seconds as Go writes it: ``500ms``, ``5s``, ``1m``.

    Raises:
        UsageError: It is not one, or 0.
    """
    if text is None:
        return INTERVAL_S
    number = text.rstrip("msh")
    unit = _UNITS_S.get(text[len(number) :])
    try:
        value = float(number) * unit if unit else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise UsageError(f"--interval {text!r} is no time", "for example 5s, or 500ms")
    return value


def _metrics(record: Record) -> Metrics | None:
    """What a container uses; None if it does not run any more."""
    from kata.proto.cgroups_v1_pb import Metrics

    try:
        with containers.engine_of(record) as engine:
            answer = engine.stats(record.id)
    except KataError as error:
        if containers.status_of(record) == containers.STOPPED:
            return None
        raise error
    return Metrics.decode(answer.value if answer is not None else b"")


def _tell(record: Record, kind: str, **more: object) -> None:
    """Print an event as one line of JSON: ``stats``, or ``oom``, when a process was killed for want of memory."""
    from kata.json_text import dumps

    sys.stdout.write(dumps({"type": kind, "id": record.id, **more}) + "\n")


def stats(found: Metrics) -> dict[str, Any]:
    """Figures of a container in the form of runc's ``events``: those of the guest's cgroup.

    Source: https://github.com/opencontainers/runc/blob/main/types/events.go.
    """
    cpu, memory, pids = found.cpu, found.memory, found.pids
    usage = cpu.usage if cpu else None
    throttling = cpu.throttling if cpu else None
    return {
        "cpu": {
            "usage": {
                "total": usage.total if usage else 0,
                "percpu": list(usage.per_cpu) if usage else [],
                "kernel": usage.kernel if usage else 0,
                "user": usage.user if usage else 0,
            },
            "throttling": {
                "periods": throttling.periods if throttling else 0,
                "throttledPeriods": throttling.throttled_periods if throttling else 0,
                "throttledTime": throttling.throttled_time if throttling else 0,
            },
        },
        "memory": {
            "cache": memory.cache if memory else 0,
            "usage": _entry(memory.usage if memory else None),
            "swap": _entry(memory.swap if memory else None),
            "kernel": _entry(memory.kernel if memory else None),
        },
        "pids": {"current": pids.current if pids else 0, "limit": pids.limit if pids else 0},
    }


def _entry(one: MemoryEntry | None) -> dict[str, int]:
    if one is None:
        return {"limit": 0, "usage": 0, "max": 0, "failcnt": 0}
    return {"limit": one.limit, "usage": one.usage, "max": one.max, "failcnt": one.failcnt}


# ---- update ----

_FLAGS = {
    "blkio_weight": ("blockIO", "weight"),
    "cpu_period": ("cpu", "period"),
    "cpu_quota": ("cpu", "quota"),
    "cpu_share": ("cpu", "shares"),
    "cpu_rt_period": ("cpu", "realtimePeriod"),
    "cpu_rt_runtime": ("cpu", "realtimeRuntime"),
    "cpuset_cpus": ("cpu", "cpus"),
    "cpuset_mems": ("cpu", "mems"),
    "memory": ("memory", "limit"),
    "memory_reservation": ("memory", "reservation"),
    "memory_swap": ("memory", "swap"),
    "pids_limit": ("pids", "limit"),
}
"""runc's options, and the members of the specification's resources that they set."""
_TEXTS = frozenset({"cpus", "mems"})
_KINDS = frozenset({"memory", "cpu", "pids", "blockIO", "hugepageLimits", "unified"})
"""Resources that are updated. ``devices`` is not one of them: Podman's file denies all, whatever the container has."""


def _update(arguments: Arguments, options: GlobalOptions) -> int:
    record = records.require(options.state_root, arguments.rest[0])
    path = arguments.value("resources")
    wanted = _given(path) if path else _of_flags(arguments)
    resources = effective(wanted)
    if not resources:
        raise UsageError("no limit to change was given", "kata-runtime update --memory BYTES ID")
    with containers.engine_of(record) as engine:
        engine.update(record.id, resources)
    return 0


def _given(path: str) -> dict[str, Any]:
    """The object in a file, or on standard input.

    Raises:
        ConfigError: It is not one, or too large.
        NotFoundError: There is no such file.
    """
    from kata.json_text import loads

    try:
        if path == "-":
            raw = sys.stdin.buffer.read(_MAX_BYTES + 1)
        else:
            with open(path, "rb") as file:
                raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise NotFoundError(f"cannot read {path}: {(error.strerror or '').lower()}") from None
    try:
        found = loads(raw) if len(raw) <= _MAX_BYTES else None
    except ValueError as error:
        raise ConfigError(f"the resources are not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError("the resources are not a JSON object")
    return found


def _of_flags(arguments: Arguments) -> dict[str, Any]:
    wanted: dict[str, Any] = {}
    for flag, (kind, member) in _FLAGS.items():
        text = arguments.value(flag)
        if text is None:
            continue
        if member in _TEXTS:
            wanted.setdefault(kind, {})[member] = text
            continue
        number = text.removeprefix("-")
        if not (number.isascii() and number.isdigit() and len(number) < 20):
            raise UsageError(f"--{flag.replace('_', '-')} {text!r} is no number", "bytes, or microseconds")
        wanted.setdefault(kind, {})[member] = int(text)
    return wanted


def effective(wanted: dict[str, Any]) -> dict[str, Any]:
    """What of resources is to be changed: as with runc, 0 and what is empty mean that a limit stays as it is.

    Args:
        wanted: Resources of the specification.
    """
    found: dict[str, Any] = {}
    for kind in _KINDS & wanted.keys():
        value = wanted[kind]
        if isinstance(value, dict):
            value = {name: one for name, one in value.items() if one not in (None, 0, "", [], {})}
        if value:
            found[kind] = value
    return found


HANDLERS = {"list": _list, "ps": _ps, "events": _events, "update": _update}

"""`kata ps`, `logs`, `port`, `stats`: the commands that change nothing."""

from __future__ import annotations

import os
import sys
import time

from kata.cli import records, table
from kata.cli.args import Command, Option
from kata.errors import NotFoundError, UsageError
from kata.json_text import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from kata.cli.args import Arguments
    from kata.cli.records import Container

_JSON = Option("--json", "", "print JSON")

_PS_FIELDS = {
    "ID": "CONTAINER ID",
    "Image": "IMAGE",
    "Command": "COMMAND",
    "CreatedAt": "CREATED AT",
    "RunningFor": "CREATED",
    "Status": "STATUS",
    "State": "STATE",
    "ExitCode": "EXIT CODE",
    "Ports": "PORTS",
    "Names": "NAMES",
    "Labels": "LABELS",
    "Mounts": "MOUNTS",
    "Networks": "NETWORKS",
    "Size": "SIZE",
}
"""The fields of --format, with the headings of its tables."""
_PS_COLUMNS = ("ID", "Image", "Command", "RunningFor", "Status", "Ports", "Names")
_PS_NOTES = f"""\
filters: ancestor, before, exited, id, label, name (a regular expression), network, publish, since, status, volume
fields of --format: {" ".join(_PS_FIELDS)}, and Label "KEY"

docs/docker-users.md says what templates may have."""

COMMANDS = {
    "ps": Command(
        "ps",
        "",
        "Lists running containers.",
        [
            Option("-a --all", "", "also containers that were not started or have ended"),
            Option("-q --quiet", "", "ids only"),
            Option("--no-trunc", "", "do not shorten ids and commands"),
            Option("-f --filter", "KEY=VALUE", "only those that agree: name=web, status=exited", many=True),
            Option(
                "--format", "TEMPLATE", "print a line for each by a Go template, 'table TEMPLATE' or json"
            ),
            Option("-n --last", "N", "the last N that were made, in any state"),
            Option("-l --latest", "", "the last one that was made, in any state"),
            Option("-s --size", "", "what the writable layer takes on the disk, too"),
            _JSON,
        ],
        most=0,
        notes=_PS_NOTES,
        exclusive=(("quiet", "format", "json"), ("last", "latest")),
    ),
    "logs": Command(
        "logs",
        "CONTAINER",
        "Shows what a container has written to its standard output and error, or what its sandbox says.",
        [
            Option("--guest", "", "the console of the guest instead: its kernel's and its agent's lines"),
            Option("--engine", "", "the log of the engine instead"),
            Option("-l --latest", "", "the container that was made last"),
            Option("-f --follow", "", "continue until the container ends"),
            Option("-t --timestamps", "", "prefix each line with its time"),
            Option("-n --tail", "N|all", "only the last N lines"),
            Option(
                "--since", "TIME", "only what was written since: RFC 3339, Unix time, or how long ago (10m)"
            ),
            Option("--until", "TIME", "only what was written before"),
            Option("--details", "", "accepted; a line has no further attributes"),
            Option("--json", "", "print the records as JSON, one a line"),
        ],
        most=1,
        notes="With --guest and --engine CONTAINER may be a sandbox or container of any client, by name or id, while it"
        " runs.",
    ),
    "port": Command(
        "port", "CONTAINER [PORT[/PROTO]]", "Lists a container's published ports.", [_JSON], least=1, most=2
    ),
    "stats": Command(
        "stats",
        "[CONTAINER...]",
        "Shows the resource usage of running containers of all clients, once or continuously.",
        [
            Option("--no-stream", "", "only once; the default when standard output is not a terminal"),
            Option("--interval", "SECONDS", "time between two readings (1)"),
            Option("--no-trunc", "", "whole ids"),
            Option(
                "--format", "TEMPLATE", "print a line for each by a Go template, 'table TEMPLATE' or json"
            ),
            _JSON,
        ],
        exclusive=(("format", "json"),),
    ),
}


# ---- ps ----


def status_text(container: Container, state: dict[str, Any]) -> str:
    """Docker's words for a state: ``Up 3 minutes (healthy)``, ``Exited (1) 2 hours ago``."""
    status = state["status"]
    if status == records.RUNNING:
        up = f"Up {table.age(str(state.get('started_at', '')))}"
        if not container.record.get("health"):
            return up
        from kata.cli import health

        found = (health.of(container) or {}).get("Status", "starting")
        return f"{up} ({'health: starting' if found == 'starting' else found})"
    if status == records.PAUSED:
        return f"Up {table.age(str(state.get('started_at', '')))} (Paused)"
    if status == records.EXITED:
        when = str(state.get("finished_at") or "")
        ago = f" {table.age(when)} ago" if when else ""
        return f"Exited ({state.get('exit_code', 137)}){ago}"
    return "Created"


def port_text(port: dict[str, Any]) -> str:
    """A published port as `docker ps` writes it: ``0.0.0.0:8080->80/tcp``."""
    address = port["host_ip"] or "0.0.0.0"
    shown = f"[{address}]" if ":" in address else address
    return f"{shown}:{port['host_port']}->{port['guest_port']}/{port['proto']}"


def _ps(arguments: Arguments) -> int:
    last = 1 if arguments.flag("latest") else _last(arguments.value("last"))
    filters = arguments.many("filter")
    # A question about a state, or for the last ones, is about all there are, as in Docker.
    everything = (
        arguments.flag("all")
        or last is not None
        or any(text.startswith(("status=", "exited=")) for text in filters)
    )
    listed = []
    for container in records.all_containers()[:last]:
        state = container.state()
        if everything or state["status"] in (records.RUNNING, records.PAUSED):
            listed.append((container, state))
    if filters:
        from kata.cli.filters import containers

        listed = containers(listed, filters)
    if arguments.flag("json"):
        table.show_json([_summary(container, state) for container, state in listed])
        return 0
    full = arguments.flag("no_trunc")
    if arguments.flag("quiet"):
        for container, _ in listed:
            print(container.id if full else container.id[:12])
        return 0
    rows = [_fields(container, state, full) for container, state in listed]
    columns = (*_PS_COLUMNS, "Size") if arguments.flag("size") else _PS_COLUMNS
    form = arguments.value("format") or ""
    if not form:
        table.show_fields(columns, _PS_FIELDS, rows)
        return 0
    from kata.cli.template import show_rows

    show_rows(form, rows, _PS_FIELDS, columns, further=("Label",))
    return 0


def _last(text: str | None) -> int | None:
    if text is None:
        return None
    from kata.cli.values import whole

    # Docker's -1 is no bound.
    number = whole(text, "--last", least=-1)
    return None if number == -1 else number


def _command(args: list[str], full: bool) -> str:
    command = " ".join(args)
    return command if full or len(command) <= 24 else command[:23] + "…"


def _fields(container: Container, state: dict[str, Any], full: bool) -> dict[str, Any]:
    """What --format may ask for."""
    record = container.record
    labels = record["labels"]
    mounts = [one["source"] for one in record["volumes"]]
    mounts += [one.get("volume") or one["destination"] for one in record.get("disk_volumes") or ()]

    def size() -> str:
        from kata.cli import on_disk

        return table.human_size(on_disk.taken([os.path.join(container.directory, "rw.img")]))

    return {
        "ID": container.id if full else container.id[:12],
        "Image": record["image"]["reference"],
        "Command": f'"{_command(record["args"], full)}"',
        "CreatedAt": record["created_at"],
        "RunningFor": f"{table.age(record['created_at'])} ago",
        "Status": status_text(container, state),
        "State": state["status"],
        "ExitCode": int(state.get("exit_code", 137)) if state["status"] == records.EXITED else 0,
        "Ports": ", ".join(map(port_text, record["ports"])),
        "Names": container.name,
        "Labels": table.labels(labels),
        "Label": lambda key="": labels.get(key, ""),
        "Mounts": ",".join(mounts),
        "Networks": ",".join(records.network_names(record)),
        "Size": size,
    }


def _summary(container: Container, state: dict[str, Any]) -> dict[str, Any]:
    record = container.record
    return {
        "id": container.id,
        "name": container.name,
        "image": record["image"],
        "command": record["args"],
        "created_at": record["created_at"],
        "status": state["status"],
        "started_at": state.get("started_at") or None,
        "finished_at": state.get("finished_at") or None,
        "exit_code": state.get("exit_code") if state["status"] == records.EXITED else None,
        "oom_killed": bool(state.get("oom_killed")),
        "error": state.get("error") or "",
        "ports": record["ports"],
        "labels": record["labels"],
    }


# ---- logs ----


def _logs(arguments: Arguments) -> int:
    named = records.asked_for(arguments)
    COMMANDS["logs"].need(named, 1)
    tail = _tail_count(arguments.value("tail"))
    guest, engine = arguments.flag("guest"), arguments.flag("engine")
    if guest or engine:
        from kata.cli import sandbox_log

        if guest and engine:
            raise UsageError("--guest and --engine are two logs", "kata-log-parser merges several")
        if arguments.flag("timestamps"):
            raise UsageError("lines of a console have no time, and those of an engine's log always have it")
        if arguments.value("since") is not None or arguments.value("until") is not None:
            raise UsageError(
                "--since and --until are about the log of a container",
                "kata-log-parser filters those of engines",
            )
        return sandbox_log.show(
            named[0],
            guest=guest,
            tail=tail,
            follow=arguments.flag("follow"),
            as_json=arguments.flag("json"),
        )
    container = records.find(named[0])
    printer = _LogPrinter(timestamps=arguments.flag("timestamps"), as_json=arguments.flag("json"))
    reader = _LogReader(container)
    is_asked = _period(arguments)
    try:
        backlog = [record for record in reader.read() if is_asked(record)]
        for record in backlog if tail is None else _last_lines(backlog, tail):
            printer.show(record)
        printer.flush()
        while arguments.flag("follow"):
            ended = container.state()["status"] == records.EXITED or not os.path.isdir(container.directory)
            for record in reader.read():
                if is_asked(record):
                    printer.show(record)
            printer.flush()
            if ended:
                break
            time.sleep(0.1)
    finally:
        reader.close()
    return 0


def _period(arguments: Arguments) -> Callable[[dict[str, Any]], bool]:
    """Whether a record of the log was written in the time of ``--since`` and ``--until``."""
    since, until = arguments.value("since"), arguments.value("until")
    if since is None and until is None:
        return lambda _: True
    from kata.cli.filters import moment

    first = float("-inf") if since is None else moment(since, "--since")
    last = float("inf") if until is None else moment(until, "--until")

    def test(record: dict[str, Any]) -> bool:
        written = table.seconds_of(str(record.get("time", "")))
        return written is None or first <= written <= last

    return test


def _tail_count(text: str | None) -> int | None:
    if text is None or text == "all":
        return None
    from kata.cli.values import whole

    return whole(text, "--tail", least=0)


class _LogReader:
    """Reads a rotated log, starting with its oldest file, and follows later rotations."""

    def __init__(self, container: Container) -> None:
        self._path = container.log
        self._file: Any = None
        self._rest = b""
        older = []
        number = 1
        while os.path.exists(f"{self._path}.{number}"):
            older.append(f"{self._path}.{number}")
            number += 1
        self._older = older[::-1]

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the complete records that were written since the last call."""
        for path in self._older:
            try:
                with open(path, "rb") as file:
                    yield from map(_record, file)
            except FileNotFoundError:
                continue
        self._older = []
        while True:
            if self._file is None:
                try:
                    self._file = open(self._path, "rb")  # noqa: SIM115 - it stays open between calls
                except FileNotFoundError:
                    return
            data = self._rest + self._file.read()
            lines = data.split(b"\n")
            self._rest = lines.pop()
            yield from map(_record, lines)
            if not self._rotated():
                return
            # What was written before the rotation has been read; go on with the new file.
            self.close()

    def _rotated(self) -> bool:
        try:
            return os.stat(self._path).st_ino != os.fstat(self._file.fileno()).st_ino
        except FileNotFoundError:
            return False

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._rest = b""


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        return {"time": "", "stream": "stderr", "log": "[a record of the log is unreadable]\n"}
    return record


def _content(record: dict[str, Any]) -> bytes:
    if "log64" in record:
        import base64

        return base64.b64decode(record["log64"])
    return str(record.get("log", "")).encode("utf-8", "surrogateescape")


def _last_lines(backlog: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The last *count* lines as records of at most a line each; records may hold many lines, or a part of one."""
    pieces = []
    for record in backlog:
        about = {key: value for key, value in record.items() if key not in ("log", "log64")}
        for piece in _content(record).splitlines(keepends=True):
            pieces.append({**about, "log": piece.decode("utf-8", "surrogateescape")})
    start, lines = len(pieces), 0
    while start > 0 and lines < count:
        start -= 1
        if start == 0 or pieces[start - 1]["log"].endswith("\n"):
            lines += 1
    return pieces[start:]


class _LogPrinter:
    """Writes records to the streams they came from."""

    def __init__(self, *, timestamps: bool, as_json: bool) -> None:
        self._timestamps = timestamps
        self._json = as_json
        self._line_open: dict[str, bool] = {}

    def show(self, record: dict[str, Any]) -> None:
        if self._json:
            import json

            sys.stdout.write(json.dumps(record) + "\n")
            return
        stream = str(record.get("stream", "stdout"))
        content = _content(record)
        out = sys.stdout.buffer if stream == "stdout" else sys.stderr.buffer
        if not self._timestamps:
            out.write(content)
            return
        stamp = f"{record.get('time', '')} ".encode()
        for line in content.splitlines(keepends=True):
            if not self._line_open.get(stream):
                out.write(stamp)
            out.write(line)
            self._line_open[stream] = not line.endswith(b"\n")

    def flush(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()


# ---- port ----


def _port(arguments: Arguments) -> int:
    container = records.find(arguments.rest[0])
    ports = container.record["ports"]
    if len(arguments.rest) > 1:
        number, _, proto = arguments.rest[1].partition("/")
        if not number.isdigit():
            raise UsageError(f"{arguments.rest[1]!r} is not a port", "e.g. 80 or 53/udp")
        ports = [p for p in ports if p["guest_port"] == int(number) and p["proto"] == (proto or "tcp")]
        if not ports:
            raise NotFoundError(
                f"container {container.name} does not publish port {arguments.rest[1]}",
                f"kata port {container.name}",
            )
    if arguments.flag("json"):
        table.show_json(ports)
        return 0
    for port in ports:
        address = port["host_ip"] or "0.0.0.0"
        shown = f"[{address}]" if ":" in address else address
        prefix = "" if len(arguments.rest) > 1 else f"{port['guest_port']}/{port['proto']} -> "
        print(f"{prefix}{shown}:{port['host_port']}")
    return 0


# ---- stats ----


def _directories(references: list[str]) -> list[str]:
    """The run directories of the sandboxes that are meant.

    Args:
        references: Names or ids of containers or sandboxes, of any client.

    Raises:
        KataError: There is none such, or it does not run.
    """
    from kata import paths
    from kata.cli import sandboxes

    found = []
    for reference in references:
        own = records.find_or_none(reference)
        if own is not None:
            own.need_running()
            found.append(paths.sandbox_dir(own.id))
            continue
        try:
            found.append(sandboxes.find(reference))
        except NotFoundError:
            records.find(reference)  # whose error names what is near
            raise
    return found


def _stats(arguments: Arguments) -> int:
    from kata.cli import usage

    chosen = _directories(arguments.rest)
    interval = arguments.value("interval")
    try:
        seconds = 1.0 if interval is None else float(interval)
    except ValueError:
        seconds = 0.0
    if not 0.05 <= seconds <= 86400:
        raise UsageError(
            f"--interval {interval!r} is not a number of seconds of at least 0.05", "--interval 1"
        )
    stream = sys.stdout.isatty() and not arguments.flag("no_stream") and not arguments.flag("json")
    return usage.show(
        chosen,
        seconds=seconds,
        stream=stream,
        as_json=arguments.flag("json"),
        form=arguments.value("format"),
        digits=None if arguments.flag("no_trunc") else 12,
    )


HANDLERS = {"ps": _ps, "logs": _logs, "port": _port, "stats": _stats}

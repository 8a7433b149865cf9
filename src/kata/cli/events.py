"""`kata events`: what happened to the sandboxes of this node, and what happens now."""

from __future__ import annotations

import json
import sys
import time

from kata import events
from kata.cli import table
from kata.cli.args import Command, Option
from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.cli.args import Arguments

COMMANDS = {
    "events": Command(
        "events",
        "",
        "Shows what happened to the sandboxes of this node: their life, and that of their containers.",
        [
            Option("-f --follow", "", "go on with what happens, until interrupted"),
            Option(
                "--since",
                "TIME",
                "begin there: a time (2026-11-28T12:00:00Z), or how long ago (90s, 10m, 2h)",
            ),
            Option(
                "--filter",
                "KEY=VALUE",
                "events with this member; a value may end in * ; may be repeated",
                many=True,
            ),
            Option("--json", "", "one JSON object a line, as they are kept"),
        ],
        most=0,
        notes="The events of all clients are kept in KATA_RUN_DIR/events.jsonl, the last one or two MiB of them.\n"
        "With -f and without --since, only what happens from now on is shown.\n"
        "examples:\n"
        "  kata events --since 10m --filter event=container.exited\n"
        "  kata events -f --json | jq 'select(.oom_killed)'",
    )
}
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_FIRST = ("time", "event", "sandbox", "container")


def _since(text: str) -> float:
    """Seconds of the epoch."""
    number, unit = text[:-1], text[-1:]
    try:
        if unit in _UNITS and float(number) >= 0:
            return time.time() - float(number) * _UNITS[unit]
    except ValueError:
        pass
    found = table.seconds_of(text)
    if found is None:
        raise UsageError(
            f"--since {text!r} is neither a time nor a duration", "2026-11-28T12:00:00Z, or 10m"
        )
    return found


class _Choice:
    """Which events are shown."""

    def __init__(self, since: float | None, filters: list[str]) -> None:
        self._since = since
        self._wanted: dict[str, list[str]] = {}
        for one in filters:
            key, equals, value = one.partition("=")
            if not key or not equals:
                raise UsageError(f"--filter {one!r} is not KEY=VALUE", "--filter event=container.exited")
            self._wanted.setdefault(key, []).append(value)

    def takes(self, event: dict[str, Any]) -> bool:
        """Whether an event is shown: it has one of the values of each key that was named."""
        if self._since is not None:
            at = table.seconds_of(str(event["time"]))
            if at is None or at < self._since:
                return False
        return all(
            any(_matches(_plain(event.get(key, "")), value) for value in values)
            for key, values in self._wanted.items()
        )


def _matches(text: str, pattern: str) -> bool:
    return text.startswith(pattern[:-1]) if pattern.endswith("*") else text == pattern


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _show(event: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(event, separators=(",", ":")) + "\n")
        return
    about = [
        f"{key}={table.printable(json.dumps(text, ensure_ascii=False) if ' ' in (text := _plain(value)) else text)}"
        for key, value in event.items()
        if key not in _FIRST
    ]
    sandbox, container = str(event.get("sandbox", "")), str(event.get("container", ""))
    whose = sandbox[:12] if container in ("", sandbox) else f"{sandbox[:12]}/{container[:12]}"
    when = f"{table.printable(str(event['time'])[:23]).rstrip('Z')}Z"
    cells = (when, f"{table.printable(str(event['event'])):<18}", f"{table.printable(whose):<12}", *about)
    sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _events(arguments: Arguments) -> int:
    since = arguments.value("since")
    choice = _Choice(None if since is None else _since(since), arguments.many("filter"))
    as_json = arguments.flag("json")
    if not arguments.flag("follow"):
        for event in events.read():
            if choice.takes(event):
                _show(event, as_json=as_json)
        return 0
    with events.Follower(from_start=since is not None) as follower:
        for event in follower:
            if choice.takes(event):
                _show(event, as_json=as_json)
                sys.stdout.flush()
    return 0


HANDLERS = {"events": _events}

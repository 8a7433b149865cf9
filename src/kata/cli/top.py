"""`kata top`: all sandboxes of this host as they are now, or the processes in one container."""

from __future__ import annotations

import os
import time

from kata.cli import table
from kata.cli.args import Command, Option
from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kata.cli.args import Arguments
    from kata.proto.agentext_pb import ProcessInfo

COMMANDS = {
    "top": Command(
        "top",
        "[CONTAINER]",
        "Shows what all sandboxes do, of any client, or lists the processes in a container as its guest sees them.",
        [
            Option("--once", "", "print a table once, and end"),
            Option("--json", "", "print JSON once, and end"),
            Option(
                "--sort",
                "COLUMN",
                "name, client, state, age, cpu, memory, overhead, returned, network, disk, containers (cpu)",
            ),
            Option("--filter", "WORDS", "sandboxes with these words in their names, ids, images or states"),
            Option("--interval", "SECONDS", "time between two readings (2)"),
            Option("--no-color", "", "no colours; as the variable NO_COLOR"),
            Option(
                "-o",
                "COLUMN[,COLUMN...]",
                "of the processes in a container only these: pid, ppid, uid, time, rss, tty, comm, args",
            ),
        ],
        most=1,
        exclusive=(("json", "o"),),
        notes="Keys: arrows and page keys move, Enter shows one sandbox and Escape goes back; n s a c m o g t d sort"
        " by name, state, age, CPU, memory, overhead, memory given back, traffic, disk, and once more turns the order;"
        " / filters; q ends.",
    )
}


def _top(arguments: Arguments) -> int:
    if arguments.rest:
        for name in ("sort", "filter", "interval"):
            if arguments.value(name) is not None:
                raise UsageError(f"--{name} is for the list of all sandboxes", "leave out the container")
        return _processes(arguments.rest[0], arguments.value("o"), as_json=arguments.flag("json"))
    if arguments.value("o") is not None:
        raise UsageError("-o is for the processes in a container", "kata top CONTAINER -o pid,comm")
    from kata.cli import live, top_view

    view = top_view.View()
    if (wanted := arguments.value("sort")) is not None:
        if wanted not in top_view.COLUMNS:
            raise UsageError(f"--sort {wanted!r} is no column", "one of: " + ", ".join(top_view.COLUMNS))
        view.sort_by(wanted)
    view.filter = arguments.value("filter") or ""
    interval = arguments.value("interval")
    try:
        seconds = 2.0 if interval is None else float(interval)
    except ValueError:
        seconds = 0.0
    if not 0.2 <= seconds <= 3600:
        raise UsageError(
            f"--interval {interval!r} is not a number of seconds of at least 0.2", "--interval 2"
        )
    if arguments.flag("json") or arguments.flag("once"):
        sampler = live.Sampler()
        sampler.sample()
        time.sleep(min(seconds, 1.0))
        sampler.sample()
        chosen = view.chosen(list(sampler.rows.values()))
        if arguments.flag("json"):
            table.show_json([row.to_json() for row in chosen])
        else:
            table.show(
                [column.title for column in top_view.COLUMNS.values()], [view.cells(row) for row in chosen]
            )
        return 0
    colour = not (arguments.flag("no_color") or os.environ.get("NO_COLOR"))
    return _watch(view, seconds, colour=colour)


def _watch(view: object, seconds: float, *, colour: bool) -> int:
    from kata.cli import live, top_view
    from kata.cli.screen import Screen

    assert isinstance(view, top_view.View)
    with Screen(colour=colour) as screen:
        sampler = live.Sampler(wake=screen.wake)
        due = time.monotonic()
        while True:
            if time.monotonic() >= due:
                sampler.begin()
                due = time.monotonic() + seconds
            sampler.take()
            view.take(list(sampler.rows.values()))
            lines, selected = view.draw(screen.columns, screen.rows)
            screen.draw(lines, selected)
            key = screen.key(due - time.monotonic())
            if key and not view.press(key):
                return 0


_COLUMNS: dict[str, tuple[str, Callable[[ProcessInfo], str]]] = {
    "pid": ("PID", lambda process: str(process.pid)),
    "ppid": ("PPID", lambda process: str(process.ppid)),
    "uid": ("UID", lambda process: str(process.uid)),
    "time": ("TIME", lambda process: _cpu_time(process.cpu_ns)),
    "rss": ("RSS", lambda process: table.human_size(process.rss_bytes)),
    "tty": ("TTY", lambda process: process.tty or "?"),
    "args": ("COMMAND", lambda process: " ".join(_words(process.command))),
    "comm": (
        "COMMAND",
        lambda process: os.path.basename(" ".join(_words(process.command)[:1]).split(" ")[0]),
    ),
}
"""The columns of processes, by ps's names; those before ``comm`` are shown where none are asked for."""


def _processes(reference: str, columns: str | None, *, as_json: bool) -> int:
    names = list(_COLUMNS)[:-1] if columns is None else columns.replace("cmd", "args").split(",")
    if unknown := [name for name in names if name not in _COLUMNS]:
        raise UsageError(f"-o: there is no column {unknown[0]!r}", "one of: " + ", ".join(_COLUMNS))
    from kata.cli import records
    from kata.engine.client import EngineClient

    container = records.find(reference)
    container.need_running()
    with EngineClient(container.socket) as engine:
        processes = engine.processes(container.id)
    if as_json:
        table.show_json([{**process.to_dict(), "command": _words(process.command)} for process in processes])
        return 0
    chosen = [_COLUMNS[name] for name in names]
    table.show([title for title, _ in chosen], [[cell(one) for _, cell in chosen] for one in processes])
    return 0


def _words(command: list[bytes]) -> list[str]:
    return [argument.decode("utf-8", "backslashreplace") for argument in command]


def _cpu_time(nanoseconds: int) -> str:
    seconds = nanoseconds // 10**9
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


HANDLERS = {"top": _top}

"""The table of docs/podman.md: what has to be seen of podman's operations, and what differs, with its reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import marked_page
from podman_support import RUNTIMES

EXPECTED = {
    "run": "in; err; status 3",
    "run -it": "yes; status 0",
    "run -d": "up localhost/bb:latest",
    "exec": "in; err; status 4",
    "exec -it": "yes; status 0",
    "exec -d": "done",
    "logs": "out; err; status 0",
    "attach": "got hello; status 5",
    "detach keys": "running",
    "kill": "137",
    "stop": r"3 \['up', 'bye'\]",
    "pause": "paused running",
    "restart": "running",
    "wait": "9",
    "cp": "content back",
    "top": "sleep",
    "stats": r"limit 134.2MB; 1 processes; used memory, network: \[True, True\]",
    "update": "134217728 67108864",
    "inspect": "running True 134217728 True",
    "events": "create init start attach died|create init start died",
    "commit": "kept",
    "volume": "file; .*Read-only file system; status 1",
    "network": "True",
    "port": "served",
    "healthcheck": "unhealthy healthy",
    "a missing command": ".*executable file.*not found.*status 127",
    "OOM": "137",
    "create, init, start": "created initialized running",
    "rm -f": "gone",
    "run --rm": "0 containers, status 7",
    "run --init": "podman-init|catatonit",
    "run --timeout": r"137|255",
    "run --read-only": "Read-only file system",
    "run --user": r"uid=1000\S* gid=1000\S*; status 0",
    "ports of a network": "served",
    "secret": "hidden",
    "diff": "A /new",
    "mount": "there",
    "restart policy": "3 starts",
    "pod": "served; same host name: True",
    "pod ps": "3 containers, Running",
    "pod stop": "Exited",
    "play kube": "served; removed",
    "names": "found",
    "big output": "20000000 20000000",
    "a lost conmon": "removed",
    "system prune": "nothing of it",
    "build": "made",
    "docker by podman's service": "in; err; status 3",
    "ends of many": "40 right",
    "all of it leaves behind": "nothing",
}
"""What is seen of an operation that works."""

REASONS: dict[str, tuple[str, str]] = {
    "stats": (
        r"limit \d+\.\dMB; \d+ processes; used memory, network: \[True, True\]",
        "Processes of the host are counted: the machine's monitor and its helpers. The limit is that of the host's"
        " cgroup with podman 5, which has room for what the machine takes itself.",
    ),
    "top": (
        "(?s).*",
        "podman reads /proc below the root directory, which is in the guest. With options of ps (`podman top NAME aux`)"
        " it executes the container's own ps.",
    ),
}
"""Operation -> what is seen where that is not what works, and why."""

LEFT = "all of it leaves behind"
BEGIN, END = "<!-- written by tools/conformance -->", "<!-- up to here -->"


def works(operation: str, seen: str) -> bool:
    """Whether that is what works."""
    return re.fullmatch(EXPECTED[operation], seen, re.DOTALL) is not None


def why(operation: str, seen: str) -> str:
    """Why it differs; empty if that is not known."""
    pattern, reason = REASONS.get(operation, ("", ""))
    return reason if pattern and re.fullmatch(pattern, seen, re.DOTALL) else ""


def wrong(found: Mapping[tuple[str, str], str]) -> list[str]:
    """What differs with kata for no known reason."""
    return [
        name
        for (name, runtime), seen in found.items()
        if runtime == "kata" and not works(name, seen) and not why(name, seen)
    ]


class Table:
    """The lines of the page: the operations in columns, and what differs.

    Args:
        lines: Those of the page so far: what is not found out anew is kept.
    """

    def __init__(self, lines: list[str] | None = None) -> None:
        self._cells: dict[tuple[str, str], dict[str, str]] = {}
        """Version and runtime -> operation -> a word."""
        self._differing: dict[tuple[str, str, str], list[str]] = {}
        """Operation, what was seen, and why -> runtimes with their versions."""
        rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines or ()]
        columns: list[tuple[str, str]] = []
        for row, line in zip(rows, lines or (), strict=True):
            if line.startswith("| | "):
                titles = line.removeprefix("| | ").rstrip("| ").split(" | ")
                columns = [_column(title) for title in titles]
            elif line.startswith("| what differs"):
                columns = []
            elif line.startswith("| ") and columns:
                words = line.removesuffix("|").split("|")[2:]
                for column, word in zip(columns, words, strict=True):
                    self._cells.setdefault(column, {})[row[0]] = word.strip()
            elif line.startswith("| "):
                name, where, seen, reason = row
                self._differing[name, seen, reason] = where.split(", ")

    def add(self, version: str, found: Mapping[tuple[str, str], str]) -> None:
        """Take down what was seen with a version."""
        for (name, runtime), seen in found.items():
            right = works(name, seen)
            self._cells.setdefault((version, runtime), {})[name] = "works" if right else "differs"
            what = f"{runtime} ({version})"
            for key, where in list(self._differing.items()):
                if key[0] == name and what in where:
                    where.remove(what)
                    if not where:
                        del self._differing[key]
            if not right:
                key = (name, _short(seen), why(name, seen) or "not known")
                self._differing.setdefault(key, []).append(what)

    def lines(self) -> list[str]:
        """All of it, as the page has it."""
        columns = sorted(
            self._cells,
            key=lambda one: ([int(number) for number in one[0].split(".")], RUNTIMES.index(one[1])),
        )
        titles = [f"podman {version}, {runtime}" for version, runtime in columns]
        lines = [f"| | {' | '.join(titles)} |", "|" + "---|" * (len(columns) + 1)]
        for name in EXPECTED:
            words = [self._cells[column].get(name, "") for column in columns]
            if any(words):
                lines.append(f"| {name} | {' | '.join(words)} |")
        if self._differing:
            lines += ["", "| what differs | with | seen | why |", "|---|---|---|---|"]
        order = list(EXPECTED)
        for name, seen, reason in sorted(self._differing, key=lambda key: order.index(key[0])):
            where = sorted(self._differing[name, seen, reason], key=_order)
            lines.append(f"| {name} | {', '.join(where)} | {seen} | {reason} |")
        return lines


def _order(where: str) -> tuple[list[int], int]:
    """``kata (5.4)`` -> its place in a list: by version, then by runtime."""
    runtime, _, version = where.rstrip(")").partition(" (")
    return [int(number) for number in version.split(".")], RUNTIMES.index(runtime)


def _column(title: str) -> tuple[str, str]:
    """``podman 4.3, kata`` -> version and runtime."""
    version, _, runtime = title.removeprefix("podman ").partition(", ")
    return version, runtime


def _short(text: str) -> str:
    return (
        "`"
        + re.sub(r"/tmp/kp\w+", "DIR", text).replace("\n", " ").replace("|", "/").replace("`", "'")[:160]
        + "`"
    )


def write(page: Path, versions: Mapping[str, Mapping[tuple[str, str], str]]) -> None:
    """Put the table into a page, between its marks; what it has of other operations and versions stays.

    Args:
        page: The page.
        versions: podman's version -> what was seen with it.

    Raises:
        ValueError: The page has no such marks.
    """
    table = Table(marked_page.lines_of(page, BEGIN, END))
    for name, found in versions.items():
        table.add(name, found)
    marked_page.write(page, BEGIN, END, table.lines())

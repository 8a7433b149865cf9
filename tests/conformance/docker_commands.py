"""What people type who come from Docker and Podman: each line with `docker`, `podman` (both with runc) and `kata`.

docker_commands.txt has the lines, in sessions. Compared are exit status and the shape of what is printed; where kata
does as neither of the two, the list says why. A session is run again when its lines have changed; what came of it is a
line of ``build/conformance/commands.jsonl`` the moment it is there. The table goes into docs/docker-commands.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import docker_commands_rig
from docker_commands_rig import CLIENTS, ROOT, Rig, Said

LIST = Path(__file__).with_name("docker_commands.txt")
STATE = ROOT / "build/conformance/commands.jsonl"
PAGE = ROOT / "docs/docker-commands.md"
_PATIENCE_S = 60
_LONGEST = 4000
"""Characters of an output that are kept."""
_DEPTH = 2
"""How deep the members of JSON are looked at: below, names are data as often as not."""


# ---- the list ----


@dataclass(frozen=True)
class Command:
    """A line of the list.

    Attributes:
        shape: How what it prints is compared, or ``-`` or ``~``, as the list's head says.
        line: What the shell is given.
        why: Why kata may differ; empty if it may not.
    """

    shape: str
    line: str
    why: str = ""

    @property
    def counts(self) -> bool:
        """Whether it is one of the commands, and no preparation."""
        return self.shape not in "-~"


@dataclass
class Session:
    """Lines that are run one after the other."""

    name: str
    commands: list[Command] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Changes when a line does."""
        text = "\n".join(f"{one.shape} {one.line}" for one in self.commands)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def sessions(text: str) -> list[Session]:
    """Read the list.

    Raises:
        ValueError: A line is none of those that the head of the list describes.
    """
    found: list[Session] = []
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("== "):
            found.append(Session(line.removeprefix("== ")))
            continue
        shape, _, rest = line.strip().partition(" ")
        if shape == "why:":
            last = found[-1].commands.pop()
            found[-1].commands.append(Command(last.shape, last.line, rest.strip()))
        elif shape in (*SHAPES, "-", "~"):
            found[-1].commands.append(Command(shape, rest.strip()))
        else:
            raise ValueError(f"{line!r} has no shape that is known")
    return found


# ---- shapes ----

_EACH_TIME = (
    (r"\x1b\[[0-9;?]*[A-Za-z]", ""),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?( ?(Z|[+-]\d\d:?\d\d))?( [A-Z]{3,4})?", "TIME"),
    (r"\b[0-9a-f]{12,64}\b", "ID"),
    (r"\b(docker\.io/library|localhost)/", ""),
    (
        r"(about |less than )?(an?|\d+) (second|minute|hour|day|week|month|year)s?( ago)?",
        "AGE",
    ),
    (r"\b\d+(\.\d+)? ?([kKMGT]i?)?B\b", "SIZE"),
    (r"[ \t]+", " "),
)
"""What is different each time, and what stands in its place."""


def _text(said: str) -> str:
    for pattern, instead in _EACH_TIME:
        said = re.sub(pattern, instead, said, flags=re.IGNORECASE if "ago" in pattern else 0)
    return "\n".join(line.strip() for line in said.replace("\r", "").splitlines()).strip()[:_LONGEST]


def _table(said: str) -> str:
    lines = said.replace("\r", "").rstrip().splitlines()
    headings = [word.strip() for word in re.split(r"\t|  +", lines[0])] if lines else []
    return f"{', '.join(filter(None, headings))}: {max(len(lines) - 1, 0)} rows"


def _members(value: object, depth: int, path: str) -> Iterator[str]:
    if isinstance(value, list):
        for one in value[:1]:
            yield from _members(one, depth, path)
    elif isinstance(value, dict) and depth:
        for name, below in value.items():
            if re.fullmatch(r"\w+", name):
                yield f"{path}{name}"
                yield from _members(below, depth - 1, f"{path}{name}.")


def _json(said: str) -> str:
    text = said.strip()
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = [json.loads(line) for line in text.splitlines()]
        except ValueError:
            return f"not JSON: {text[:200]}"
    return " ".join(sorted(set(_members(value, _DEPTH, ""))))


SHAPES: dict[str, Callable[[str], str]] = {
    "text": _text,
    "tty": _text,
    "set": lambda said: "\n".join(sorted(_text(said).splitlines())),
    "table": _table,
    "rows": lambda said: f"{len(said.strip().splitlines())} lines",
    "json": _json,
    "code": lambda said: "",
}


@dataclass(frozen=True)
class Seen:
    """What is kept of a command.

    Attributes:
        code: The exit status.
        shape: Of what it printed.
        err: The beginning of what it said on standard error, to be read and not to be compared.
    """

    code: int
    shape: str
    err: str

    @classmethod
    def of(cls, command: Command, said: Said) -> Seen:
        """The shape of what came of a command."""
        return cls(said.code, SHAPES[command.shape](said.out), said.err.strip()[:300])


def agrees(command: Command, ours: Seen, theirs: Mapping[str, Seen]) -> list[str]:
    """The clients that kata does as.

    Of JSON it has to have the members that both have; all else has to be the same. Who fails has to say why.

    Args:
        command: The command.
        ours: What came of it with kata.
        theirs: What came of it with the others.
    """
    if command.shape == "json":
        common = set.intersection(*(set(one.shape.split()) for one in theirs.values()))
        is_whole = common <= set(ours.shape.split())
        return [name for name, one in theirs.items() if is_whole and one.code == ours.code]
    silent = ours.code != 0 and not ours.err and not ours.shape
    return [
        name
        for name, one in theirs.items()
        if (one.code, one.shape) == (ours.code, ours.shape) and not (silent and one.err)
    ]


# ---- running ----


class Record:
    """What has been seen, by client and session, kept in a file.

    Args:
        path: The file: a JSON object a line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[tuple[str, str], dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self.found[entry["client"], entry["session"]] = entry

    def add(self, client: str, version: str, session: Session, seen: list[Seen]) -> None:
        """Note what came of a session, at once and for good."""
        entry = {
            "client": client,
            "version": version,
            "session": session.name,
            "key": session.key,
            "seen": [asdict(one) for one in seen],
        }
        self.found[client, session.name] = entry
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def seen(self, client: str, session: Session) -> list[Seen] | None:
        """What came of the commands that count; None if they have not been run as they are now."""
        entry = self.found.get((client, session.name))
        if entry is None or entry["key"] != session.key:
            return None
        return [Seen(**one) for one in entry["seen"]]

    def versions(self) -> dict[str, str]:
        """What each client called itself the last time."""
        return {client: entry["version"] for (client, _), entry in self.found.items()}


def run(rig: Rig, client: str, session: Session) -> list[Seen]:
    """Type the lines of a session.

    Returns:
        What came of those that count.
    """
    seen = []
    with rig.session(client) as directory:
        for command in session.commands:
            said = rig.type(client, command.line, directory, terminal=command.shape == "tty")
            deadline = time.monotonic() + _PATIENCE_S
            while command.shape == "~" and said.code and time.monotonic() < deadline:
                time.sleep(0.2)
                said = rig.type(client, command.line, directory)
            if command.counts:
                seen.append(Seen.of(command, said))
            elif said.code:
                print(f"  {client}: not ready: {command.line}: {said.err[:300]}", flush=True)
    return seen


# ---- what came of it ----


@dataclass(frozen=True)
class Row:
    """A command with what came of it."""

    session: str
    command: Command
    seen: Mapping[str, Seen]

    @property
    def verdict(self) -> str:
        """``docker``, ``podman``, ``both``, ``differs`` for a known reason, ``wrong``, or ``as both, and a reason``."""
        same = agrees(self.command, self.seen["kata"], {name: self.seen[name] for name in CLIENTS[:2]})
        if same:
            return "needless reason" if self.command.why else "both" if len(same) == 2 else same[0]
        return "differs" if self.command.why else "wrong"


_HEAD = """\
# Commands as Docker's and Podman's users type them

Written by `make commands`; do not edit. Each line was given to a shell three times, with `docker` (its daemon and
runc), `podman` (with runc) and `kata` as what `docker` means, in the same sessions, with the same image. Same means:
the same exit status, and the same output but for ids, times and sizes; of tables the headings and the number of
rows, of JSON the members that Docker and Podman both have. The list, and how each line is compared, is
`tests/conformance/docker_commands.txt`. All that `kata` has of their commands and options:
[docker-users](docker-users.md).

"""


def rows(listed: list[Session], record: Record) -> list[Row]:
    """The commands that all clients have been given."""
    found = []
    for session in listed:
        seen = {client: record.seen(client, session) for client in CLIENTS}
        counting = [command for command in session.commands if command.counts]
        for number, command in enumerate(counting):
            each = {client: all_of[number] for client, all_of in seen.items() if all_of is not None}
            if len(each) == len(CLIENTS):
                found.append(Row(session.name, command, each))
    return found


def page(found: list[Row], versions: Mapping[str, str]) -> str:
    """The text of docs/docker-commands.md."""
    counts = {
        name: sum(row.verdict == name for row in found)
        for name in ("both", "docker", "podman", "differs", "wrong", "needless reason")
    }
    lines = [
        *_HEAD.splitlines(),
        *(f"* {versions[client]}" for client in CLIENTS if client in versions),
        "",
        "| of these commands, kata does | |",
        "|---|---|",
        f"| as both | {counts['both']} |",
        f"| as Docker, where Podman differs | {counts['docker']} |",
        f"| as Podman, where Docker differs | {counts['podman']} |",
        f"| otherwise, for a reason that is told below | {counts['differs']} |",
        f"| otherwise | {counts['wrong'] + counts['needless reason']} |",
        f"| all | {len(found)} |",
        "",
        "## Where kata differs",
        "",
        "| command | why |",
        "|---|---|",
        *(
            f"| {_code(row.command.line)} | {row.command.why or 'not known'} |"
            for row in found
            if row.verdict in ("differs", "wrong")
        ),
    ]
    session = ""
    for row in found:
        if row.session != session:
            session = row.session
            lines += ["", f"## {session.capitalize()}", "", "| command | kata does as |", "|---|---|"]
        words = {"differs": "neither, see above", "wrong": "neither"}
        lines.append(f"| {_code(row.command.line)} | {words.get(row.verdict, row.verdict)} |")
    return "\n".join(lines) + "\n"


def _code(line: str) -> str:
    fence = "``" if "`" in line else "`"
    return f"{fence}{line}{fence}".replace("|", "\\|")


def main() -> int:
    """Run what has not been run, and write the page.

    Returns:
        1 when kata differs for no known reason, or does not where a reason is told.
    """
    parser = argparse.ArgumentParser(prog="tools/conformance --commands", description=__doc__)
    parser.add_argument(
        "--again", metavar="TEXT", action="append", default=[], help="run sessions with this name once more"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="only sessions whose name contains this")
    parser.add_argument("--client", choices=CLIENTS, help="with this client alone")
    parser.add_argument("--fresh", action="store_true", help="run everything once more")
    parser.add_argument("--differing", action="store_true", help="run nothing; show what differs, in full")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that containers are removed on the way out
    listed, record = sessions(LIST.read_text()), Record(STATE)
    again = [""] if options.fresh else options.again
    todo = [
        (client, session)
        for session in listed
        for client in CLIENTS
        if options.only in session.name
        and options.client in (None, client)
        and (record.seen(client, session) is None or any(text in session.name for text in again))
    ]
    if todo and not options.differing:
        with docker_commands_rig.running(Path(os.environ["KATA_GUEST_DIR"])) as rig:
            for client, session in todo:
                started = time.monotonic()
                record.add(client, rig.versions[client], session, run(rig, client, session))
                print(f"{client}: {session.name} ({time.monotonic() - started:.0f} s)", flush=True)
    found = rows(listed, record)
    wanting = [session.name for session in listed if not all(record.seen(one, session) for one in CLIENTS)]
    if wanting:
        print(f"not run with all clients yet, so {PAGE.name} stays: {', '.join(wanting)}")
    else:
        PAGE.write_text(page(found, record.versions()))
    wrong = [row for row in found if row.verdict in ("wrong", "needless reason")]
    for row in wrong:
        print(f"{row.verdict}: {row.command.line}")
        for client in CLIENTS:
            seen = row.seen[client]
            print(f"    {client}: {seen.code} {seen.shape!r} {seen.err!r}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

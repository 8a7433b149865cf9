"""The options of ``kata-log-parser``: a table, from which help, manual page and completion are made."""

from __future__ import annotations

import re
import time

from kata.agent_ctl.options import Option, Values, parse, table
from kata.errors import UsageError
from kata.log_parser.output import FORMATS
from kata.log_parser.record import LEVELS, parse_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kata.log_parser.record import Record

OPTIONS = (
    Option("-f --output-format", "|".join(FORMATS), "how to write the records (text)"),
    Option(
        "-o --output-file",
        "FILE",
        "where to write them (standard output); it is replaced when all is written",
    ),
    Option("--sandbox", "ID", "only records of this sandbox, by its id or the beginning of it", many=True),
    Option("--level", "|".join(LEVELS), "only records of this level or a more severe one"),
    Option("--since", "TIME", "only from then on: 2026-01-02T03:04:05Z, or how long ago: 90s, 10m, 2h, 3d"),
    Option("--until", "TIME", "only before then; as --since"),
    Option("--statistics", "", "write how many records of each kind there are, and not the records"),
    Option(
        "--check-only", "", "write no records; the exit status says whether something is wrong with the logs"
    ),
    Option(
        "--strict",
        "",
        "exit with 1, too, if a line is malformed, out of order, or lacks time, level or message",
    ),
    Option("--ignore-missing-fields", "", "a line may lack them"),
    Option("--error-if-file-empty", "", "exit with 1 if a file is empty"),
    Option("--error-if-no-records", "", "exit with 1 if there are no records at all"),
    Option("-q --quiet", "", "do not say what is wrong with which line"),
    Option("--list-output-formats", "", "list the formats"),
    Option("-V --version", "", "print the version"),
    Option("-h --help", "", "this"),
)

SUMMARY = "Reads logs of sandboxes, merges them by time, checks and converts them."

NOTES = """\
It reads logs of engines (text, logfmt, JSON), of agents and their console, containerd's and Kata's own (logfmt),
events.jsonl, and journald's (journalctl -o json, -o short, -o short-iso), from the files or from standard input (-).
Lines of all files are merged by their times. Memory is bounded: of each file 1024 lines are held back (1 MiB at most)
and sorted; lines that are later than that come where they stand. Control characters are escaped.
The exit status is 0 for success, 1 if something is wrong with the logs, 2 for a wrong option or a file that cannot be
read or written.

examples:
  kata-log-parser /run/kata/sandboxes/*/engine.log
  journalctl -u containerd -o json | kata-log-parser --sandbox 3f2a --since 10m -
  kata-log-parser --check-only --strict engine.log
  kata-log-parser -f csv -o all.csv engine.log containerd.log
"""


def usage() -> str:
    """The text of ``--help``."""
    options = table([(option.head, option.text) for option in OPTIONS])
    return f"usage: kata-log-parser [OPTION...] [FILE...]\n\n{SUMMARY}\n\noptions:\n{options}\n\n{NOTES}"


def read(words: Sequence[str]) -> tuple[Values, list[str]]:
    """Parse a command line; options may stand between and behind the files.

    Raises:
        UsageError: An option is unknown, or its value makes no sense.
    """
    files: list[str] = []
    rest = list(words)
    chosen: list[str] = []
    while rest:
        if rest[0] == "--":
            files += rest[1:]
            break
        if rest[0].startswith("-") and rest[0] != "-":
            _, after = parse(OPTIONS, rest)
            chosen += rest[: len(rest) - len(after)]
            rest = after
            if not rest or rest[0] == "--":
                continue
        files.append(rest.pop(0))
    values, _ = parse(OPTIONS, chosen)
    for key, allowed in (("output-format", FORMATS), ("level", LEVELS)):
        given = values.value(key)
        if given is not None and given not in allowed:
            raise UsageError(f"--{key} {given!r} is not offered", "one of: " + ", ".join(allowed))
    return values, files


class Filter:
    """Which records are wanted.

    Args:
        values: The options.

    Raises:
        UsageError: A time makes no sense.
    """

    def __init__(self, values: Values) -> None:
        level = values.value("level")
        self._levels = frozenset(LEVELS[LEVELS.index(level) :]) if level else None
        self._sandboxes = tuple(values.many("sandbox"))
        self._since = _time(values.value("since"), "--since")
        self._until = _time(values.value("until"), "--until")

    def wants(self, record: Record) -> bool:
        """Whether this one is. A line that does not say its level or time is not, where that is asked for."""
        if self._levels is not None and record.level not in self._levels:
            return False
        if self._sandboxes and not _is_of(record.sandbox, self._sandboxes):
            return False
        if self._since is None and self._until is None:
            return True
        at = record.time_ns
        if at is None:
            return False
        return (self._since is None or at >= self._since) and (self._until is None or at < self._until)


def _is_of(sandbox: str, wanted: tuple[str, ...]) -> bool:
    # containerd's sandboxes have directories that are called NAMESPACE.ID.
    return bool(sandbox) and (sandbox.startswith(wanted) or sandbox.partition(".")[2].startswith(wanted))


def _time(text: str | None, option: str) -> int | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if found:
        return time.time_ns() - int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] * 10**9
    at = parse_time(text)
    if at is None:
        raise UsageError(f"{option} {text!r} is no time", "2026-01-02T03:04:05Z, or 90s, 10m, 2h, 3d")
    return at

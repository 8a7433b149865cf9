"""A line of a log, whatever its format was."""

from __future__ import annotations

import calendar
import re
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LEVELS = ("debug", "info", "warning", "error")
_LEVEL_NAMES = {
    **dict.fromkeys(("trace", "trce", "debug", "debg", "7"), "debug"),
    **dict.fromkeys(("info", "information", "notice", "6", "5"), "info"),
    **dict.fromkeys(("warn", "warning", "4"), "warning"),
    **dict.fromkeys(
        ("error", "erro", "err", "crit", "critical", "fatal", "panic", "alert", "emerg"), "error"
    ),
    **dict.fromkeys(("3", "2", "1", "0"), "error"),
}
"""Names of levels of Go's, Rust's and Python's loggers, and syslog's numbers, by the four that we have."""


class Record:
    """What one line says.

    Attributes:
        time_ns: When, in nanoseconds since the epoch; None if the line does not say.
        level: One of `LEVELS`; empty if the line does not say.
        message: What.
        sandbox: Of which sandbox; empty if that is not known.
        source: Which program or part of it; empty if that is not known.
        fields: What else it says: name -> text.
        format: How it was written.
        file, line: Where it stands.
        size: Bytes of the line.
    """

    __slots__ = (
        "fields",
        "file",
        "format",
        "level",
        "line",
        "message",
        "sandbox",
        "size",
        "source",
        "time_ns",
    )

    def __init__(self, message: str, form: str, time_ns: int | None = None) -> None:
        self.message = message
        self.format = form
        self.time_ns = time_ns
        self.level = ""
        self.sandbox = ""
        self.source = ""
        self.fields: dict[str, str] = {}
        self.file = ""
        self.line = 0
        self.size = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: what is not known is left out."""
        known: dict[str, Any] = {
            "time": stamp(self.time_ns) if self.time_ns is not None else "",
            "level": self.level,
            "sandbox": self.sandbox,
            "source": self.source,
            "msg": self.message,
        }
        shown = {name: value for name, value in known.items() if value or name == "msg"}
        shown |= {name: value for name, value in self.fields.items() if name not in shown}
        return {**shown, "file": self.file, "line": self.line}


def level_of(text: str) -> str:
    """One of `LEVELS` for a level's name or number; empty for an unknown one."""
    return _LEVEL_NAMES.get(text.strip().lower(), "")


def stamp(time_ns: int) -> str:
    """A time as RFC 3339 has it, in UTC with nine digits."""
    seconds, rest = divmod(time_ns, 10**9)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:09d}Z"


_RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:[.,](\d{1,9})\d*)?\s?(Z|UTC|[+-]\d\d:?\d\d)?$", re.ASCII
)
_days: dict[str, int] = {}


def parse_time(text: str) -> int | None:
    """Nanoseconds since the epoch of a time as RFC 3339, Go, Python and journald write it, or of a number of seconds.

    Without a zone it is UTC.
    """
    found = _RFC3339.match(text)
    if found is None:
        return _parse_seconds(text)
    day, clock, fraction, zone = found.groups()
    start = _days.get(day)
    if start is None:
        try:
            start = calendar.timegm(time.strptime(day, "%Y-%m-%d"))
        except ValueError:
            return None
        if len(_days) > 100:
            _days.clear()
        _days[day] = start
    hours, minutes, seconds = int(clock[:2]), int(clock[3:5]), int(clock[6:])
    if hours > 23 or minutes > 59 or seconds > 60:
        return None
    whole = start + hours * 3600 + minutes * 60 + seconds
    if zone and zone[0] in "+-":
        offset = int(zone[1:3]) * 3600 + int(zone[-2:]) * 60
        whole -= offset if zone[0] == "+" else -offset
    return whole * 10**9 + (int(fraction.ljust(9, "0")) if fraction else 0)


def _parse_seconds(text: str) -> int | None:
    if not re.fullmatch(r"\d{1,11}(\.\d{1,9}\d*)?", text, re.ASCII):
        return None
    whole, _, fraction = text.partition(".")
    return int(whole) * 10**9 + (int(fraction[:9].ljust(9, "0")) if fraction else 0)

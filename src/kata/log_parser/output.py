"""Writes records: as text for people, or as logfmt, JSON lines or CSV for programs."""

from __future__ import annotations

import json
import re

from kata.log_parser.record import LEVELS, Record, stamp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

FORMATS = ("text", "logfmt", "json", "csv")
COLUMNS = ("time", "level", "sandbox", "source", "msg", "fields", "file", "line")
_PLAIN = re.compile(r"[^\s\"=\\]+")
_MOST_NAMES = 1000
_PLURALS = {"sandbox": "sandboxes", "source": "sources", "format": "formats", "file": "files"}


def visible(text: str) -> str:
    r"""*text* with what controls a terminal, or would begin another line, escaped: ``\x1b``, ``\n``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def as_text(record: Record) -> str:
    """For people: time, level, sandbox and source in front."""
    when = stamp(record.time_ns) if record.time_ns is not None else "-"
    who = "/".join(part for part in (record.sandbox[:12], record.source) if part) or "-"
    more = "".join(f" {name}={_value(value)}" for name, value in record.fields.items())
    return visible(f"{when} {record.level or '-':<7} {who}: {record.message}{more}")


def as_logfmt(record: Record) -> str:
    """``name=value`` pairs."""
    return " ".join(f"{_name(name)}={_value(str(value))}" for name, value in record.to_dict().items())


def as_json(record: Record) -> str:
    """One JSON object; what is not ASCII is escaped in it."""
    return json.dumps(record.to_dict(), separators=(",", ":"))


def as_csv(record: Record) -> str:
    """One line of CSV (RFC 4180), with `COLUMNS`."""
    known = record.to_dict()
    fields = " ".join(f"{_name(name)}={_value(value)}" for name, value in record.fields.items())
    cells = [fields if column == "fields" else visible(str(known.get(column, ""))) for column in COLUMNS]
    return ",".join(
        '"' + cell.replace('"', '""') + '"' if re.search(r'[",\s]', cell) else cell for cell in cells
    )


def _name(name: str) -> str:
    return re.sub(r"[^\w.@/-]", "_", name)[:64] or "_"


def _value(value: str) -> str:
    if _PLAIN.fullmatch(value) and value.isprintable():
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else _go_escape(c) for c in escaped) + '"'


def _go_escape(char: str) -> str:
    """As Go's ``%q`` has it, so that any logfmt reader gets the same text back."""
    code = ord(char)
    if char in "\n\t\r":
        return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}[char]
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


WRITERS: dict[str, Callable[[Record], str]] = {
    "text": as_text,
    "logfmt": as_logfmt,
    "json": as_json,
    "csv": as_csv,
}


class Statistics:
    """Counts records, by level, source, sandbox, format and file; of each at most a thousand names."""

    def __init__(self) -> None:
        self.records = 0
        self.first_ns: int | None = None
        self.last_ns: int | None = None
        self.gap_ns = 0
        self.gap_at = ""
        self._counts: dict[str, dict[str, int]] = {
            name: {} for name in ("level", "sandbox", "source", "format", "file")
        }

    def add(self, record: Record) -> None:
        """Count a record, in the order of time."""
        self.records += 1
        for name, counts in self._counts.items():
            value = str(getattr(record, name)) or "-"
            if value not in counts and len(counts) >= _MOST_NAMES:
                value = "(others)"
            counts[value] = counts.get(value, 0) + 1
        at = record.time_ns
        if at is None:
            return
        if self.last_ns is not None and at - self.last_ns > self.gap_ns:
            self.gap_ns, self.gap_at = at - self.last_ns, stamp(self.last_ns)
        self.first_ns = at if self.first_ns is None else min(self.first_ns, at)
        self.last_ns = at if self.last_ns is None else max(self.last_ns, at)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        order = {name: number for number, name in enumerate(LEVELS)}
        levels = sorted(self._counts["level"].items(), key=lambda pair: order.get(pair[0], -1))
        span = (self.last_ns or 0) - (self.first_ns or 0)
        return {
            "records": self.records,
            "first": stamp(self.first_ns) if self.first_ns is not None else None,
            "last": stamp(self.last_ns) if self.last_ns is not None else None,
            "seconds": span / 1e9,
            "longest_gap_seconds": self.gap_ns / 1e9,
            "longest_gap_after": self.gap_at or None,
            "levels": dict(levels),
            **{
                plural: dict(sorted(self._counts[name].items(), key=lambda pair: (-pair[1], pair[0])))
                for name, plural in _PLURALS.items()
            },
        }

    def as_text(self) -> str:
        """For people."""
        lines = []
        for name, value in self.to_dict().items():
            if isinstance(value, dict):
                lines.append(f"{name}:")
                lines += [f"  {count:>10}  {visible(one)}" for one, count in list(value.items())[:20]]
                if len(value) > 20:
                    lines.append(f"  and {len(value) - 20} more")
            else:
                lines.append(f"{name.replace('_', ' ')}: {'-' if value is None else value}")
        return "\n".join(lines) + "\n"

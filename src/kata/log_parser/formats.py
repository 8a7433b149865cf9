"""From a line to a `Record`: the formats of engines, agents, containerd, Kata's runtimes and journald.

| format | for instance |
|---|---|
| ``logfmt`` | ``time="2026-01-02T03:04:05Z" level=info msg="..." sandbox=...``: containerd, Kata's runtimes, engines |
| ``json`` | one object: agents (``ts``), engines, events, Kata's agent (slog), Docker (``log``) |
| ``text`` | ``2026-01-02T03:04:05Z words``, ``... kata ID: words``: engines |
| ``journal`` | ``journalctl -o json`` |
| ``short`` | ``Jan 02 03:04:05 host name[pid]: words``, ``-o short`` and ``-o short-iso``, syslog |
| ``kernel`` | ``[    1.234567] words``: a guest's console |

What a line of journald, syslog or ``text`` says may be logfmt or JSON itself, and is taken apart then.
"""

from __future__ import annotations

import calendar
import json
import re
import time

from kata.log_parser.record import Record, level_of, parse_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MOST_LINE = 64 << 10
"""Bytes of a line; what is longer is malformed."""
_MOST_FIELDS = 64
_DEPTH = 3

_TIMES = ("time", "ts", "timestamp", "@timestamp", "t")
_MESSAGES = ("msg", "message", "event", "log")
_LEVELS = ("level", "lvl", "severity")
_SANDBOXES = ("sandbox", "sandbox_id", "sandbox-id", "sandboxid", "kata-sandbox")
_SOURCES = ("source", "name", "logger", "subsystem", "component")

_TEXT = re.compile(
    r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:?\d\d)) (?:kata ([\w.-]{1,128}): )?(.*)$", re.S
)
_KERNEL = re.compile(r"\[ *(\d{1,9}\.\d{6})\] ?(.*)$", re.S)
_SHORT = re.compile(
    r"(?:([A-Z][a-z]{2}) +(\d{1,2}) (\d\d:\d\d:\d\d)(\.\d{1,6})?"
    r"|(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:[.,]\d{1,6})?[+-]\d\d:?\d\d))"  # an engine's own lines have Z
    r" ([\w.-]{1,255}) ([^\s:\[]{1,128})(?:\[(\d{1,10})\])?: (.*)$",
    re.S | re.ASCII,
)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_KEY = re.compile(r"[A-Za-z_@][\w.@/-]{0,63}=")
_BARE = re.compile(r'[^\s"]*')
_PAIR = re.compile(r' *([A-Za-z_@][\w.@/-]{0,63})=(?:"((?:[^"\\]|\\.)*)"|([^\s"]*))(?=\s|$)', re.S)


class Malformed(Exception):
    """A line is of none of the formats; why."""


def parse(line: str, now: float | None = None) -> Record:
    """Take a line apart.

    Args:
        line: Without its end.
        now: The present, for times that have no year (seconds since the epoch); None is now.

    Raises:
        Malformed: It has none of the formats.
    """
    return _parse(line, time.time() if now is None else now, _DEPTH)


def _parse(line: str, now: float, depth: int) -> Record:
    text = line.strip("\r\n\0")
    if text.startswith("{"):
        return _json(text, now, depth)
    if _KEY.match(text):
        return _from_fields(_logfmt(text), "logfmt")
    found = _KERNEL.match(text)
    if found:
        record = Record(found[2], "kernel")
        record.source = "kernel"
        record.fields["uptime"] = found[1]
        return record
    ours = _TEXT.match(text)
    short = None if ours and ours[2] else _SHORT.match(text)
    if short:
        return _short(short, now, depth)
    if ours:
        record = _inner(ours[3], "text", parse_time(ours[1]), now, depth)
        record.sandbox = record.sandbox or ours[2] or ""
        return _marked(record)
    raise Malformed("it is of none of the formats")


def _inner(text: str, form: str, time_ns: int | None, now: float, depth: int) -> Record:
    """What a line of another format says, taken apart if it has a format itself."""
    if depth > 0 and (text.startswith("{") or (_KEY.match(text) and " msg=" in f" {text}")):
        try:
            record = _parse(text, now, depth - 1)
        except Malformed:
            pass
        else:
            record.format = form
            if record.time_ns is None:
                record.time_ns = time_ns
            return record
    return Record(text, form, time_ns)


def _marked(record: Record) -> Record:
    """A line of an engine's log for people, with what the words in front of it mean (`kata.engine.log`)."""
    if record.message.startswith("debug: "):
        record.level, record.message = "debug", record.message[len("debug: ") :]
    for source in ("console", "agent"):
        if record.message.startswith(f"{source}: "):
            record.source, record.message = source, record.message[len(source) + 2 :]
    return record


def _short(found: re.Match[str], now: float, depth: int) -> Record:
    month, day, clock, fraction, whole, host, name, pid, text = found.groups()
    time_ns = parse_time(whole) if whole else _without_year(month, int(day), clock, fraction or "", now)
    if time_ns is None:
        raise Malformed("there is no such time")
    record = _inner(text, "short", time_ns, now, depth)
    record.source = record.source or name
    record.fields.setdefault("host", host)
    if pid:
        record.fields.setdefault("pid", pid)
    return record


def _without_year(month: str, day: int, clock: str, fraction: str, now: float) -> int | None:
    """In this year, or in the last one if it would lie in the future."""
    year = time.gmtime(now).tm_year
    for one in (year, year - 1):
        try:
            parsed = time.strptime(f"{one} {_MONTHS.index(month) + 1} {day} {clock}", "%Y %m %d %H:%M:%S")
        except ValueError:
            continue
        seconds = calendar.timegm(parsed)
        if seconds <= now + 86400:
            return seconds * 10**9 + int(fraction[1:].ljust(9, "0") or 0)
    return None


def _json(text: str, now: float, depth: int) -> Record:
    try:
        content = json.loads(text, parse_float=str)  # as it is written: a float would round
    except (ValueError, RecursionError):
        raise Malformed("it begins as JSON and is none") from None
    if "__REALTIME_TIMESTAMP" in content or "MESSAGE" in content:
        return _journal(content, now, depth)
    return _from_fields({str(name): _plain(value) for name, value in content.items()}, "json")


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"))


def _journal(content: dict[str, Any], now: float, depth: int) -> Record:
    micro = str(content.get("__REALTIME_TIMESTAMP", ""))
    if micro and not re.fullmatch(r"\d{1,17}", micro, re.ASCII):
        raise Malformed("its __REALTIME_TIMESTAMP is no number")
    message = content.get("MESSAGE")
    if isinstance(message, list):  # journald's form of what is no UTF-8
        if not all(isinstance(one, int) and 0 <= one < 256 for one in message):
            raise Malformed("its MESSAGE is neither text nor bytes")
        message = bytes(message).decode("utf-8", "backslashreplace")
    record = _inner(str(message or ""), "journal", int(micro) * 1000 if micro else None, now, depth)
    record.source = record.source or str(content.get("SYSLOG_IDENTIFIER") or content.get("_COMM") or "")
    record.level = record.level or level_of(str(content.get("PRIORITY", "")))
    for name, key in (("pid", "_PID"), ("host", "_HOSTNAME"), ("unit", "_SYSTEMD_UNIT")):
        if content.get(key):
            record.fields.setdefault(name, str(content[key]))
    return record


def _from_fields(fields: dict[str, str], form: str) -> Record:
    """A record of names and values; a time that is none is malformed."""
    if len(fields) > _MOST_FIELDS:
        raise Malformed(f"it has more than {_MOST_FIELDS} fields")
    lower = {name.lower(): name for name in fields}

    def take(names: tuple[str, ...]) -> str:
        for name in names:
            if name in lower and fields.get(lower[name]):
                return fields.pop(lower[name])
        return ""

    when = take(_TIMES)
    time_ns = parse_time(when) if when else None
    if when and time_ns is None:
        raise Malformed(f"{when[:64]!r} is no time")
    record = Record(take(_MESSAGES).rstrip("\n"), form, time_ns)
    record.level = level_of(take(_LEVELS))
    record.sandbox = take(_SANDBOXES)
    record.source = take(_SOURCES)
    record.fields = fields
    return record


def _logfmt(text: str) -> dict[str, str]:
    """``name=value`` pairs; a value may be in quotation marks with Go's escapes."""
    fields: dict[str, str] = {}
    position, end = 0, len(text)
    while position < end:
        pair = _PAIR.match(text, position)
        if pair is not None:  # nearly always; the rest of the loop finds out what is wrong
            name, quoted, value = pair.groups()
            position = pair.end()
            if quoted is not None:
                value = _ESCAPE.sub(_unescaped, quoted) if "\\" in quoted else quoted
            fields[name] = value
            continue
        if text[position] == " ":
            position += 1
            continue
        found = _KEY.match(text, position)
        if found is None:
            raise Malformed(f"what is at column {position + 1} is no name=value")
        name, position = found[0][:-1], found.end()
        if text.startswith('"', position):
            value, position = _quoted(text, position)
        else:
            bare = _BARE.match(text, position)
            assert bare is not None  # it matches nothing, too
            value, position = bare[0], bare.end()
            if position < end and text[position] == '"':
                raise Malformed(f"there is a quotation mark at column {position + 1}")
        fields[name] = value
    return fields


_ESCAPES = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    '"': '"',
    "\\": "\\",
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "v": "\v",
}
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.))", re.S)
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"', re.S)


def _quoted(text: str, position: int) -> tuple[str, int]:
    found = _STRING.match(text, position)
    if found is None:
        raise Malformed(f"the quotation at column {position + 1} does not end")
    if "\\" not in found[1]:
        return found[1], found.end()

    return _ESCAPE.sub(_unescaped, found[1]), found.end()


def _unescaped(escape: re.Match[str]) -> str:
    number = escape[1] or escape[2] or escape[3]
    if number or escape[4]:
        code = int(number, 16) if number else int(escape[4], 8)
        return chr(code) if code < 0x110000 else "\ufffd"
    return _ESCAPES.get(escape[5], escape[0])

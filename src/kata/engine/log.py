"""The engine's log: lines for people, or logfmt or JSON for programs; and what it shows at which level.

The log is the engine's standard error: ``engine.log`` in the sandbox's directory. With containerd it goes to the
shim's log besides. At `MAX_BYTES` the file becomes ``engine.log.1``, in place of an older one.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time

from kata.agent.text import escape_line
from kata.metrics.histogram import Durations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

FORMATS = ("text", "logfmt", "json")
LEVELS = ("debug", "info", "warning")
"""From the most that can be shown to the least."""
MAX_BYTES = 8 << 20
_LOOK_BYTES = 1 << 18
ENGINE, CONSOLE, AGENT = "engine", "console", "agent"
"""Sources of lines; the latter two are the guest's, whose lines nobody should take for the engine's."""
_MAX_LINE = 2048
_MAX_PENDING = 1 << 14
_AGENT_LINE = b'{"'  # the agent's lines on the console are JSON; others' are not


class EngineLog:
    """Writes the log of one sandbox.

    Args:
        sandbox_id: Its id, which is in each line of logfmt and JSON.
        fifo: Where containerd looks for a shim's log; empty for none.

    Attributes:
        form: One of `FORMATS`.
        level: One of `LEVELS`: what is less than that is left out.
        observers: Are called whenever it changes whether debug lines are shown, with that.
    """

    __slots__ = ("_fifo", "_id", "_rank", "_unlooked", "form", "level", "observers")

    def __init__(self, sandbox_id: str, fifo: str = "") -> None:
        self._id = sandbox_id
        self._fifo = _open_fifo(fifo)
        self._unlooked = 0
        self._rank = 1
        self.form = FORMATS[0]
        self.level = "info"
        self.observers: list[Callable[[bool], None]] = []

    @property
    def debugs(self) -> bool:
        """Whether debug lines are shown."""
        return self._rank == 0

    def set_level(self, level: str) -> None:
        """Show lines of this level and above from now on.

        Raises:
            ValueError: It is none of `LEVELS`.
        """
        debugged = self.debugs
        self._rank = LEVELS.index(level)
        self.level = level
        if self.debugs != debugged:
            for observer in self.observers:
                observer(self.debugs)

    def write(self, text: str, level: str = "warning", source: str = ENGINE, **members: Any) -> None:
        """Write a line.

        Args:
            text: What there is to say; what is the guest's in it has been escaped.
            level: One of `LEVELS`.
            source: `ENGINE`, `CONSOLE` or `AGENT`.
            members: Further ones, for logfmt and JSON; None and empty texts are left out. Where lines are for people
                they stand behind the text.
        """
        if LEVELS.index(level) < self._rank:
            return
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        known = {name: value for name, value in members.items() if value not in (None, "")}
        if self.form == "text":
            marks = ("debug: " if level == "debug" else "") + (f"{source}: " if source != ENGINE else "")
            known.pop("event", None)  # it is the text
            if why := known.pop("error", ""):
                text = f"{text}: {why}"
            behind = "".join(f" {name}={logfmt_value(value)}" for name, value in known.items())
            line = f"{marks}{text}{behind}"
            own = f"{stamp} {line}\n"
            shim = f"{stamp} kata {self._id}: {line}\n"
        else:
            # The names are those of the original's logs, where they mean the same.
            known = {
                "time": stamp,
                "level": level,
                "sandbox": self._id,
                "source": source,
                "msg": text,
            } | known
            if self.form == "json":
                own = shim = json.dumps(known, separators=(",", ":"), default=str) + "\n"
            else:
                own = shim = (
                    " ".join(f"{name}={logfmt_value(value)}" for name, value in known.items()) + "\n"
                )
        with contextlib.suppress(OSError):  # the disk is full: nothing fails for want of a line
            sys.stderr.write(own)
            sys.stderr.flush()
        self._unlooked += len(own)
        if self._unlooked > _LOOK_BYTES:
            self._unlooked = 0
            _turn_over()
        if self._fifo >= 0:
            try:
                os.write(self._fifo, shim.encode("utf-8", "backslashreplace"))
            except OSError:
                pass  # full, or nobody reads: the engine does not wait for a reader, and our own log has it


def logfmt_value(value: object) -> str:
    """A value as logfmt has it: in quotation marks, escaped, where it is not one plain word."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if text and text.isascii() and text.isprintable() and not set(text) & set(' ="\\'):
        return text
    return json.dumps(text)


def _open_fifo(path: str) -> int:
    """Where containerd looks for a shim's log; -1 when there is none, or no reader."""
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC) if path else -1
    except OSError:
        return -1


def _turn_over() -> None:
    """Begin a new file when standard error is one that has become too long."""
    try:
        status = os.fstat(2)
        path = os.readlink("/proc/self/fd/2")
        if status.st_size < MAX_BYTES or not path.endswith(".log"):
            return
        os.rename(path, f"{path}.1")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        os.dup2(fd, 2)
        os.close(fd)
    except OSError:
        pass  # it stays as long as it is


class LoggedDurations(Durations):
    """Durations of calls, of which each is a line in the log at level debug.

    Args:
        log: Where to.
        whom: Who answers the calls, for the line.
    """

    __slots__ = ("_log", "_whom")

    def __init__(self, log: EngineLog, whom: str) -> None:
        super().__init__()
        self._log = log
        self._whom = whom

    def add(self, name: str, duration_ns: int) -> None:
        """See `Durations.add`."""
        super().add(name, duration_ns)
        if self._log.debugs:
            call = escape_line(name, 64)
            ms = round(duration_ns / 1e6, 3)
            self._log.write(f"{self._whom} answered {call}", "debug", call=call, ms=ms)


class GuestLines:
    """Writes what the guest says on its console, line by line.

    Args:
        log: Where to.
    """

    __slots__ = ("_log", "_rest")

    def __init__(self, log: EngineLog) -> None:
        self._log = log
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take bytes in. A line that does not end is cut."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_PENDING:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            if text := line.strip():
                source = AGENT if text.startswith(_AGENT_LINE) else CONSOLE
                shown = escape_line(text[: 2 * _MAX_LINE].decode("utf-8", "replace"), _MAX_LINE)
                self._log.write(shown, "debug", source)

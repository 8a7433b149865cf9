"""What happened to the sandboxes of this node: one JSON object a line in ``$KATA_RUN_DIR/events.jsonl``.

Every engine appends to it, so there is no daemon to keep it. A line is written by one write(2) with O_APPEND, so lines
of several engines do not mix. At `MAX_BYTES` the file becomes ``events.jsonl.1`` in place of the one before, so both
together are bounded. docs/observability.md lists the events and their members.

Imported by engines: `json` only for reading.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from kata import journal, paths, sysio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

FILE_NAME = "events.jsonl"
MAX_BYTES = 1 << 20
MAX_LINE = 4000
MAX_TEXT = 512
"""Maximum length of a text in an event: it may be the guest's."""
_MAX_PENDING = 1 << 16


def path() -> str:
    """Where the events are."""
    return os.path.join(paths.run_dir(), FILE_NAME)


def stamp(at_ns: int) -> str:
    """A time (nanoseconds of the epoch) as RFC 3339 has it, with all nine digits."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(at_ns // 10**9))}.{at_ns % 10**9:09d}Z"


def _bounded(value: Any, most: int) -> Any:
    return f"{value[: most - 1]}\u2026" if isinstance(value, str) and len(value) > most else value


def line(event: str, members: dict[str, Any]) -> str:
    """An event as it is written, without its line end: at most `MAX_LINE` bytes.

    Args:
        event: What has happened: ``container.started``.
        members: What else is known, as values of JSON; empty and absent ones are left out. Long texts are cut, and of
            too many members the last ones are left out.
    """
    content: dict[str, Any] = {"time": stamp(time.time_ns()), "event": event}
    known = {name: value for name, value in members.items() if value not in (None, "")}
    written = ""
    for most in (MAX_TEXT, 128, 32):  # in bytes, a character may take 12
        content |= {name: _bounded(value, most) for name, value in known.items()}
        written = journal.dumps(content)
        if len(written) <= MAX_LINE:
            return written
    while len(written) > MAX_LINE:
        content.popitem()
        written = journal.dumps(content)
    return written


def append(event: str, members: dict[str, Any], run_dir: str = "") -> None:
    """Write an event.

    Args:
        event: See `line`.
        members: See `line`.
        run_dir: The directory of the events, for an engine that was given one; otherwise ``$KATA_RUN_DIR``.

    Raises:
        OSError: It could not be written: the disk is full, or may not be written.
    """
    data = f"{line(event, members)}\n".encode()
    target = os.path.join(run_dir, FILE_NAME) if run_dir else path()
    fd = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        written = os.write(fd, data)
        if written < len(
            data
        ):  # the disk became full in the middle: end the torn line, so that the next is whole
            os.write(fd, b"\n")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)
        if os.fstat(fd).st_size > MAX_BYTES:
            _turn_over(fd, target)
    finally:
        os.close(fd)


def engine_was_killed(directory: str) -> None:
    """Write the end of a sandbox whose engine could not: called by whoever has undone its journal.

    Args:
        directory: The sandbox's directory, which need not be there any more.
    """
    try:
        append(
            "sandbox.ended",
            {"sandbox": os.path.basename(directory), "error": "its engine was killed"},
            os.path.dirname(os.path.dirname(directory)),
        )
    except OSError:
        pass  # nothing that is cleared up fails for want of its record


def _turn_over(fd: int, target: str) -> None:
    """Begin a new file, unless somebody else just has."""
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        here, there = os.fstat(fd), os.stat(target)
    except FileNotFoundError:
        return
    if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
        os.rename(target, f"{target}.1")


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """An event, or None for a line that is none (torn by a full disk)."""
    import json

    try:
        found = json.loads(raw)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "event" in found and "time" in found else None


def _lines(file: str) -> list[bytes]:
    try:
        with open(file, "rb") as opened:
            return opened.read(2 * MAX_BYTES).split(b"\n")
    except FileNotFoundError:
        return []


def read(limit: int | None = None) -> list[dict[str, Any]]:
    """The events that are kept, oldest first.

    Args:
        limit: How many of the newest to return; None for all.

    Raises:
        OSError: They cannot be read.
    """
    target = path()
    raw = [one for file in (f"{target}.1", target) for one in _lines(file) if one]
    if limit is not None:
        raw = raw[-limit:] if limit > 0 else []
    return [event for event in map(_parsed, raw) if event is not None]


class Follower:
    """Reads events as they are written, across turn-overs.

    Args:
        from_start: Begin with the events that are kept; otherwise with the next one.

    Attributes:
        fd: A descriptor that becomes readable when there may be something new (inotify); for `select` and event loops.
    """

    def __init__(self, *, from_start: bool = False) -> None:
        self._path = path()
        directory = os.path.dirname(self._path)
        paths.make_dirs(directory, 0o711)
        self.fd = sysio.inotify_init()
        try:
            changed = sysio.IN_CREATE | sysio.IN_MODIFY | sysio.IN_MOVED_TO
            sysio.inotify_add_watch(self.fd, directory, changed)
        except OSError:
            os.close(self.fd)
            raise
        self._rest = b""
        self._ready: list[dict[str, Any]] = []
        self._file: int | None = None
        if from_start:
            self._take(b"\n".join(_lines(f"{self._path}.1")) + b"\n")
        self._open()
        if self._file is not None and not from_start:
            os.lseek(self._file, 0, os.SEEK_END)

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the descriptors back. Idempotent."""
        for fd in (self.fd, self._file):
            if fd is not None and fd >= 0:
                os.close(fd)
        self.fd, self._file = -1, None

    def _open(self) -> None:
        try:
            self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            self._file = None

    def _take(self, data: bytes) -> None:
        *whole, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-_MAX_PENDING:]
        self._ready += [event for event in map(_parsed, filter(None, whole)) if event is not None]

    def poll(self) -> list[dict[str, Any]]:
        """What is new. Does not block."""
        sysio.inotify_read(self.fd)
        while True:
            while self._file is not None and (data := os.read(self._file, 1 << 16)):
                self._take(data)
            if self._is_current():
                break
            if self._file is not None:
                # Whoever had opened the old file before its renaming may have written since.
                while data := os.read(self._file, 1 << 16):
                    self._take(data)
                os.close(self._file)
            self._rest = b""
            self._open()
            if self._file is None:
                break
        found, self._ready = self._ready, []
        return found

    def _is_current(self) -> bool:
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return True  # turned over, and nothing written since
        if self._file is None:
            return False
        here = os.fstat(self._file)
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until there may be something new; False when the time (seconds) is up."""
        import select

        return bool(select.select([self.fd], [], [], timeout_s)[0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Events for ever."""
        while True:
            yield from self.poll()
            self.wait()

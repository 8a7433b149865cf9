"""What happened to the sandboxes of this node: one JSON object a line in ``$KATA_RUN_DIR/events.jsonl``.

Every engine appends to it, so there is no daemon to keep it. A line is written by one write(2) with O_APPEND, so lines
of several engines do not mix. At `MAX_BYTES` the file becomes ``events.jsonl.1`` in place of the one before, so both
together are bounded. docs/observability.md lists the events and their members.

Imported by engines, and by whoever clears up after them: `json` is not imported before it is used.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from kata import paths
from kata.json_text import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

FILE_NAME = "events.jsonl"
MAX_BYTES = 1 << 20
MAX_LINE = 4000
MAX_TEXT = 512
"""Maximum length of a text in an event: it may be the guest's."""
LATE_S = 5.0
"""How long a follower reads a file that was turned over: an engine may have opened it just before, in seconds."""
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
        written = dumps(content)
        if len(written) <= MAX_LINE:
            return written
    while len(written) > MAX_LINE:
        content.popitem()
        written = dumps(content)
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
        if written < len(data):
            # The disk became full in the middle; readers pass over what there is of the line.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)
        if os.fstat(fd).st_size > MAX_BYTES:
            _turn_over(fd, target)
    finally:
        os.close(fd)


def engine_was_killed(directory: str, meta: dict[str, Any]) -> None:
    """Write the end of a sandbox whose engine could not: called by whoever has undone its journal.

    Args:
        directory: The sandbox's directory, which is not there any more.
        meta: What the journal said of it: id, client, namespace.
    """
    known = {"sandbox": meta.get("id"), "client": meta.get("client"), "namespace": meta.get("namespace")}
    try:
        append(
            "sandbox.ended",
            known | {"error": "its engine was killed"},
            os.path.dirname(os.path.dirname(directory)),
        )
    except OSError:
        pass  # nothing that is cleared up fails for want of its record


def _turn_over(fd: int, target: str) -> None:
    """Begin a new file, unless somebody else does or just has."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no engine waits for another
        here, there = os.fstat(fd), os.stat(target)
    except (BlockingIOError, FileNotFoundError):
        return
    if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
        os.rename(target, f"{target}.1")


_START = b'{"time":"'
"""How each line begins; inside of one this cannot be, since quotation marks in texts are escaped."""


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """An event, or None for a line that is none; what a full disk has left of another before it is passed over."""
    import json

    start = raw.rfind(_START)
    try:
        found = json.loads(raw[start:]) if start >= 0 else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "event" in found and "time" in found else None


class _File:
    """A file that is being read."""

    __slots__ = ("_rest", "fd", "identity", "until")

    def __init__(self, fd: int) -> None:
        status = os.fstat(fd)
        self.fd = fd
        self.identity = (status.st_dev, status.st_ino)
        self.until: float | None = None  # for one that was turned over: CLOCK_MONOTONIC
        self._rest = b""

    @staticmethod
    def open(path: str) -> _File | None:
        try:
            return _File(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
        except FileNotFoundError:
            return None

    @staticmethod
    def open_both(target: str) -> list[_File]:
        """The files there are, the older first: never the same twice, whenever they are turned over."""
        while True:
            newer, older = _File.open(target), _File.open(f"{target}.1")
            if newer is None or older is None or newer.identity != older.identity:
                return [one for one in (older, newer) if one is not None]
            os.close(newer.fd)
            os.close(older.fd)

    def news(self) -> list[dict[str, Any]]:
        """The events that were written since the last call."""
        found = []
        while data := os.read(self.fd, 1 << 16):
            *whole, self._rest = (self._rest + data).split(b"\n")
            self._rest = self._rest[-_MAX_PENDING:]
            found += [event for one in whole if (event := _parsed(one)) is not None]
        return found


def _news(files: list[_File]) -> list[dict[str, Any]]:
    """What is new in files that are in their order.

    The newer is read first. An engine that has written to it writes to no older one any more, so whatever it wrote
    before is read after.
    """
    found: list[dict[str, Any]] = []
    for file in reversed(files):
        found = [*file.news(), *found]
    return found


def read(limit: int | None = None) -> list[dict[str, Any]]:
    """The events that are kept, oldest first.

    Args:
        limit: How many of the newest to return; None for all.

    Raises:
        OSError: They cannot be read.
    """
    files = _File.open_both(path())
    try:
        found = _news(files)
    finally:
        for file in files:
            os.close(file.fd)
    return found if limit is None else found[max(0, len(found) - limit) :]


class Follower:
    """Reads events as they are written, across turn-overs.

    Args:
        from_start: Begin with the events that are kept; otherwise with the next one.

    Attributes:
        fd: A descriptor that becomes readable when there may be something new (inotify); for `select` and event loops.
    """

    def __init__(self, *, from_start: bool = False) -> None:
        from kata import inotify  # who writes events does without

        self._inotify = inotify
        self._path = path()
        self._files: list[_File] = []
        directory = os.path.dirname(self._path)
        paths.make_dirs(directory, 0o711)
        self.fd = inotify.init()
        try:
            changed = inotify.IN_CREATE | inotify.IN_MODIFY | inotify.IN_MOVED_TO
            inotify.add_watch(self.fd, directory, changed)
            self._files = _File.open_both(self._path)
            if not from_start:
                for file in self._files:
                    os.lseek(file.fd, 0, os.SEEK_END)
        except OSError:
            self.close()
            raise

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the descriptors back. Idempotent."""
        for file in self._files:
            os.close(file.fd)
        self._files = []
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def poll(self) -> list[dict[str, Any]]:
        """What is new. Does not block."""
        while self._inotify.read(self.fd):
            pass
        found = _news(self._files)
        while self._begin_next():
            found += _news(self._files)
        now = time.monotonic()
        for file in [one for one in self._files if one.until is not None and one.until < now]:
            os.close(file.fd)
            self._files.remove(file)
        return found

    def _begin_next(self) -> bool:
        """Open the file if it is none of those that are read. Returns whether it is another."""
        new = _File.open(self._path)
        if new is None:
            return False
        if any(one.identity == new.identity for one in self._files):
            os.close(new.fd)
            return False
        for file in self._files:
            if file.until is None:
                file.until = time.monotonic() + LATE_S
        self._files.append(new)
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until there may be something new; False when the time (seconds) is up."""
        import select

        return bool(select.select([self.fd], [], [], timeout_s)[0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Events for ever."""
        while True:
            yield from self.poll()
            self.wait()

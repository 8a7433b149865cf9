"""A container's log: JSON lines, rotated, bounded.

A record is ``{"time": RFC3339 with nanoseconds, "stream": "stdout"|"stderr", "log": text}``; output that is
not UTF-8 is kept exactly as ``"log64"`` (base64) instead. A record holds what was read in one piece, up to
64 KiB, and may hold several lines or a part of one: readers split, so that a container that writes much
costs little.

``path`` is the newest file; ``path.1`` is older, and so on. Together they take at most ``files *
max_bytes``.
"""

from __future__ import annotations

import os
import time
from binascii import b2a_base64
from json.encoder import encode_basestring

from kata.engine.containers.records import rfc3339
from kata.sysio import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

RECORD_BYTES = 64 * 1024
DEFAULT_MAX_BYTES = 10 * 1024 * 1024
DEFAULT_FILES = 3


def _incomplete_tail(data: bytes) -> int:
    """How many bytes at the end of *data* start a UTF-8 character that has not arrived in full (0 to 3)."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:  # a continuation: look further back for the first byte
            continue
        length = 2 if byte & 0xE0 == 0xC0 else 3 if byte & 0xF0 == 0xE0 else 4 if byte & 0xF8 == 0xF0 else 1
        return back if length > back else 0
    return 0


class LogFile:
    """Writes a container's log. Not thread safe: one call at a time, on whatever thread.

    A log that cannot be written (disk full) never hurts the container: records are dropped until writing
    works again, and the gap is told in the log itself and once to *log*.

    Args:
        path: The newest file.
        max_bytes: Size at which a file is rotated.
        files: How many files are kept, the newest included.
        log: Is given a sentence when writing starts to fail.
    """

    __slots__ = ("_file", "_files", "_held", "_log", "_lost", "_max", "_path", "_size")

    def __init__(
        self,
        path: str,
        max_bytes: int = DEFAULT_MAX_BYTES,
        files: int = DEFAULT_FILES,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._path = path
        self._max = max(max_bytes, 1)
        self._files = max(files, 1)
        self._log = log
        self._file: Fd | None = None
        self._size = 0
        self._lost = 0
        self._held: dict[str, bytes] = {}

    def write(self, stream: str, data: bytes, *, last: bool = False) -> None:
        """Append *data* of *stream* (``stdout`` or ``stderr``); *last* at its end of file. Never raises
        `OSError`.
        """
        held = self._held.pop(stream, b"")
        if held:
            data = held + data
        lines: list[bytes] = []
        now = rfc3339(time.time_ns())
        for start in range(0, len(data), RECORD_BYTES):
            piece = data[start : start + RECORD_BYTES]
            if held and start:
                piece = held + piece
            held = b""
            is_last = last and start + RECORD_BYTES >= len(data)
            tail = 0 if is_last else _incomplete_tail(piece)
            if tail:
                piece, held = piece[:-tail], piece[-tail:]
            if piece:
                lines.append(self._record(now, stream, piece))
        if held:
            self._held[stream] = held
        for line in lines:
            self._append(line, now)

    @staticmethod
    def _record(now: str, stream: str, piece: bytes) -> bytes:
        try:
            text = encode_basestring(piece.decode("utf-8"))
        except UnicodeDecodeError:
            encoded = b2a_base64(piece, newline=False).decode("ascii")
            return f'{{"time":"{now}","stream":"{stream}","log64":"{encoded}"}}\n'.encode()
        return f'{{"time":"{now}","stream":"{stream}","log":{text}}}\n'.encode()

    def _append(self, line: bytes, now: str) -> None:
        try:
            if self._file is None:
                self._open()
            if self._size and self._size + len(line) > self._max:
                self._rotate()
            if self._lost:
                note = f"[{self._lost} bytes of output were lost: the log could not be written]"
                self._put(f'{{"time":"{now}","stream":"engine","log":"{note}"}}\n'.encode())
                self._lost = 0
            self._put(line)
        except OSError as error:
            if not self._lost and self._log:
                self._log(f"cannot write the log {self._path}: {error.strerror}")
            self._lost += len(line)

    def _put(self, line: bytes) -> None:
        assert self._file is not None
        start, fd = self._size, self._file.raw
        view = memoryview(line)
        try:
            while view:
                written = os.write(fd, view)
                self._size += written
                view = view[written:]
        except OSError:
            # Half a record would spoil the file for every reader.
            if self._size != start:
                os.ftruncate(fd, start)
                self._size = start
            raise

    def _open(self) -> None:
        self._file = Fd(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600))
        self._size = os.fstat(self._file.raw).st_size

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rotate(self) -> None:
        self._close_file()
        for number in range(self._files - 1, 0, -1):
            older = self._path if number == 1 else f"{self._path}.{number - 1}"
            try:
                os.rename(older, f"{self._path}.{number}")
            except FileNotFoundError:
                pass
        if self._files == 1:
            os.unlink(self._path)
        self._open()

    def close(self) -> None:
        """Write what is held back of unfinished characters, and close. Safe to call twice."""
        for stream in list(self._held):
            self.write(stream, b"", last=True)
        self._close_file()

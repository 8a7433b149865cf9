"""The guest's console: the newest megabyte, on disk and in memory, whatever the guest writes."""

from __future__ import annotations

import os

from kata.sysio import Fd

LIMIT = 1 << 20


class ConsoleRing:
    """Keeps the end of a byte stream.

    The bytes go to ``path``; when that holds half the limit it becomes ``path.1`` (in place of an older one)
    and a new one is begun, so at most `limit` bytes are kept, and at least the newest half of that. If the
    disk is full the memory still has them.

    Args:
        path: The file, or empty for memory only.
        limit: Bytes to keep at most.
    """

    def __init__(self, path: str, limit: int = LIMIT) -> None:
        self._path = path
        self._half = limit // 2
        self._older = b""
        self._newer = bytearray()
        self._file: Fd | None = None

    def feed(self, data: bytes) -> None:
        """Take bytes in."""
        while data:
            room = self._half - len(self._newer)
            part, data = data[:room], data[room:]
            self._newer += part
            self._write(part)
            if len(self._newer) == self._half:
                self._older = bytes(self._newer)
                self._newer.clear()
                self._rotate()

    def tail(self, limit: int = 4096, lines: int = 20) -> str:
        """The last lines as text that is safe to print: at most `limit` bytes and `lines` lines, escaped."""
        data = (self._older + bytes(self._newer))[-limit:]
        text = data.decode("utf-8", "replace").replace("\r\n", "\n").removesuffix("\n").split("\n")[-lines:]
        return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in text)

    def move(self, path: str) -> None:
        """Have the file elsewhere on its file system from now on."""
        if self._path:
            for end in ("", ".1"):
                try:
                    os.rename(self._path + end, path + end)
                except FileNotFoundError:
                    pass  # nothing was said yet
        self._path = path

    def close(self) -> None:
        """Close the file; what is in memory stays."""
        self._close_file()
        self._path = ""

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, data: bytes) -> None:
        if not self._path:
            return
        try:
            if self._file is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
                self._file = Fd(os.open(self._path, flags, 0o600))
            os.write(self._file.raw, data)
        except OSError:
            self.close()

    def _rotate(self) -> None:
        if self._file is not None:
            self._close_file()
            try:
                os.replace(self._path, self._path + ".1")
            except OSError:
                self.close()

"""A program in a terminal of its own (a pty), and what it shows there, as pyte emulates it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pyte

KATA = [sys.executable, str(Path(__file__).resolve().parents[2] / "src/kata/__main__.py")]
PATIENCE_S = 60.0


class Terminal:
    """A terminal with a program in it.

    Args:
        argv: The program.
        environment: Its variables, beside ours.
        columns: The terminal's width.
        rows: Its height.
    """

    def __init__(
        self, argv: list[str], environment: Mapping[str, str], columns: int = 120, rows: int = 24
    ) -> None:
        self.screen = pyte.Screen(columns, rows)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.master, self.slave = pty.openpty()
        self._set_size(columns, rows)
        self.mode = termios.tcgetattr(self.slave)
        self.status: int | None = None
        self._changes, changes = os.pipe()
        quits, self._quits = os.pipe()
        variables = {**os.environ, "TERM": "xterm-256color", **environment}
        self._leader = os.fork()
        if self._leader == 0:
            try:
                os.close(self._quits)
                self._lead(argv, variables, changes)
                os.read(quits, 1)  # with the leader of its session the terminal would end
            finally:
                os._exit(0)
        os.close(changes)
        os.close(quits)
        self.pid = self.change()

    def _lead(self, argv: list[str], variables: Mapping[str, str], changes: int) -> None:
        """What a shell does: the program is a job in the foreground, and can be stopped."""
        os.setsid()
        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTSTP):
            signal.signal(number, signal.SIG_IGN)
        child = os.fork()
        if child == 0:
            try:
                os.setpgid(0, 0)
                os.tcsetpgrp(self.slave, os.getpid())
                for number in (signal.SIGTTOU, signal.SIGHUP, signal.SIGINT, signal.SIGTSTP):
                    signal.signal(number, signal.SIG_DFL)
                for fd in range(3):
                    os.dup2(self.slave, fd)
                os.execve(argv[0], argv, variables)
            finally:
                os._exit(127)
        os.write(changes, struct.pack("i", child))
        while True:
            _, status = os.waitpid(child, os.WUNTRACED)
            os.write(changes, struct.pack("i", status))
            if not os.WIFSTOPPED(status):
                return

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize(self, columns: int, rows: int) -> None:
        """Make it larger or smaller, as a user would."""
        self.screen.resize(rows, columns)
        self._set_size(columns, rows)  # SIGWINCH goes to whoever is in its foreground

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read(self, timeout_s: float) -> bool:
        if not select.select([self.master], [], [], timeout_s)[0]:
            return False
        data = os.read(self.master, 1 << 16)
        self.raw += data
        self.stream.feed(data)
        return bool(data)

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Read until it is so."""
        give_up = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < give_up, self.text()
            self.read(0.1)

    def wait_for(self, *words: str) -> str:
        """Read until all of these are shown."""
        self.wait(lambda: all(word in self.text() for word in words))
        return self.text()

    def line_of(self, word: str) -> int:
        """The first line with a word; the number of lines where there is none."""
        return next(
            (number for number, line in enumerate(self.screen.display) if word in line), self.screen.lines
        )

    def change(self) -> int:
        """Read until the program has ended or was stopped. Returns its status, as of waitpid."""
        give_up = time.monotonic() + PATIENCE_S
        while not select.select([self._changes], [], [], 0)[0]:
            assert time.monotonic() < give_up, self.text()
            self.read(0.05)
        while self.read(0.0):
            pass
        found: int = struct.unpack("i", os.read(self._changes, 4))[0]
        return found

    def end(self) -> int:
        """The status with which the program ends, as of waitpid."""
        self.status = self.change()
        return self.status

    def close(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
        os.write(self._quits, b"q")
        os.waitpid(self._leader, 0)
        for fd in (self._changes, self._quits, self.master, self.slave):
            os.close(fd)

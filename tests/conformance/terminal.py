"""A client on a terminal of its own, that is typed to and read from."""

from __future__ import annotations

import os
import select
import subprocess
import termios
import time
from types import TracebackType
from typing import Self

PATIENCE_S = 120.0


class Terminal:
    """A command whose input and output are one terminal. A context manager, which ends it if it still runs.

    Args:
        command: Its argument vector.
        env: Its environment.

    Attributes:
        said: What it has printed so far.
    """

    def __init__(self, command: list[str], env: dict[str, str] | None = None) -> None:
        self._fd, theirs = os.openpty()
        try:
            termios.tcsetwinsize(theirs, (24, 200))
            self._process = subprocess.Popen(
                command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
            )
        finally:
            os.close(theirs)
        self.said = ""

    def _read(self, deadline: float, what: str) -> bool:
        """Read on; False at the end.

        Raises:
            AssertionError: Nothing came before the deadline.
        """
        ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"on a terminal there was no {what}: {self.said[-300:]!r}"
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # EIO: nobody has its other end any more
            data = b""
        self.said += data.decode(errors="replace")
        return bool(data)

    def expect(self, text: str) -> None:
        """Return when it has printed a text.

        Raises:
            AssertionError: It has not, or has ended before.
        """
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.said:
            assert self._read(deadline, repr(text)), f"it ended without {text!r}: {self.said[-300:]!r}"

    def typed(self, text: str) -> None:
        """It is typed a text."""
        os.write(self._fd, text.encode())

    def ended(self) -> int:
        """Return when it has ended; its exit status.

        Raises:
            AssertionError: It goes on.
        """
        deadline = time.monotonic() + PATIENCE_S
        while self._read(deadline, "end"):
            pass
        return self._process.wait(PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._fd)

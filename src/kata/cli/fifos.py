"""The named pipes between a command and the engine of the process whose standard streams it passes on."""

from __future__ import annotations

import os

from kata import paths
from kata.suppress import suppress
from kata.sysio import Fd

_PIPE_SIZE = 1 << 20


class Fifos:
    """The named pipes of one process, created in *directory* and opened at this end.

    The reading ends are opened before the engine learns the names, so that it never blocks in opening them.

    Args:
        directory: A directory that is removed with the sandbox.
        prefix: File name prefix, unique among the processes of the sandbox.
        stdin: Whether to forward standard input.
        terminal: Whether the process has a terminal, which has only one output stream.
    """

    def __init__(self, directory: str, prefix: str, *, stdin: bool, terminal: bool) -> None:
        self.stdin = self.stdout = self.stderr = ""
        self.stdin_end: Fd | None = None
        self.stderr_end: Fd | None = None
        paths.make_dirs(directory, 0o700)
        if stdin:
            self.stdin = self._make(directory, prefix, "stdin")
        self.stdout = self._make(directory, prefix, "stdout")
        self.stdout_end = self._open_output(self.stdout)
        if not terminal:
            self.stderr = self._make(directory, prefix, "stderr")
            self.stderr_end = self._open_output(self.stderr)

    @classmethod
    def of_sandbox(cls, container_id: str, prefix: str, *, stdin: bool, terminal: bool) -> Fifos:
        """Those of a process of the `kata` command, in a directory of its sandbox; see the class."""
        directory = os.path.join(paths.sandbox_dir(container_id), "io")
        return cls(directory, prefix, stdin=stdin, terminal=terminal)

    @staticmethod
    def _make(directory: str, prefix: str, name: str) -> str:
        path = os.path.join(directory, f"{prefix}-{name}")
        os.mkfifo(path, 0o600)
        return path

    @staticmethod
    def _open_output(path: str) -> Fd:
        return Fd(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))

    def _ends(self) -> list[Fd]:
        return [end for end in (self.stdin_end, self.stdout_end, self.stderr_end) if end is not None]

    def connected(self) -> None:
        """Open the writing end of stdin and remove the names; to be called when the engine has opened its ends."""
        if self.stdin:
            # The engine has opened it for reading, so this does not block; otherwise it would fail with ENXIO.
            with suppress(OSError):
                self.stdin_end = Fd(os.open(self.stdin, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        for end in self._ends():
            _grow(end)
        self.unlink()

    def unlink(self) -> None:
        """Remove the names; the open ends go on working."""
        for path in (self.stdin, self.stdout, self.stderr):
            if path:
                with suppress(FileNotFoundError):
                    os.unlink(path)

    def close(self) -> None:
        self.unlink()
        for end in self._ends():
            end.close()


def _grow(end: Fd) -> None:
    """Enlarge a pipe. If that is refused (a limit, an old kernel), the pipe is only slower."""
    import fcntl

    with suppress(OSError):
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)

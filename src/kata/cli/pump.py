"""Moves bytes between this command's standard streams and a container's fifos.

One thread with a poll loop copies standard input to the container's stdin fifo, and the output fifos to standard output
and error, until the caller reports that the process has ended *and* both output fifos have reached end of file. The
engine reports an exit only after it has written all output to the fifos, so nothing is cut off.

Our own standard streams stay in blocking mode: O_NONBLOCK is a property of the open file, which we share with the shell
and other processes.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # `signal` makes enumerations, for 3 ms
import errno
import os
import select
import sys

from kata.errors import UsageError
from kata.suppress import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kata.cli.fifos import Fifos

_CHUNK = 1 << 18


class Detached(Exception):
    """The user typed the detach keys."""


def detach_keys(text: str | None) -> bytes:
    """What ``--detach-keys`` says; None for the usual keys.

    Raises:
        UsageError: That is no key.
    """
    try:
        return parse_detach_keys("ctrl-p,ctrl-q" if text is None else text)
    except ValueError as error:
        raise UsageError(
            f"--detach-keys: {error} is not a key", "e.g. ctrl-p,ctrl-q, or one character"
        ) from None


def passes_signals(text: str | None) -> bool:
    """What ``--sig-proxy`` says; None for the usual: yes.

    Raises:
        UsageError: It is no truth value.
    """
    if text not in (None, "true", "1", "false", "0"):
        raise UsageError(f"--sig-proxy {text!r} is neither true nor false", "--sig-proxy=false")
    return text not in ("false", "0")


def parse_detach_keys(text: str) -> bytes:
    r"""Turn ``ctrl-p,ctrl-q`` into the bytes a terminal sends for it; empty text means no detach keys.

    Raises:
        ValueError: A key is neither one character nor ``ctrl-`` and a letter or one of ``@[\]^_``.
    """
    out = bytearray()
    for key in text.split(",") if text else []:
        if len(key) == 1 and key.isascii():
            out.append(ord(key))
        elif key.startswith("ctrl-") and len(key) == 6 and 0x40 <= ord(key[5].upper()) < 0x60:
            out.append(ord(key[5].upper()) & 0x1F)
        else:
            raise ValueError(key)
    return bytes(out)


class OutputGone(Exception):
    """Our standard output or error cannot be written any more.

    Args:
        fd: 1 or 2.
        error: The error of writing to it; `BrokenPipeError` when its reader has gone.
    """

    def __init__(self, fd: int, error: OSError) -> None:
        super().__init__(fd, error)
        self.error = error
        self.name = "standard output" if fd == 1 else "standard error"

    @property
    def sentence(self) -> str:
        """The error, as a clause for a message."""
        if isinstance(self.error, BrokenPipeError):
            return f"the reader of {self.name} is gone"
        return f"{self.name} cannot be written: {self.error.strerror}"


class Pump:
    """Copies standard streams until the process has ended.

    Args:
        fifos: Connected pipes.
        wait_fds: One of them becomes readable when the process may have ended.
        ended: Whether it has ended; takes in what made one of *wait_fds* readable, and does not wait. It is asked after
            everything that has been done: what answered *close_stdin* may have brought this answer, too.
        close_stdin: Called once when our standard input ended and everything has been written to the fifo.
        detach_keys: Bytes that, typed on a terminal, end the connection; empty for none.
    """

    def __init__(
        self,
        fifos: Fifos,
        *,
        wait_fds: Sequence[int],
        ended: Callable[[], bool],
        close_stdin: Callable[[], None],
        detach_keys: bytes = b"",
    ) -> None:
        self._fifos = fifos
        self._wait_fds = frozenset(wait_fds)
        self._ended = ended
        self._close_stdin = close_stdin
        self._keys = detach_keys
        self._matched = 0
        self._pending = b""
        self._stdin = fifos.stdin_end
        self._outputs = {fifos.stdout_end.raw: 1}
        if fifos.stderr_end is not None:
            self._outputs[fifos.stderr_end.raw] = 2

    def run(self) -> None:
        """Copy until the process has ended and all of its output was written.

        Raises:
            Detached: The detach keys were typed.
            OutputGone: The output cannot be written any more.
        """
        poller = select.poll()
        for fd in (*self._wait_fds, *self._outputs):
            poller.register(fd, select.POLLIN)
        over = False
        watching: int | None = None
        while not over or self._outputs:
            to_watch = self._stdin_watch(over)
            if to_watch != watching:
                if watching is not None:
                    poller.unregister(watching)
                if to_watch is not None:
                    poller.register(to_watch, select.POLLOUT if self._pending else select.POLLIN)
                watching = to_watch
            for fd, events in poller.poll():
                if fd in self._outputs:
                    if not self._copy_output(fd, hung_up=bool(events & select.POLLHUP)):
                        poller.unregister(fd)
                        del self._outputs[fd]
                elif fd == watching:
                    self._copy_input()
            if not over and self._ended():
                over = True
                for fd in self._wait_fds:
                    poller.unregister(fd)

    def _stdin_watch(self, over: bool) -> int | None:
        """The descriptor to poll for standard input: the fifo while bytes are pending, otherwise fd 0."""
        if over or self._stdin is None:
            return None
        return self._stdin.raw if self._pending else 0

    def _copy_output(self, fd: int, *, hung_up: bool) -> bool:
        """Copy the available output. Returns false at end of file."""
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return not hung_up
        if not data:
            return False
        view = memoryview(data)
        target = self._outputs[fd]
        try:
            while view:
                try:
                    view = view[os.write(target, view) :]
                except BlockingIOError:
                    # Another process that shares the pipe or terminal has made it non-blocking, and it is full.
                    select.select([], [target], [])
        except OSError as error:
            raise OutputGone(target, error) from None
        return True

    def _copy_input(self) -> None:
        if self._stdin is None:
            return
        if not self._pending:
            try:
                data = os.read(0, _CHUNK)
            except OSError as error:
                # EIO: a background job's read of its terminal, or the terminal is gone.
                if error.errno not in (errno.EIO, errno.EBADF):
                    raise
                data = b""
            if not data:
                self._end_input()
                return
            self._pending = self._filter_keys(data)
        try:
            written = os.write(self._stdin.raw, self._pending)
        except BlockingIOError:
            return
        except BrokenPipeError:
            # The process closed its stdin, so pending bytes have no reader.
            self._pending = b""
            self._end_input()
            return
        self._pending = self._pending[written:]

    def _end_input(self) -> None:
        if self._stdin is not None:
            self._stdin.close()
            self._stdin = None
        self._close_stdin()

    def _filter_keys(self, data: bytes) -> bytes:
        """Look for the detach keys; bytes of an unfinished sequence are held back until it fails to match."""
        if not self._keys:
            return data
        out = bytearray()
        for byte in data:
            if byte == self._keys[self._matched]:
                self._matched += 1
                if self._matched == len(self._keys):
                    raise Detached
                continue
            out += self._keys[: self._matched]
            self._matched = 1 if byte == self._keys[0] else 0
            if not self._matched:
                out.append(byte)
        return bytes(out)


class RawTerminal:
    """A context manager that puts the terminal on fd 0 into raw mode.

    Args:
        resized: Called with (rows, columns) at the start and whenever the window's size changes.
    """

    def __init__(self, resized: Callable[[int, int], None]) -> None:
        self._resized = resized
        self._saved: list[object] | None = None
        self._old_handler: object = None

    def __enter__(self) -> RawTerminal:
        if os.isatty(0):
            import termios
            import tty

            self._saved = termios.tcgetattr(0)
            tty.setraw(0, termios.TCSANOW)
        self._old_handler = signal.signal(signal.SIGWINCH, lambda *_: self._report())
        self._report()
        return self

    def _report(self) -> None:
        for fd in (1, 0, 2):
            with suppress(OSError):
                size = os.get_terminal_size(fd)
                self._resized(size.lines, size.columns)
                return

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGWINCH, self._old_handler)
        if self._saved is not None:
            import termios

            termios.tcsetattr(0, termios.TCSADRAIN, self._saved)  # type: ignore[arg-type]
            sys.stdout.flush()

"""A terminal of the caller's for ``run`` and ``exec`` that wait: without a console socket, they are its other end.

As with runc, the caller's standard streams need not be a terminal for that: then what the process writes comes out
of its terminal all the same, and the end of standard input changes nothing.
"""

from __future__ import annotations

import os
import select

from kata import sysio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

_PIECE = 1 << 16
_REST_MS = 500
"""How long the last output of a process that has ended may be on its way, in milliseconds of silence."""


class Foreground:
    """A new terminal. As a context manager it closes what is left of it.

    Attributes:
        slave: The end for the process.
    """

    def __init__(self) -> None:
        import tty

        master, slave = os.openpty()
        self._master, self.slave = sysio.Fd(master), sysio.Fd(slave)
        tty.setraw(slave)  # the process's own is in the guest: this one carries bytes

    def __enter__(self) -> Foreground:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for end in (self._master, self.slave):
            if end.is_open:
                end.close()

    def copy(self, pid: int) -> None:
        """Copy between it and this process's standard streams until the process ends.

        Args:
            pid: That process, a child of this one, which has the slave.
        """
        from kata.cli.pump import RawTerminal

        self.slave.close()
        with sysio.Fd(sysio.pidfd_open(pid)) as process, RawTerminal(self._resize):
            poller = select.poll()
            for fd in (self._master.raw, process.raw, 0):
                poller.register(fd, select.POLLIN)
            ended = False
            while True:
                ready = dict(poller.poll(_REST_MS if ended else None))
                if process.raw in ready:
                    ended = True
                    poller.unregister(process.raw)
                if 0 in ready and not self._forward():
                    poller.unregister(0)
                if self._master.raw in ready:
                    if not self._output():
                        return
                elif ended and not ready:
                    return

    def _output(self) -> bool:
        try:
            piece = os.read(self._master.raw, _PIECE)
        except OSError:  # EIO: nobody has the other end any more
            return False
        while piece:
            piece = piece[os.write(1, piece) :]
        return True

    def _forward(self) -> bool:
        piece = os.read(0, _PIECE)
        rest = piece
        while rest:
            rest = rest[os.write(self._master.raw, rest) :]
        return bool(piece)

    def _resize(self, rows: int, columns: int) -> None:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(self._master.raw, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

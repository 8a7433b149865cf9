"""The process whose number ``create`` and ``exec`` give their caller; executed as a program of its own.

It stands for a container's init, or an exec, as `kata.engine.containers.host_process` describes: it hands its standard
streams to the engine, passes signals and its terminal's size on, and ends with the status that the engine tells it. It
kills itself when the engine has died, and when whoever started it is gone before it has let go of it: that command has
failed, and a monitor that waits for the end of the streams to say so (conmon) would wait for ever. Where it is to be
the child of a monitor, it kills itself when that has died, too: nobody would learn the status, and no client would have
the container deleted.

There is one for each container for as long as that runs, so it imports nothing but what is built into the interpreter:
this file is executed by its path, without the package.

Descriptors: 0 to 2 its streams, 3 a listening socket (SOCK_SEQPACKET), 4 the reading end of a pipe whose other end its
starter holds: `ADOPTED` comes there once this process has been adopted, `LET_GO` when its starter is done.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import posix
import select
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

LISTENER, LIFE = 3, 4
ADOPTED, LET_GO = b".", b"!"
SIGCHLD, SIGWINCH, SIGKILL, SIGSTOP = 17, 28, 9, 19
_OWN = frozenset({SIGKILL, SIGSTOP, SIGCHLD, 4, 7, 8, 11})
"""Not passed on: what cannot be caught, what is the kernel's word about this process itself."""
_POLLIN = select.POLLIN


def _catch() -> int:
    """Have signals written to a pipe, one byte for each. Returns its reading end."""
    reading, writing = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
    _signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in range(1, 65):
        if number not in _OWN:
            try:
                _signal.signal(number, _nothing)
            except (OSError, ValueError):
                pass  # the C library's own
    return reading


def _nothing(_number: int, _frame: object) -> None:
    """The number is in the pipe."""


class Watched:
    """Those without whom this process may not live: its monitor, and, until that lets go of it, its starter.

    Args:
        poller: They are registered there.
    """

    def __init__(self, poller: select.poll) -> None:
        self._poller = poller
        self._monitor = -1
        poller.register(LIFE, _POLLIN)

    def look(self, ready: dict[int, int]) -> None:
        """Look at what a poll has found. Ends this process if one of them has gone."""
        if self._monitor in ready:
            _die()
        if LIFE in ready:
            for number in posix.read(LIFE, 2) or b"\0":
                self._hear(bytes([number]))

    def _hear(self, word: bytes) -> None:
        if word == ADOPTED:
            self._monitor = _monitor()
            if self._monitor >= 0:
                self._poller.register(self._monitor, _POLLIN)
        elif word == LET_GO:
            self._poller.unregister(LIFE)
            posix.close(LIFE)
        else:
            _die()


def _connected(poller: select.poll, watched: Watched) -> _socket.socket:
    """Wait for the engine. Ends this process if there will be none."""
    poller.register(LISTENER, _POLLIN)
    while True:
        ready = dict(poller.poll())
        watched.look(ready)
        if LISTENER in ready:
            poller.unregister(LISTENER)
            listener = _socket.socket(fileno=LISTENER)
            number, _ = listener._accept()  # type: ignore[attr-defined]
            listener.close()
            return _socket.socket(fileno=number)


def _die() -> NoReturn:
    """End as one that was killed. The first process of a namespace cannot kill itself, pid_namespaces(7)."""
    posix.kill(posix.getpid(), SIGKILL)
    posix._exit(128 + SIGKILL)


def _monitor() -> int:
    """A descriptor that is readable once the process that has adopted this one has ended; -1 if that is the first one
    of all.
    """
    parent = posix.getppid()
    if parent <= 1:
        return -1
    try:
        monitor = posix.pidfd_open(parent, 0)
    except OSError:
        _die()
    if posix.getppid() != parent:  # it has just ended: the number may be another's
        _die()
    return monitor


def main(terminal: bool) -> None:
    """Be that process; does not return.

    Args:
        terminal: The standard streams are a terminal, which is the controlling one.
    """
    signals = _catch()
    poller = select.poll()
    watched = Watched(poller)
    channel = _connected(poller, watched)
    streams = b"".join(number.to_bytes(4, sys.byteorder) for number in range(3))
    channel.sendmsg([b"."], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)])
    kept = posix.dup(0) if terminal else -1  # its size can be asked for as long as it is open
    null = posix.open("/dev/null", posix.O_RDWR)
    for number in range(3):
        posix.dup2(null, number)
    posix.close(null)
    if terminal:
        _send_size(channel, kept)
    poller.register(channel.fileno(), _POLLIN)
    poller.register(signals, _POLLIN)
    while True:
        ready = dict(poller.poll())
        if signals in ready:
            _pass_on(channel, signals, kept)
        if channel.fileno() in ready:
            try:
                status = channel.recv(1)
            except OSError:
                status = b""
            if status:
                posix._exit(status[0])
            _die()
        watched.look(ready)


def _pass_on(channel: _socket.socket, signals: int, terminal: int) -> None:
    """Tell the engine what this process was signalled with.

    Args:
        channel: The connection to it.
        signals: The pipe with their numbers.
        terminal: A descriptor of its terminal; -1 without one.
    """
    for number in posix.read(signals, 64):
        if number == SIGWINCH:
            if terminal >= 0:
                _send_size(channel, terminal)
        else:
            _send(channel, b"S", number, 0)


def _send_size(channel: _socket.socket, terminal: int) -> None:
    try:
        columns, rows = posix.get_terminal_size(terminal)
    except OSError:
        return
    if rows and columns:
        _send(channel, b"W", rows, columns)


def _send(channel: _socket.socket, kind: bytes, first: int, second: int) -> None:
    try:
        channel.send(kind + first.to_bytes(2, sys.byteorder) + second.to_bytes(2, sys.byteorder))
    except OSError:
        pass  # the engine has gone: reading from it says so


if __name__ == "__main__":
    main(sys.argv[1:] == ["terminal"])

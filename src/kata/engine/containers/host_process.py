"""A process of the host that stands for one process of a container, for clients that wait for a child of theirs.

Podman's and CRI-O's monitor (conmon) reaps the process whose number an OCI runtime has given it, and takes its end for
the container's; it signals it, and others look at its namespaces. So a client of that kind starts a process of its own
(the module `pid_process` of the client) and names its socket with Create or Exec, where others name fifos. The engine
connects:

* the process hands over its standard streams (SCM_RIGHTS), which the engine reads and writes itself from then on;
* what it is signalled with, and the sizes of its terminal, it passes on;
* the engine tells it the exit status, with which it ends; if the engine dies, it kills itself;
* if it is killed, what it stands for is killed in the guest; an engine that has no other container then ends, since its
  client (or the monitor that was to tell it) may be gone as well.

Source: unix(7), SCM_RIGHTS and SO_PEERCRED.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct

from kata import sysio
from kata.engine.standard_streams.stdio import Descriptor, Null, Stdio
from kata.errors import HostError, KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from kata.engine.standard_streams.stdio import Endpoint
    from kata.engine.tasks import Tasks
    from kata.journal import Entry, Journal

HANDOVER_S = 10.0
"""How long the process may take to hand its streams over, in seconds."""
FRAME = struct.Struct("=cHH")
"""What the process sends: `SIGNAL` and a number, or `SIZE` with rows and columns."""
SIGNAL, SIZE = b"S", b"W"
_STREAMS = 3
_CREDENTIALS = struct.Struct("=iII")
_NULL = os.makedev(1, 3)


class HostProcess:
    """The engine's end of one such process.

    Args:
        channel: The connection to it.
        pid: Its number.
        fds: Its standard streams, which belong to this object until `stdio` is called.

    Attributes:
        pid: Its number.
        was_killed: It has ended by itself: its client will not ask for the end of what it stands for.
    """

    __slots__ = ("_channel", "_entry", "_fds", "_journal", "_tasks", "pid", "was_killed")

    def __init__(self, channel: socket.socket, pid: int, fds: list[int]) -> None:
        self.pid = pid
        self._channel = channel
        self._fds = fds
        self._journal: Journal | None = None
        self._entry: Entry | None = None
        self._tasks: Tasks | None = None
        self.was_killed = False

    def stdio(self, terminal: bool) -> Stdio:
        """Its streams, once.

        Args:
            terminal: They are one terminal.
        """
        stdin, stdout, stderr = (_endpoint(fd) for fd in self._fds)
        self._fds = []
        return Stdio(terminal, stdin, stdout, stderr, self)

    def record(self, journal: Journal) -> None:
        """Take it down in the journal: were the engine killed, and the process stuck, it would be ended."""
        self._entry = journal.begin("process", role="process of a container", signal="KILL")
        self._journal = journal
        journal.commit(self._entry, pid=self.pid)

    def serve(
        self,
        kill: Callable[[int], Coroutine[Any, Any, None]],
        resize: Callable[[int, int], Coroutine[Any, Any, None]],
        tasks: Tasks,
    ) -> None:
        """Pass on what it is told, from now on.

        Args:
            kill: Sends a signal to what it stands for.
            resize: Gives its terminal a number of rows and columns.
            tasks: The engine's.
        """
        if self._channel.fileno() < 0:
            return  # what it stands for has ended already
        self._tasks = tasks
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._read, kill, resize)

    def _read(
        self,
        kill: Callable[[int], Coroutine[Any, Any, None]],
        resize: Callable[[int, int], Coroutine[Any, Any, None]],
    ) -> None:
        try:
            frame = self._channel.recv(FRAME.size)
        except BlockingIOError:
            return
        except OSError:
            frame = b""
        if len(frame) != FRAME.size:
            self.was_killed = True
            self._stop_reading()
            self._later(kill(sysio.SIGKILL))
            return
        kind, first, second = FRAME.unpack(frame)
        if kind == SIGNAL and 0 < first <= 64:
            self._later(kill(first))
        elif kind == SIZE:
            self._later(resize(first, second))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        async def quietly() -> None:
            try:
                await work
            except KataError:
                pass  # what it was for has ended

        if self._tasks is not None:
            self._tasks.create_task(quietly())

    def _stop_reading(self) -> None:
        if self._tasks is not None and self._channel.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())

    def end(self, status: int) -> None:
        """Have it end with *status*: what it stands for has ended, and all of its output has been delivered."""
        if self._channel.fileno() >= 0:
            try:
                self._channel.send(bytes([status & 0xFF]))
            except OSError:
                pass  # it was killed
        self.close()

    def close(self) -> None:
        """Let go of it. Without a status before, it kills itself. May be called again."""
        self._stop_reading()
        self._channel.close()
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        if self._journal is not None and self._entry is not None:
            self._journal.mark_gone(self._entry)
            self._journal = None


def _endpoint(fd: int) -> Endpoint:
    status = os.fstat(fd)
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL:
        os.close(fd)
        return Null()
    return Descriptor(fd)


def take(path: str) -> HostProcess:
    """Connect to a process and take its streams over. Blocks.

    Args:
        path: Of the socket on which it listens.

    Raises:
        HostError: There is no such process, it is another user's, or it does not answer.
    """
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds: list[int] = []
    try:
        channel.settimeout(HANDOVER_S)
        with sysio.SocketName(path) as name:
            channel.connect(name)
        pid, user, _ = _CREDENTIALS.unpack(
            channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if user not in (0, os.geteuid()):
            raise HostError(f"the process {pid} at {path} is another user's")
        _, fds, _, _ = socket.recv_fds(channel, 1, _STREAMS)
        if len(fds) != _STREAMS:
            raise HostError(f"the process {pid} at {path} handed over {len(fds)} streams, not {_STREAMS}")
        for fd in fds:
            os.set_inheritable(fd, False)
        channel.setblocking(False)
        return HostProcess(channel, pid, fds)
    except BaseException as error:
        channel.close()
        for fd in fds:
            os.close(fd)
        if isinstance(error, OSError):
            raise HostError(
                f"cannot take the streams over from the process at {path}: {error.strerror or error}"
            ) from error
        raise


def as_member(config: dict[str, Any], sandbox_id: str) -> None:
    """Say in a specification that its container belongs to a pod, in the words of CRI: the client found out by the
    namespaces that it names.

    Args:
        config: The specification.
        sandbox_id: The pod's first container.
    """
    annotations = config.setdefault("annotations", {})
    annotations.setdefault("io.kubernetes.cri.container-type", "container")
    annotations.setdefault("io.kubernetes.cri.sandbox-id", sandbox_id)

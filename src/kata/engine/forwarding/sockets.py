"""Unix sockets of the host that a container has as volumes (``-v /run/docker.sock:/run/docker.sock``).

Who listens on one is on the host's kernel, so the file alone would be of no use. The agent makes a socket of the same
mode and owner in the guest, which the container gets in its place, and each connection to it is carried to the host's
(`kata.agent.v1.Sockets`).

* The path is followed anew for each connection: a service that has been restarted is reached again. One that is not
  there means that the container's connection is closed.
* The guest says nothing about where a connection goes: it is taken by a call which the engine has made for that socket.
* At most `LIMIT` connections of a sandbox at a time. Who comes above that waits, as with a listener that is busy.
* Bytes of stream sockets cross, and the ends of both directions; descriptors and credentials do not. The service on
  the host sees the engine, which is root there.

Source: unix(7).
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from abc import ABC, abstractmethod
from functools import partial

from kata import paths, sysio
from kata.agent import dial
from kata.engine.containers import spec
from kata.engine.forwarding import relay
from kata.errors import KataError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.agent.client import AgentClient
    from kata.engine.access import MachineAccess
    from kata.engine.hostns import Namespaces
    from kata.engine.tasks import Tasks

LIMIT = 128
"""Connections of one sandbox at a time. Each may buffer one stream window in each direction (`kata.agent.dial`),
whatever the guest does; together they stay below what the sandbox's cgroup allows beside its machine."""
BUSY_S = 30.0
"""How long connecting to a service with a full queue is retried."""
RETRY_S = 0.1
AGAIN_S = 1.0
_DIRECTORY = f"{spec.GUEST_RUN}/sandbox/sockets"


class SocketForwardingState:
    """What all sockets of one sandbox have in common.

    Attributes:
        room: For connections.
    """

    def __init__(self) -> None:
        self.room = asyncio.Semaphore(LIMIT)
        self._last = 0

    def number(self) -> int:
        """One that no other socket of the sandbox has had."""
        self._last += 1
        return self._last


class Socket(ABC):
    """One of the guest's sockets, and what it stands for.

    Args:
        number: The engine's number for it.
        name: What it is called in a message.
    """

    __slots__ = ("name", "number")

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name

    @abstractmethod
    async def listen(self, agent: AgentClient) -> None:
        """Make it in the guest.

        Raises:
            KataError: See `AgentClient`.
        """

    @abstractmethod
    async def connect(self, tasks: Tasks) -> socket.socket:
        """A connection to what it stands for on the host.

        Raises:
            BlockingIOError: Too many wait there already.
            OSError: Nobody listens there.
        """


class UnixSocket(Socket):
    """A unix socket that a container has as a volume.

    Args:
        source: Its path on the host.
        about: What it is there.
        number: The engine's number for it.
        host: The host's namespaces, if the host sees something else at that path than the engine.
    """

    __slots__ = ("gid", "host", "mode", "source", "uid")

    def __init__(self, source: str, about: os.stat_result, number: int, host: Namespaces | None) -> None:
        super().__init__(number, f"volume {source}")
        self.source = source
        self.mode = stat.S_IMODE(about.st_mode)
        self.uid, self.gid = about.st_uid, about.st_gid
        self.host = host

    @property
    def place(self) -> str:
        """Where it is in the guest."""
        return f"{_DIRECTORY}/{self.number}"

    async def listen(self, agent: AgentClient) -> None:
        """See `Socket`."""
        await dial.listen(agent, self.number, self.place, self.mode, self.uid, self.gid)

    async def connect(self, tasks: Tasks) -> socket.socket:
        """See `Socket`."""
        if self.host is None:
            return connected(self.source)
        fd = await tasks.run_blocking(self.host.opened, partial(descriptor, self.source), self.source)
        return socket.socket(fileno=fd)


class Relay:
    """Sockets in the guest whose connections are carried to the host: those of one container.

    Args:
        machine: Its guest has them.
        tasks: The engine's.
        room: For connections at a time.
    """

    def __init__(self, machine: MachineAccess, tasks: Tasks, room: asyncio.Semaphore) -> None:
        self._machine = machine
        self._engine_tasks = tasks
        self._connections = relay.Connections(room)
        self._sockets: list[Socket] = []
        self._reported: set[int] = set()
        self._agent: AgentClient | None = None

    def add(self, one: Socket) -> None:
        """Take a socket down. May be called from the helper thread."""
        self._sockets.append(one)

    async def listen(self, agent: AgentClient) -> None:
        """Make the sockets in the guest, and let connections come.

        Raises:
            UnsupportedError: The guest's agent has no such thing.
            KataError: See `AgentClient`.
        """
        if dial.SOCKETS_FEATURE not in agent.features:
            raise UnsupportedError(
                f"cannot use the {self._sockets[0].name}: it is a socket of this host, and the guest's agent does not"
                " carry connections to it",
                "use the guest that this program builds (kata guest build)",
            )
        self._agent = agent
        for one in self._sockets:
            await one.listen(agent)
            self._connections.create_task(self._accept(agent, one))

    def close(self) -> None:
        """Take no more, and end what there is; once."""
        self._connections.close()
        agent, self._agent = self._agent, None
        if agent is not None and self._machine.living_agent is not None:
            for one in self._sockets:
                self._engine_tasks.create_task(self._take_away(agent, one))

    async def _take_away(self, agent: AgentClient, one: Socket) -> None:
        try:
            await dial.close_socket(agent, one.number)
        except KataError:
            pass  # the machine is going, and the socket with it

    async def _accept(self, agent: AgentClient, one: Socket) -> None:
        """Let connections to one socket come, each when there is room for it."""
        while True:
            try:
                guest = await dial.accept(agent, one.number)
            except KataError as error:
                if self._machine.living_agent is None:
                    return
                self._log(one, error.message)
                await asyncio.sleep(AGAIN_S)  # out of descriptors in the guest, most likely
                continue
            if guest is None:
                return
            try:
                await self._connections.acquire()
            except BaseException:
                guest.close()
                raise
            self._connections.carry(self._carry(one, guest), guest.close)

    async def _carry(self, one: Socket, guest: dial.Connection) -> None:
        try:
            connection = await self._connect(one)
        except OSError as error:
            self._log(one, error.strerror or str(error))
        else:
            await relay.carry(connection, guest)

    async def _connect(self, one: Socket) -> socket.socket:
        """A connection to the host's socket.

        Raises:
            OSError: Nobody listens there, or not on a stream socket; or its queue stays full.
        """
        deadline = asyncio.get_running_loop().time() + BUSY_S
        while True:
            try:
                connection = await one.connect(self._engine_tasks)
            except BlockingIOError:
                # Its queue is full; the kernel has no event for room in it.
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(RETRY_S)
                continue
            self._reported.discard(one.number)
            return connection

    def _log(self, one: Socket, why: str) -> None:
        """Once, until it has worked again: the guest decides how often there is cause."""
        if one.number not in self._reported:
            self._reported.add(one.number)
            self._engine_tasks.log(f"{one.name}: cannot connect to the host's socket: {why}")


def descriptor(path: str) -> int:
    """The same as `connected`, as a descriptor."""
    return connected(path).detach()


def connected(path: str) -> socket.socket:
    """A stream socket that is connected to the one at a path; it does not block.

    Raises:
        BlockingIOError: Too many wait there already.
        OSError: Nobody listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if len(os.fsencode(path)) <= paths.MAX_SOCKET_PATH:
            sock.connect(path)
            return sock
        with sysio.SocketName(path) as name:
            sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return sock

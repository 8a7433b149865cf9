"""Passes connections to sockets of the host on to the guest.

To the guest's loopback goes what is for the loopback of the sandbox's network namespace: CRI's port-forward enters that
namespace and dials ``localhost`` there; so does whoever looks at a container from its host with ``nsenter``. What they
are after listens in the guest. To the guest's own address, from that address, goes what is for a published port where
the network's helper cannot do it (`kata.network.passt`).
"""

from __future__ import annotations

import asyncio
import socket
import struct

from kata.agent import dial
from kata.errors import KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from kata.engine.access import MachineAccess
    from kata.engine.tasks import Tasks
    from kata.network.user import NetworkPlan

_RECEIVE = 1 << 16
_LIMIT = 256
"""Connections at a time; more wait in the listening sockets."""


class Forwarder:
    """Accepts and carries connections until it is closed.

    Args:
        log: Is given a sentence when no connection can be taken.
        listeners: Where they come in; non-blocking.
        dialled: The guest's end of one, once there is a machine.
    """

    def __init__(
        self,
        log: Callable[[str], None],
        listeners: Iterable[socket.socket],
        dialled: Callable[[socket.socket], Awaitable[dial.Connection]],
    ) -> None:
        self._log = log
        self._dialled = dialled
        self._room = asyncio.Semaphore(_LIMIT)
        self._tasks = {asyncio.create_task(self._accept(one)) for one in listeners}

    def close(self) -> None:
        """Take no more, and end what there is. The listeners are the caller's."""
        for task in self._tasks:
            task.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                self._room.release()
                self._log(f"cannot accept a connection for the guest: {error.strerror}")
                await asyncio.sleep(1)  # out of descriptors, most likely
                continue
            task = asyncio.create_task(self._carry(connection))
            self._tasks.add(task)
            task.add_done_callback(self._carried)

    def _carried(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()

    async def _carry(self, connection: socket.socket) -> None:
        try:
            guest = await self._dialled(connection)
        except (KataError, OSError):
            reset(connection)
        except BaseException:
            connection.close()
            raise
        else:
            await carry(connection, guest)


def to_loopback(machine: MachineAccess, tasks: Tasks, listeners: Iterable[socket.socket]) -> Forwarder:
    """Carry connections to the same port of the guest's loopback.

    Args:
        machine: Its guest is meant.
        tasks: The engine's.
        listeners: Where they come in; non-blocking.
    """

    async def dialled(connection: socket.socket) -> dial.Connection:
        return await dial.dial(await machine.ready(), connection.getsockname()[1])

    return Forwarder(tasks.log, listeners, dialled)


def published(
    machine: MachineAccess,
    tasks: Tasks,
    plan: NetworkPlan,
    configured: Callable[[], Awaitable[object]],
) -> Forwarder:
    """Carry connections to published ports to the guest's own address: what listens on its loopback alone is not
    published, and takes nobody for a local user.

    Args:
        machine: Its guest is meant.
        tasks: The engine's.
        plan: The network; it has the listeners.
        configured: Returns when the guest has its addresses.
    """
    # Of one port of the host there is one port of the guest (`check_ports`).
    ports = {port.host_port: port.guest_port for _, port in plan.listeners}

    async def dialled(connection: socket.socket) -> dial.Connection:
        port = ports[connection.getsockname()[1]]
        address = plan.guest_address(connection.getpeername()[0])
        agent = await machine.ready()
        await configured()
        return await dial.dial(agent, port, address)

    return Forwarder(tasks.log, [one for one, _ in plan.listeners], dialled)


def reset(connection: socket.socket) -> None:
    """Close a connection so that the other side sees an error: it says better than an end without a word that nobody
    listens there. (A unix socket has no such thing, and merely ends.)"""
    with connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def carry(connection: socket.socket, guest: dial.Connection) -> None:
    """Pass on what each side of a connection says to the other, until both have ended; closes both. Never raises.

    An end goes as far as it was meant: the other direction flows until its own. Neither direction reads more than the
    other side takes. Once one side is gone altogether, what is for it is thrown away; what it had said before still
    arrives.

    Args:
        connection: On the host: a connected stream socket.
        guest: The guest's end.
    """
    connection.setblocking(False)
    sending = asyncio.create_task(_send(connection, guest))
    try:
        await _receive(connection, guest, sending)
        await sending
    except KataError:
        reset(connection)
    finally:
        sending.cancel()
        await asyncio.wait([sending])
        guest.close()
        connection.close()


async def _receive(connection: socket.socket, guest: dial.Connection, sending: asyncio.Task[None]) -> None:
    """What comes from the guest, until its end; to where nobody takes it only while the other direction flows."""
    loop = asyncio.get_running_loop()
    gone = False
    while data := await guest.read():
        if not gone:
            try:
                await loop.sock_sendall(connection, data)
            except OSError:
                gone = True
                # It may be in the middle of a wait for data that will never come.
                sending.add_done_callback(lambda _: guest.close())
        if gone and sending.done():
            return
    try:
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it has gone


async def _send(connection: socket.socket, guest: dial.Connection) -> None:
    """What comes from the host, and its end behind it."""
    loop = asyncio.get_running_loop()
    try:
        while data := await loop.sock_recv(connection, _RECEIVE):
            if not await guest.write(data):
                return
    except OSError:
        # Torn down: there is nobody for what the guest still says.
        guest.close()
        return
    guest.end()

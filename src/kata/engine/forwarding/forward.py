"""Passes connections to sockets of the host on to the guest.

To the guest's loopback goes what is for the loopback of the sandbox's network namespace: CRI's port-forward enters that
namespace and dials ``localhost`` there; so does whoever looks at a container from its host with ``nsenter``. What they
are after listens in the guest. To the guest's own address, from that address, goes what is for a published port where
the network's helper cannot do it (`kata.network.passt`).
"""

from __future__ import annotations

import asyncio
import socket

from kata.agent import dial
from kata.engine.forwarding import relay
from kata.errors import KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from kata.engine.access import MachineAccess
    from kata.engine.tasks import Tasks
    from kata.network.user import NetworkPlan

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
        self._connections = relay.Connections(asyncio.Semaphore(_LIMIT))
        for one in listeners:
            self._connections.create_task(self._accept(one))

    def close(self) -> None:
        """Take no more, and end what there is. The listeners are the caller's."""
        self._connections.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._connections.acquire()
            try:
                connection, _ = await loop.sock_accept(listener)
            except BaseException as error:
                self._connections.release()
                if not isinstance(error, OSError):
                    raise
                self._log(f"cannot accept a connection for the guest: {error.strerror}")
                await asyncio.sleep(1)  # out of descriptors, most likely
                continue
            self._connections.carry(self._carry(connection), connection.close)

    async def _carry(self, connection: socket.socket) -> None:
        try:
            guest = await self._dialled(connection)
        except (KataError, OSError):
            relay.reset(connection)
        else:
            await relay.carry(connection, guest)


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

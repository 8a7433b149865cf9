"""Passes connections to the loopback of the sandbox's network namespace on to the guest's loopback.

CRI's port-forward enters that namespace and dials ``localhost`` there; so does whoever looks at a container from its
host with ``nsenter``. What they are after listens in the guest.
"""

from __future__ import annotations

import asyncio
import socket
import struct

from ..agent import dial
from ..errors import KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..network.steer import Steering
    from .sandbox import Sandbox

_RECEIVE = 1 << 16
_LIMIT = 256
"""Connections at a time; more wait in the listening sockets."""


class Forwarder:
    """Accepts and carries connections until it is closed.

    Args:
        sandbox: Whose guest they go to; its event loop runs in the namespace.
        steering: What brings them.
    """

    def __init__(self, sandbox: Sandbox, steering: Steering) -> None:
        self._sandbox = sandbox
        self._steering = steering
        self._room = asyncio.Semaphore(_LIMIT)
        self._tasks = {asyncio.create_task(self._accept(one)) for one in steering.listeners}

    def close(self) -> None:
        """Take no more, and end what there is."""
        for task in self._tasks:
            task.cancel()
        self._steering.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                self._room.release()
                self._sandbox.complain(f"port-forward: cannot accept: {error.strerror}")
                await asyncio.sleep(1)  # out of descriptors, most likely
                continue
            task = asyncio.create_task(self._carry(connection))
            self._tasks.add(task)
            task.add_done_callback(self._carried)

    def _carried(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()

    async def _carry(self, connection: socket.socket) -> None:
        port = connection.getsockname()[1]
        try:
            guest = await dial.dial(await self._sandbox.ready(), port)
        except KataError:
            reset(connection)
        except BaseException:
            connection.close()
            raise
        else:
            await carry(connection, guest)


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

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
        """One connection, to the end of either side."""
        connection.setblocking(False)
        port = connection.getsockname()[1]
        try:
            guest = await dial.dial(await self._sandbox.ready(), port)
            out = asyncio.create_task(self._send(connection, guest))
            try:
                await self._receive(connection, guest)
            finally:
                out.cancel()
                await asyncio.wait([out])
                guest.close()
        except KataError:
            # Nobody listens there: a reset says that better than an end without a word.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass  # the host's side has gone
        finally:
            connection.close()

    async def _receive(self, connection: socket.socket, guest: dial.Connection) -> None:
        """What comes from the guest, until its end or the host's."""
        loop = asyncio.get_running_loop()
        while data := await guest.read():
            await loop.sock_sendall(connection, data)

    async def _send(self, connection: socket.socket, guest: dial.Connection) -> None:
        """What comes from the host. Its end closes the connection, behind all that it has sent."""
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(connection, _RECEIVE):
                if not await guest.write(data):
                    return
        except OSError:
            pass
        guest.close()

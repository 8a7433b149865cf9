"""Connections between a socket of the host and one in the guest: a bounded number at a time, each carried until both
ends are closed. `kata.engine.forwarding.forward` accepts those that arrive on the host,
`kata.engine.forwarding.sockets` those of the guest.
"""

from __future__ import annotations

import asyncio
import socket
import struct

from kata.errors import KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from kata.agent import dial

_RECEIVE = 1 << 16


class Connections:
    """What is being carried, and the tasks that accept more of it; ends all of it together.

    Args:
        room: For connections at a time; may be shared with others.
    """

    def __init__(self, room: asyncio.Semaphore) -> None:
        self._room = room
        self._tasks: set[asyncio.Task[None]] = set()

    async def acquire(self) -> None:
        """Wait until there is room for one more connection, and take it: `carry` or `release` gives it back."""
        await self._room.acquire()

    def release(self) -> None:
        """Give room back that no connection has been found for."""
        self._room.release()

    def create_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something until its end, or until `close`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def carry(self, work: Coroutine[Any, Any, None], close: Callable[[], None]) -> None:
        """Carry a connection that there is room for.

        Args:
            work: Carries it.
            close: Gives back what was accepted; called at the end, whether *work* has begun by then or not: a task
                that is cancelled before its first turn never runs.
        """

        def ended(_task: asyncio.Task[None]) -> None:
            close()
            self._room.release()

        self.create_task(work).add_done_callback(ended)

    def close(self) -> None:
        """Cancel everything; may be called again."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()


def reset(connection: socket.socket) -> None:
    """Close a connection so that the other side sees an error: it says better than an end without a word that nobody
    listens there. A unix socket has no such thing, and merely ends.
    """
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

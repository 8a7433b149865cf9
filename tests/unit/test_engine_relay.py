"""Connections that are carried between two sockets: how many at a time, and what becomes of them at the end."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

import pytest

from kata.engine.forwarding import forward, relay
from kata.errors import AgentError


class Guest:
    """The guest's end of a connection, whose other side the test holds."""

    def __init__(self) -> None:
        self.sock, self.far = socket.socketpair()
        for one in (self.sock, self.far):
            one.setblocking(False)
        self.closed = False

    async def read(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.sock, 4096)

    async def write(self, data: bytes) -> bool:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)
        return True

    def end(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.closed = True
        self.sock.close()


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def refused(client: socket.socket) -> str:
    try:
        await asyncio.get_running_loop().sock_recv(client, 1)
    except ConnectionResetError:
        return "reset"
    return "ended"


def listener() -> socket.socket:
    one = socket.create_server(("127.0.0.1", 0))
    one.setblocking(False)
    return one


async def connect(to: socket.socket) -> socket.socket:
    one = socket.socket()
    one.setblocking(False)
    await asyncio.get_running_loop().sock_connect(one, to.getsockname())
    return one


def test_what_is_accepted_is_given_back_though_its_task_never_ran() -> None:
    async def run() -> None:
        room = asyncio.Semaphore(1)
        connections = relay.Connections(room)
        closed: list[str] = []

        async def work() -> None:
            raise AssertionError("cancelled before its first turn")

        await connections.acquire()
        connections.carry(work(), lambda: closed.append("it"))
        connections.close()
        connections.close()
        await turns()
        assert closed == ["it"]
        assert not room.locked()

    asyncio.run(run())


def test_each_direction_flows_until_its_own_end() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        near, client = socket.socketpair()
        client.setblocking(False)
        guest = Guest()
        carried = asyncio.create_task(relay.carry(near, cast(Any, guest)))
        await loop.sock_sendall(client, b"question")
        client.shutdown(socket.SHUT_WR)
        assert await loop.sock_recv(guest.far, 100) == b"question"
        assert await loop.sock_recv(guest.far, 100) == b""
        await loop.sock_sendall(guest.far, b"late answer")
        guest.far.close()
        assert await loop.sock_recv(client, 100) == b"late answer"
        assert await loop.sock_recv(client, 100) == b""
        await asyncio.wait_for(carried, 10)
        assert guest.closed
        assert near.fileno() == -1
        client.close()

    asyncio.run(run())


def test_a_forwarder_takes_so_many_and_resets_what_nobody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_LIMIT", 2)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        guests: list[Guest] = []
        refuse = False

        async def dialled(connection: socket.socket) -> Any:
            if refuse:
                raise AgentError("nobody listens there")
            guests.append(Guest())
            return guests[-1]

        with listener() as one:
            forwarder = forward.Forwarder(lambda _: None, [one], dialled)
            clients = [await connect(one) for _ in range(3)]
            for client in clients:
                await loop.sock_sendall(client, b"x")
            await asyncio.sleep(0.05)
            assert len(guests) == 2, "the third waits"
            guests[0].far.close()
            clients[0].shutdown(socket.SHUT_WR)
            async with asyncio.timeout(10):
                while len(guests) < 3:
                    await asyncio.sleep(0.01)
            guests[1].far.close()
            clients[1].shutdown(socket.SHUT_WR)
            refuse = True
            late = await connect(one)
            assert await asyncio.wait_for(refused(late), 10) == "reset"
            forwarder.close()
            await turns()
            assert all(guest.closed for guest in guests)
            for client in clients:
                assert await asyncio.wait_for(refused(client), 10) in ("reset", "ended")
            for client in (*clients, late):
                client.close()
            for guest in guests:
                guest.far.close()

    asyncio.run(run())

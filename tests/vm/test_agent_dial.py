"""Connections into a guest, carried by the engine's own code; the agent is an ordinary process, its guest this host."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from agent_host import HostAgent
from waiting import PATIENCE

from kata.agent import dial
from kata.agent.client import AgentClient
from kata.engine.forwarding.relay import carry
from kata.ttrpc.client import Client

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(600)]

DATA = os.urandom(1 << 20) * 6
"""More than the windows and the sockets' buffers hold."""
Side = Callable[[socket.socket], Awaitable[None]]


@pytest.fixture
def host(run_directory: Path) -> Iterator[HostAgent]:
    with HostAgent(run_directory) as agent:
        agent.connect().health()
        yield agent


async def _read_all(sock: socket.socket) -> bytes:
    loop, found = asyncio.get_running_loop(), bytearray()
    while piece := await loop.sock_recv(sock, 1 << 16):
        found += piece
    return bytes(found)


async def _send(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


def _listen() -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    return listener


def play(host: HostAgent, server: Side | None, client: Side) -> None:
    """One connection of a client through the agent to a server (None: nobody listens); both talk at once."""

    async def serve(listener: socket.socket, side: Side) -> None:
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        connection.setblocking(False)
        with connection:
            await side(connection)

    async def relay(door: socket.socket, agent: AgentClient, port: int) -> None:
        connection, _ = await asyncio.get_running_loop().sock_accept(door)
        await carry(connection, await dial.dial(agent, port))

    async def run() -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(host.path))
        sock.setblocking(False)
        agent = AgentClient(await Client.connect(sock))
        try:
            with _listen() as door, _listen() as listener, socket.socket() as near:
                near.setblocking(False)
                port = listener.getsockname()[1]
                if server is None:
                    listener.close()
                relayed = asyncio.ensure_future(relay(door, agent, port))
                sides = (
                    [relayed]
                    if server is None
                    else [relayed, asyncio.ensure_future(serve(listener, server))]
                )
                await asyncio.get_running_loop().sock_connect(near, door.getsockname())
                async with asyncio.timeout(PATIENCE):
                    await client(near)
                    near.close()
                    await asyncio.gather(*sides)
                    await agent.check(PATIENCE)
        finally:
            agent.close()

    asyncio.run(run())


def test_an_answer_may_come_after_the_end_of_the_question(host: HostAgent) -> None:
    async def server(sock: socket.socket) -> None:
        asked = await _read_all(sock)
        await _send(sock, hashlib.sha256(asked).digest() + DATA)

    async def client(sock: socket.socket) -> None:
        await _send(sock, DATA)
        sock.shutdown(socket.SHUT_WR)
        assert await _read_all(sock) == hashlib.sha256(DATA).digest() + DATA

    play(host, server, client)


def test_a_question_may_go_on_after_the_end_of_the_answer(host: HostAgent) -> None:
    found = []

    async def server(sock: socket.socket) -> None:
        await _send(sock, b"enough")
        sock.shutdown(socket.SHUT_WR)
        found.append(await _read_all(sock))

    async def client(sock: socket.socket) -> None:
        assert await _read_all(sock) == b"enough"
        await _send(sock, DATA)

    play(host, server, client)
    assert found == [DATA]


def test_nothing_waits_without_bound_and_nothing_is_lost(host: HostAgent) -> None:
    may_read = asyncio.Event()
    found = []

    async def server(sock: socket.socket) -> None:
        await may_read.wait()
        found.append(hashlib.sha256(await _read_all(sock)).digest())

    async def client(sock: socket.socket) -> None:
        everything = DATA * 8
        sending = asyncio.ensure_future(_send(sock, everything))
        # The buffers of four sockets and one window; nobody would wait for 48 MiB to fit in there.
        done, _ = await asyncio.wait([sending], timeout=2)
        assert not done
        may_read.set()
        await sending
        sock.shutdown(socket.SHUT_WR)
        assert await _read_all(sock) == b""
        assert found == [hashlib.sha256(everything).digest()]

    play(host, server, client)


def test_what_was_said_before_a_reset_arrives(host: HostAgent) -> None:
    async def server(sock: socket.socket) -> None:
        await asyncio.get_running_loop().sock_recv(sock, 1)
        await _send(sock, b"no, thank you")
        # The rest of the question is never read: its kernel resets the connection.

    async def client(sock: socket.socket) -> None:
        sending = asyncio.ensure_future(_send(sock, DATA))
        assert await _read_all(sock) == b"no, thank you"
        await asyncio.wait([sending])

    play(host, server, client)


def test_a_client_that_is_gone_ends_the_servers_connection(host: HostAgent) -> None:
    async def server(sock: socket.socket) -> None:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            await _send(sock, DATA * 16)

    async def client(sock: socket.socket) -> None:
        await asyncio.get_running_loop().sock_recv(sock, 1)

    play(host, server, client)


def test_nobody_listens(host: HostAgent) -> None:
    async def client(sock: socket.socket) -> None:
        with pytest.raises(ConnectionResetError):
            await _read_all(sock)

    play(host, None, client)

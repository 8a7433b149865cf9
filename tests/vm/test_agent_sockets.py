"""Sockets of the host for a container: the engine's relay and a real agent, which is an ordinary process here."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from agent_host import HostAgent
from socket_support import Service, answer
from waiting import PATIENCE

from kata.agent.client import AgentClient
from kata.engine.forwarding import sockets
from kata.errors import UnsupportedError
from kata.ttrpc.client import Client

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(600)]


@pytest.fixture
def host(run_directory: Path) -> Iterator[HostAgent]:
    with HostAgent(run_directory) as agent:
        agent.connect().health()
        yield agent


class Bench:
    """A relay for one socket of the host, and what stands for its sandbox."""

    def __init__(self, agent: AgentClient, source: Path) -> None:
        self.complaints: list[str] = []
        sandbox = SimpleNamespace(
            living_agent=agent,
            log=self.complaints.append,
            create_task=asyncio.ensure_future,
        )
        self.relay = sockets.Relay(
            cast(Any, sandbox), cast(Any, sandbox), sockets.SocketForwardingState().room
        )
        one = sockets.UnixSocket(str(source), os.stat(source), 1, None)
        self.relay.add(one)
        self.place = one.place

    async def connect(self) -> socket.socket:
        """A client's connection, as a container's process makes it."""
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, self.place)
        return sock

    async def ask(self, question: bytes) -> bytes:
        """The service's answer to what it sees the end of."""
        loop, found = asyncio.get_running_loop(), b""
        with await self.connect() as sock:
            await loop.sock_sendall(sock, question)
            sock.shutdown(socket.SHUT_WR)
            while piece := await loop.sock_recv(sock, 1 << 16):
                found += piece
        return found


@pytest.fixture
def play(
    host: HostAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path, Callable[[Bench], Awaitable[None]]], None]:
    """Runs a scenario with a relay that listens."""
    monkeypatch.setattr(sockets, "_DIRECTORY", str(tmp_path / "guest"))

    def run(source: Path, scenario: Callable[[Bench], Awaitable[None]]) -> None:
        async def connect() -> Client:
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, str(host.path))
            return await Client.connect(sock)

        async def main() -> None:
            agent = AgentClient(await connect(), dial=connect)
            await agent.negotiate_features()
            bench = Bench(agent, source)
            try:
                await bench.relay.listen(agent)
                async with asyncio.timeout(PATIENCE):
                    await scenario(bench)
                    await agent.check(PATIENCE)
            finally:
                bench.relay.close()
                while os.path.exists(bench.place):
                    await asyncio.sleep(0.01)
                agent.close()

        asyncio.run(main())

    return run


Play = Callable[[Path, Callable[[Bench], Awaitable[None]]], None]


def test_a_service_of_the_host_answers(play: Play, tmp_path: Path) -> None:
    question = os.urandom(1 << 20) * 5

    async def scenario(bench: Bench) -> None:
        about = os.stat(bench.place)
        assert (stat.S_IMODE(about.st_mode), about.st_uid, about.st_gid) == (0o620, 7, 8)
        assert await bench.ask(question) == answer(question)
        both = await asyncio.gather(bench.ask(b"one"), bench.ask(b"two"))
        assert list(both) == [answer(b"one"), answer(b"two")]

    with Service(tmp_path / "x.sock", 0o620) as service:
        os.chown(service.path, 7, 8)
        play(service.path, scenario)


def test_a_service_that_is_away_is_found_again(play: Play, tmp_path: Path) -> None:
    path = tmp_path / "x.sock"

    async def scenario(bench: Bench) -> None:
        for _ in range(3):
            with await bench.connect() as sock:
                assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
        assert len(bench.complaints) == 1  # once, not as often as the guest likes
        assert "Connection refused" in bench.complaints[0]
        with Service(path):
            assert await bench.ask(b"again") == answer(b"again")

    with Service(path):
        pass  # a socket that nobody listens on any more
    play(path, scenario)


def test_no_more_connections_than_there_is_room_for(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "LIMIT", 2)
    path = tmp_path / "x.sock"

    async def scenario(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        clients = [await bench.connect() for _ in range(20)]  # the kernel's queue takes them
        served = [(await loop.sock_accept(listener))[0] for _ in range(2)]
        late = asyncio.ensure_future(loop.sock_accept(listener))
        await asyncio.wait([late], timeout=0.5)
        assert not late.done()
        for one in (served[0], clients[0], clients[1], served[1]):
            one.close()
        for client in clients[2:]:
            (await late)[0].close()
            client.close()
            late = asyncio.ensure_future(loop.sock_accept(listener))
        late.cancel()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        play(path, scenario)


def test_the_containers_end_ends_its_connections(play: Play, tmp_path: Path) -> None:
    path = tmp_path / "x.sock"

    async def scenario(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        near = await bench.connect()
        far, _ = await loop.sock_accept(listener)
        bench.relay.close()
        assert await loop.sock_recv(near, 1) == b""
        assert await loop.sock_recv(far, 1) == b""
        near.close()
        far.close()
        while os.path.exists(bench.place):
            await asyncio.sleep(0.01)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        play(path, scenario)


def test_other_kinds_of_sockets_are_not_connected_to(play: Play, tmp_path: Path) -> None:
    path = tmp_path / "x.sock"

    async def scenario(bench: Bench) -> None:
        with await bench.connect() as sock:
            assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
        assert "wrong type" in bench.complaints[0]

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(str(path))
        play(path, scenario)


def test_a_long_path_and_a_full_queue(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(directory, os.O_PATH)
        listener.bind(f"/proc/self/fd/{here}/x.sock")
        os.close(here)
        listener.listen(0)
        with sockets.connected(str(directory / "x.sock")) as one:
            assert one.getpeername().endswith("x.sock")
            with pytest.raises(BlockingIOError):
                sockets.connected(str(directory / "x.sock"))
    with pytest.raises(ConnectionRefusedError):
        sockets.connected(str(directory / "x.sock"))


def test_an_agent_without_sockets_is_told_by_name(tmp_path: Path) -> None:
    with Service(tmp_path / "x.sock") as service:

        async def main() -> None:
            agent = cast(Any, SimpleNamespace(features=frozenset()))
            bench = Bench(agent, service.path)
            with pytest.raises(UnsupportedError, match=r"x\.sock"):
                await bench.relay.listen(agent)

        asyncio.run(main())

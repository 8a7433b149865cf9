"""Direct streams of a real agent, started as an ordinary process: the same code as in a guest, without the wait."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from agent_host import HostAgent
from agent_support import process
from waiting import PATIENCE

from kata.agent import streams
from kata.agent.client import CONNECTIONS, AgentClient
from kata.agent.streams import INPUT_WINDOW, Input, Output, Pieces, first_piece
from kata.errors import AgentError
from kata.proto.agentext_pb import StreamPiece
from kata.ttrpc.client import Client

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(600)]

Scenario = Callable[[AgentClient], Awaitable[None]]


@pytest.fixture
def host(run_directory: Path) -> Iterator[HostAgent]:
    with HostAgent(run_directory) as agent:
        agent.container("box", "sleep", "100000")
        yield agent


def play(host: HostAgent, scenario: Scenario) -> None:
    """Run *scenario* with a connection of its own."""

    async def run() -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(host.path))
        sock.setblocking(False)
        agent = AgentClient(await Client.connect(sock))
        await agent.negotiate_features()
        assert streams.FEATURE in agent.features
        try:
            await asyncio.wait_for(scenario(agent), PATIENCE)
        finally:
            agent.close()

    asyncio.run(run())


def play_apart(host: HostAgent, scenario: Callable[[AgentClient, list[Client]], Awaitable[None]]) -> None:
    """As `play`, with a connection for each stream; *scenario* is given a list of these as well."""
    further: list[Client] = []

    async def connect() -> Client:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, str(host.path))
        return await Client.connect(sock)

    async def dial() -> Client:
        further.append(await connect())
        return further[-1]

    async def run() -> None:
        agent = AgentClient(await connect(), dial=dial)
        await agent.negotiate_features()
        assert CONNECTIONS in agent.features
        try:
            await asyncio.wait_for(scenario(agent, further), PATIENCE)
        finally:
            agent.close()
        assert all(client.closed for client in further)

    asyncio.run(run())


async def start(agent: AgentClient, exec_id: str, *argv: str, stdin: bool = False) -> None:
    await agent.exec_process("box", exec_id, process(*argv))
    if not stdin:
        await agent.close_stdin("box", exec_id)


async def read_all(output: Output) -> bytes:
    found = bytearray()
    while piece := await output.read():
        found += piece
    return bytes(found)


def test_every_byte_arrives_in_order_both_ways(host: HostAgent) -> None:
    data = os.urandom(1 << 20) * 24

    async def scenario(agent: AgentClient) -> None:
        await start(agent, "cat", "cat", stdin=True)
        feed = Input(agent, "box", "cat")

        async def write() -> None:
            for at in range(0, len(data), 1 << 18):
                await feed.write(data[at : at + (1 << 18)])
            await feed.close()

        writing = asyncio.ensure_future(write())
        found = await read_all(Output(agent, "box", "cat", "stdout"))
        await writing
        assert hashlib.sha256(found).digest() == hashlib.sha256(data).digest()
        assert await read_all(Output(agent, "box", "cat", "stderr")) == b""
        assert await agent.wait("box", "cat") == 0

    play(host, scenario)


def test_each_stream_has_a_connection_to_itself_where_that_can_be(host: HostAgent) -> None:
    """Bulk data both ways, and the end of a stream is the end of its connection; the common one goes on."""
    data = os.urandom(1 << 20) * 8

    async def scenario(agent: AgentClient, further: list[Client]) -> None:
        await start(agent, "c", "sh", "-c", "cat; echo end >&2", stdin=True)
        feed = Input(agent, "box", "c")
        said = [Output(agent, "box", "c", name) for name in ("stdout", "stderr")]

        async def send() -> None:
            for at in range(0, len(data), 300_000):
                await feed.write(data[at : at + 300_000])
            await feed.close()

        _, stdout, stderr = await asyncio.gather(send(), read_all(said[0]), read_all(said[1]))
        assert (stdout == data, stderr) == (True, b"end\n")
        assert await agent.wait("box", "c") == 0
        assert len(further) == 3
        while not all(client.closed for client in further):
            await asyncio.sleep(0.01)
        # One that stands still holds nothing up, and what is left of it ends with the agent's client.
        await start(agent, "d", "dd", "if=/dev/zero", "bs=65536", "count=64")
        slow = Output(agent, "box", "d", "stdout")
        assert await slow.read()
        assert not further[3].closed
        await agent.check(PATIENCE)

    play_apart(host, scenario)


def test_a_stream_goes_over_the_common_connection_if_it_gets_none(host: HostAgent) -> None:
    async def refused() -> Client:
        raise ConnectionRefusedError

    async def scenario(agent: AgentClient) -> None:
        agent._dial = refused
        await start(agent, "c", "echo", "hello")
        assert await read_all(Output(agent, "box", "c", "stdout")) == b"hello\n"

    play(host, scenario)


def test_streams_are_apart_and_end_with_what_was_in_the_pipe(host: HostAgent) -> None:
    async def scenario(agent: AgentClient) -> None:
        # The child keeps the pipe open: what was there at the end of the process counts.
        await start(agent, "two", "sh", "-c", "sleep 1000 & echo out; echo err >&2; exit 3")
        assert await agent.wait("box", "two") == 3
        assert await read_all(Output(agent, "box", "two", "stdout")) == b"out\n"
        assert await read_all(Output(agent, "box", "two", "stderr")) == b"err\n"
        # All has been read: only its exit code is known any more.
        assert await read_all(Output(agent, "box", "two", "stdout")) == b""
        assert await agent.wait("box", "two") == 3

    play(host, scenario)


def test_a_slow_reader_stops_its_own_stream_and_no_other(host: HostAgent) -> None:
    async def scenario(agent: AgentClient) -> None:
        await start(agent, "flood", "sh", "-c", "cat /dev/zero & cat /dev/zero >&2")
        slow = Output(agent, "box", "flood", "stdout")
        quick = Output(agent, "box", "flood", "stderr")
        await slow.read()
        got = 0
        while got < 32 << 20:
            got += len(await quick.read())
            if got % (8 << 20) < 1 << 17:
                await agent.check(PATIENCE)
        await start(agent, "other", "echo", "hello")
        assert await read_all(Output(agent, "box", "other", "stdout")) == b"hello\n"
        status = Path(f"/proc/{host.process.pid}/status").read_text()
        assert int(status.split("VmRSS:")[1].split()[0]) < 8 << 10
        # It goes on where it was.
        assert len(await slow.read()) > 0
        await agent.signal("box", "flood", signal.SIGKILL)

    play(host, scenario)


def test_a_slow_process_stops_its_writer(host: HostAgent) -> None:
    async def scenario(agent: AgentClient) -> None:
        await start(agent, "slow", "sleep", "100000", stdin=True)
        feed = Input(agent, "box", "slow")
        writing = asyncio.ensure_future(feed.write(bytes(8 << 20)))
        done, _ = await asyncio.wait([writing], timeout=1)
        assert not done
        await agent.check(PATIENCE)
        await agent.signal("box", "slow", signal.SIGKILL)
        with pytest.raises(AgentError, match="standard input"):
            await writing

    play(host, scenario)


def test_a_process_that_closes_its_input_breaks_the_pipe(host: HostAgent) -> None:
    async def scenario(agent: AgentClient) -> None:
        await start(agent, "shut", "sh", "-c", "exec <&-; echo shut; sleep 100000", stdin=True)
        assert await Output(agent, "box", "shut", "stdout").read() == b"shut\n"
        # More than the window: the end has to come first.
        with pytest.raises(AgentError, match="broken pipe"):
            await Input(agent, "box", "shut").write(bytes(2 * INPUT_WINDOW))

    play(host, scenario)


def test_more_input_than_credit_is_refused(host: HostAgent) -> None:
    async def scenario(agent: AgentClient) -> None:
        await start(agent, "full", "sleep", "100000", stdin=True)
        pieces = Pieces(0)
        stream = await agent.open(streams.SERVICE, "Attach", first_piece("box", "full", "stdin"), pieces)
        # A pipe's content and a window of it are taken, however quick the agent is.
        for _ in range(3 * INPUT_WINDOW // (1 << 16)):
            stream.send(StreamPiece(data=bytes(1 << 16)).encode())
        while not pieces.over:
            await pieces.news()
        assert pieces.error is not None
        assert "credit" in str(pieces.error)
        await agent.check(PATIENCE)

    play(host, scenario)


def test_one_call_at_a_time_has_a_stream(host: HostAgent) -> None:
    async def scenario(agent: AgentClient) -> None:
        await start(agent, "one", "cat", stdin=True)
        first = Pieces(10)
        stream = await agent.open(streams.SERVICE, "Attach", first_piece("box", "one", "stdout", 10), first)
        with pytest.raises(AgentError, match="another streaming call"):
            await Output(agent, "box", "one", "stdout").read()
        # Ten bytes are asked for and no more come, though there are more.
        await agent.write_stdin("box", "one", b"0123456789abc")
        assert await first.take() == b"0123456789"
        # Given up, it is free again, and nothing is lost.
        stream.send(b"", last=True)
        while not first.over:
            await first.news()
        assert first.error is None
        assert await agent.read("box", "one", "stdout", 2) == b"ab"
        assert await Output(agent, "box", "one", "stdout").read() == b"c"

    play(host, scenario)


def test_a_lost_connection_frees_its_streams(host: HostAgent) -> None:
    async def scenario(agent: AgentClient) -> None:
        await start(agent, "left", "cat", stdin=True)

        async def once(text: bytes) -> bytes:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(host.path))
            sock.setblocking(False)
            other = AgentClient(await Client.connect(sock))
            other.features = agent.features
            await Input(other, "box", "left").write(text)
            said = await Output(other, "box", "left", "stdout").read()
            other.close()
            return said

        assert await once(b"first") == b"first"
        # The agent has seen the end when it has served a connection that came after it.
        late = host.connect()
        late.health()
        assert await once(b"second") == b"second"

    play(host, scenario)


@pytest.mark.parametrize(
    ("container", "exec_id", "number", "words"),
    [("none", "", 1, "none"), ("box", "none", 1, "none"), ("box", "", 7, "no stream 7")],
)
def test_streams_that_there_are_not(
    host: HostAgent, container: str, exec_id: str, number: int, words: str
) -> None:
    async def scenario(agent: AgentClient) -> None:
        piece = StreamPiece.decode(first_piece(container, exec_id, "stdout", 1))
        assert piece.target is not None
        piece.target.stream = number
        pieces = Pieces(1)
        await agent.open(streams.SERVICE, "Attach", piece.encode(), pieces)
        while not pieces.over:
            await pieces.news()
        assert words in str(pieces.error)

    play(host, scenario)

"""Direct streams against a server that is played by the test, frame by frame."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from kata.agent import dial, streams
from kata.agent.client import AgentClient, Watcher
from kata.agent.streams import INPUT_WINDOW, OUTPUT_WINDOW, Input, Output, Pieces
from kata.errors import AgentError, GuestProtocolError, VMLostError
from kata.proto.agentext_pb import StreamPiece
from kata.ttrpc import envelope, frame
from kata.ttrpc.client import Client
from kata.ttrpc.status import ProtocolError


class Server:
    """The other end of the connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._parser = frame.Parser()
        self._frames: list[frame.Frame] = []

    async def next(self) -> frame.Frame:
        """The next frame of the client's."""
        loop = asyncio.get_running_loop()
        while not self._frames:
            data = await loop.sock_recv(self._sock, 1 << 16)
            assert data, "the client has hung up"
            self._frames += self._parser.feed(data)
        return self._frames.pop(0)

    async def silent(self) -> bool:
        """Whether the client sends nothing for now."""
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(self.peek())), 0.05)
        except TimeoutError:
            return True
        return False

    async def peek(self) -> None:
        self._frames.insert(0, await self.next())

    async def begin(self) -> tuple[int, StreamPiece]:
        """The number and the first piece of a streaming call."""
        begun = await self.next()
        assert (begun.kind, begun.flags) == (frame.REQUEST, frame.REMOTE_OPEN)
        request = envelope.Request.decode(begun.data)
        assert (request.service, request.method) == (streams.SERVICE, "Attach")
        return begun.stream, StreamPiece.decode(request.payload)

    async def send(self, number: int, data: bytes = b"", credit: int = 0) -> None:
        piece = StreamPiece(data=data, credit=credit).encode()
        await asyncio.get_running_loop().sock_sendall(self._sock, frame.encode(number, frame.DATA, piece))

    async def end(self, number: int, code: int = 0, message: str = "") -> None:
        data = envelope.Response(b"", code, message).encode()
        await asyncio.get_running_loop().sock_sendall(self._sock, frame.encode(number, frame.RESPONSE, data))


class Told(Watcher):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.lies: list[GuestProtocolError] = []

    def on_protocol_violation(self, error: GuestProtocolError) -> None:
        self.lies.append(error)


def run(scenario: Callable[[AgentClient, Server], Awaitable[None]]) -> Told:
    """Play a scenario over a socket pair."""
    told = Told()

    async def play() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        agent = AgentClient(await Client.connect(ours), told)
        agent.features = frozenset({streams.FEATURE})
        try:
            await asyncio.wait_for(scenario(agent, Server(theirs)), 30)
        finally:
            agent.close()
            theirs.close()

    asyncio.run(play())
    return told


async def read_all(output: Output) -> bytes:
    found = bytearray()
    while piece := await output.read():
        found += piece
    return bytes(found)


def test_output_comes_in_order_and_credit_goes_back_by_half_windows() -> None:
    async def scenario(agent: AgentClient, server: Server) -> None:
        output = Output(agent, "box", "e", "stderr")
        first = asyncio.ensure_future(output.read())
        number, piece = await server.begin()
        assert piece.target is not None
        assert (piece.target.container_id, piece.target.exec_id, piece.target.stream) == ("box", "e", 2)
        assert piece.credit == OUTPUT_WINDOW
        block = bytes(range(256)) * 256
        got = bytearray()
        sent = 0
        while sent < OUTPUT_WINDOW:
            await server.send(number, block)
            sent += len(block)
        got += await first
        while len(got) < OUTPUT_WINDOW // 2 - len(block):
            got += await output.read()
        assert await server.silent()
        while len(got) < OUTPUT_WINDOW:
            got += await output.read()
        credit = 0
        while credit < OUTPUT_WINDOW:
            credit += StreamPiece.decode((await server.next()).data).credit
        assert credit == OUTPUT_WINDOW
        await server.send(number, b"the last")
        await server.end(number)
        assert await output.read() == b"the last"
        assert await output.read() == b""
        assert await output.read() == b""
        assert bytes(got) == block * (OUTPUT_WINDOW // len(block))

    assert run(scenario).lies == []


def test_single_bytes_are_put_together() -> None:
    async def scenario(agent: AgentClient, server: Server) -> None:
        output = Output(agent, "box", "", "stdout")
        first = asyncio.ensure_future(output.read())
        number, _ = await server.begin()
        await server.send(number, b"x")
        assert await first == b"x"
        for _ in range(500):
            await server.send(number, b"y")
        await server.end(number)
        pieces = []
        while piece := await output.read():
            pieces.append(piece)
            await asyncio.sleep(0.01)
        assert b"".join(pieces) == b"y" * 500
        assert len(pieces) < 100

    run(scenario)


def test_more_output_than_was_asked_for_ends_the_connection() -> None:
    async def scenario(agent: AgentClient, server: Server) -> None:
        output = Output(agent, "box", "", "stdout")
        first = asyncio.ensure_future(output.read())
        number, _ = await server.begin()
        for _ in range(OUTPUT_WINDOW // (1 << 16)):
            await server.send(number, bytes(1 << 16))
        await first
        await server.send(number, b"one too many")
        with pytest.raises(GuestProtocolError):
            await agent.check(5)
        with pytest.raises(GuestProtocolError):
            await read_all(output)

    assert "more of a stream" in run(scenario).lies[0].message


@pytest.mark.parametrize("data", [b"\x0a\x05abc", b"\xff\xff\xff"])
def test_a_malformed_piece_ends_the_connection(data: bytes) -> None:
    async def scenario(agent: AgentClient, server: Server) -> None:
        output = Output(agent, "box", "", "stdout")
        first = asyncio.ensure_future(output.read())
        number, _ = await server.begin()
        await asyncio.get_running_loop().sock_sendall(server._sock, frame.encode(number, frame.DATA, data))
        with pytest.raises(GuestProtocolError):
            await first

    assert run(scenario).lies


def test_data_of_a_stream_that_nobody_opened_ends_the_connection() -> None:
    async def scenario(agent: AgentClient, server: Server) -> None:
        check = asyncio.ensure_future(agent.check(5))
        await server.next()
        await server.send(77, b"hello")
        with pytest.raises(GuestProtocolError):
            await check

    run(scenario)


def test_an_error_and_the_end_of_the_connection_reach_the_reader() -> None:
    async def scenario(agent: AgentClient, server: Server) -> None:
        output = Output(agent, "box", "no", "stdout")
        first = asyncio.ensure_future(output.read())
        number, _ = await server.begin()
        await server.end(number, 5, "no process\nno")
        with pytest.raises(AgentError, match=r"no process\\x0ano"):
            await first
        second = asyncio.ensure_future(Output(agent, "box", "", "stdout").read())
        await server.begin()
        server._sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(VMLostError):
            await second
        with pytest.raises(VMLostError):
            await Output(agent, "box", "", "stderr").read()

    run(scenario)


def test_input_waits_for_credit_and_is_closed_behind_its_data() -> None:
    async def scenario(agent: AgentClient, server: Server) -> None:
        feed = Input(agent, "box", "")
        data = bytes(range(256)) * (2 * INPUT_WINDOW // 256)
        writing = asyncio.ensure_future(feed.write(data))
        number, piece = await server.begin()
        assert piece.target is not None
        assert piece.target.stream == 0
        got = bytearray()
        while len(got) < INPUT_WINDOW:
            got += StreamPiece.decode((await server.next()).data).data
        assert len(got) == INPUT_WINDOW
        assert await server.silent()
        assert not writing.done()
        await server.send(number, credit=100)
        assert len(StreamPiece.decode((await server.next()).data).data) == 100
        await server.send(number, credit=INPUT_WINDOW - 100)
        got += data[INPUT_WINDOW : INPUT_WINDOW + 100]
        while len(got) < len(data):
            got += StreamPiece.decode((await server.next()).data).data
        await writing
        assert bytes(got) == data
        await feed.close()
        last = await server.next()
        assert (last.kind, last.flags, last.data) == (frame.DATA, frame.REMOTE_CLOSED | frame.NO_DATA, b"")
        await server.end(number)

    assert run(scenario).lies == []


def test_input_of_a_process_that_takes_no_more_is_an_error() -> None:
    async def scenario(agent: AgentClient, server: Server) -> None:
        feed = Input(agent, "box", "")
        writing = asyncio.ensure_future(feed.write(bytes(2 * INPUT_WINDOW)))
        number, _ = await server.begin()
        await server.end(number, 9, "standard input: broken pipe")
        with pytest.raises(AgentError, match="broken pipe"):
            await writing
        with pytest.raises(AgentError, match="broken pipe"):
            await feed.write(b"more")

    run(scenario)


def test_credit_for_what_was_not_sent_ends_the_connection() -> None:
    async def scenario(agent: AgentClient, server: Server) -> None:
        feed = Input(agent, "box", "")
        await feed.write(b"x")
        number, _ = await server.begin()
        await server.send(number, credit=1 << 31)
        with pytest.raises(GuestProtocolError):
            await agent.check(5)
        with pytest.raises(GuestProtocolError):
            await feed.write(b"x")

    assert "credit" in run(scenario).lies[0].message


def test_credit_and_no_data_come_behind_the_end_of_a_direction() -> None:
    pieces = Pieces(10)
    pieces.received(StreamPiece(data=b"last").encode())
    pieces.received(StreamPiece(end=True).encode())
    pieces.received(StreamPiece(credit=7).encode())
    assert asyncio.run(pieces.take()) == b"last"
    assert asyncio.run(pieces.take()) == b""
    assert (pieces.credit, pieces.over) == (7, False)
    with pytest.raises(ProtocolError):
        pieces.received(StreamPiece(data=b"more").encode())


def test_datagrams_are_bounded_in_number_and_length() -> None:
    taken: list[tuple[int, bytes]] = []
    ends: list[object] = []
    datagrams = dial.Datagrams(2, lambda number, data: taken.append((number, data)), ends.append)

    def comes(number: int, data: bytes) -> None:
        datagrams.received(StreamPiece(datagram=number, data=data).encode())

    comes(1, b"a")
    comes(2, b"b" * dial.MAX_DATAGRAM)
    for number in (2, 3):  # that one waits already, and there is no room for another
        with pytest.raises(ProtocolError, match="more datagrams"):
            comes(number, b"c")
    datagrams.answer(1, b"")
    for data in (b"", b"d" * (dial.MAX_DATAGRAM + 1)):
        with pytest.raises(ProtocolError, match=f"datagram of {len(data)} bytes"):
            comes(3, data)
    with pytest.raises(ProtocolError, match="malformed"):
        datagrams.received(b"\x0a\x7f")
    comes(1, b"e")
    assert [number for number, _ in taken] == [1, 2, 1]
    datagrams.ended(None)
    assert ends == [None]

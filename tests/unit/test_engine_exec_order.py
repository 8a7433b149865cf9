"""In which order the agent is told of a process that is executed: on the wire, against a peer that speaks frames."""

from __future__ import annotations

import asyncio
import socket

import pytest

from kata.agent.client import CONNECTIONS, STREAMS, AgentClient
from kata.agent.streams import Output
from kata.engine.containers.container import Container
from kata.engine.containers.process import Process
from kata.engine.standard_streams.stdio import parse_stdio
from kata.engine.standard_streams.streams import OutputPump, ProcessStreams
from kata.errors import CommandNotFoundError
from kata.proto import agent_pb, oci_pb
from kata.ttrpc import envelope, frame
from kata.ttrpc.client import Client

MISSING = 'unable to start container process: exec: "missing": executable file not found in $PATH'


class Peer:
    """The agent's end of the connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._parser = frame.Parser()
        self.told: list[tuple[int, str]] = []

    async def hear(self, methods: int) -> list[str]:
        """Wait until so many calls have come. Returns their methods."""
        loop = asyncio.get_running_loop()
        while len(self.told) < methods:
            for item in self._parser.feed(await loop.sock_recv(self._sock, 1 << 16)):
                if item.kind == frame.REQUEST:
                    self.told.append((item.stream, envelope.Request.decode(item.data).method))
        return [method for _, method in self.told]

    async def answer(self, method: str, payload: bytes = b"", code: int = 0, message: str = "") -> None:
        """Answer all calls of a method."""
        for stream, name in self.told:
            if name == method:
                data = envelope.Response(payload, code, message).encode()
                await asyncio.get_running_loop().sock_sendall(
                    self._sock, frame.encode(stream, frame.RESPONSE, data)
                )


async def started(features: set[str]) -> tuple[Peer, asyncio.Task[int | None], ProcessStreams, AgentClient]:
    """Have the engine make a process; what it is told is the status of its end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    agent = AgentClient(await Client.connect(ours))
    agent.features = frozenset(features)
    container = Container.__new__(Container)
    container.id = "c1"
    process = Process("c1", "e1", parse_stdio(False, "", "", ""))
    pumps = [OutputPump(name, Output(agent, "c1", "e1", name).read, None) for name in ("stdout", "stderr")]
    streams = ProcessStreams(None, pumps)

    async def make() -> int | None:
        waiting = await container._make_exec(process, streams, oci_pb.Process(), agent)
        return None if waiting is None else await waiting

    return Peer(theirs), asyncio.create_task(make()), streams, agent


def test_output_and_end_are_asked_for_right_behind_the_process() -> None:
    async def play() -> None:
        peer, made, streams, agent = await started({STREAMS})
        assert await peer.hear(4) == ["ExecProcess", "WaitProcess", "Attach", "Attach"]  # none is answered
        await peer.answer("WaitProcess", agent_pb.WaitProcessResponse(status=7).encode())
        await peer.answer("Attach")
        await asyncio.sleep(0.05)
        assert not made.done()  # its start is told first
        await peer.answer("ExecProcess")
        assert await made == 7
        await streams.finish()
        agent.close()

    asyncio.run(asyncio.wait_for(play(), 30))


def test_a_process_that_could_not_be_made_leaves_no_call() -> None:
    async def play() -> None:
        peer, made, streams, agent = await started({STREAMS})
        await peer.hear(4)
        for method in ("ExecProcess", "WaitProcess", "Attach"):  # as the agent does
            await peer.answer(method, code=5, message=MISSING)
        with pytest.raises(CommandNotFoundError):
            await made
        streams.close()
        await asyncio.sleep(0.05)
        assert not agent.client.closed  # the late answer to WaitProcess was expected
        agent.close()

    asyncio.run(asyncio.wait_for(play(), 30))


@pytest.mark.parametrize("features", [set(), {STREAMS, CONNECTIONS}], ids=["another agent", "over vsock"])
def test_where_calls_may_overtake_each_other_the_process_comes_first(features: set[str]) -> None:
    async def play() -> None:
        peer, made, _, agent = await started(features)
        assert await peer.hear(1) == ["ExecProcess"]
        await asyncio.sleep(0.05)
        await peer.answer("ExecProcess")
        assert await made is None
        assert len(peer.told) == 1
        agent.close()

    asyncio.run(asyncio.wait_for(play(), 30))

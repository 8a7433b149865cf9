"""QMP: framing by plain bytes; the client against a peer that answers, refuses, is silent or dies."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata.errors import HypervisorError
from kata.hypervisor.qemu.qmp import MAX_MESSAGE, Framer, QmpClient

GREETING = {
    "QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": []}
}
MESSAGES = st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(), max_size=3), max_size=5)


@given(MESSAGES, st.lists(st.integers(1, 40), max_size=20))
def test_framing_does_not_depend_on_the_pieces(messages: list[dict[str, Any]], cuts: list[int]) -> None:
    data = b"".join(json.dumps(m).encode() + b"\r\n" for m in messages)
    framer, got = Framer(), []
    for cut in cuts:
        got += framer.feed(data[:cut])
        data = data[cut:]
    got += framer.feed(data)
    assert got == messages


@pytest.mark.parametrize("data", [b"hello\n", b"[1]\n", b'{"a":\n', b"\xff\xfe\n"])
def test_what_is_not_qmp_is_refused(data: bytes) -> None:
    with pytest.raises(HypervisorError, match="not QMP"):
        Framer().feed(data)


def test_a_message_without_end_is_refused() -> None:
    framer = Framer()
    framer.feed(b"x" * MAX_MESSAGE)
    with pytest.raises(HypervisorError, match="more than"):
        framer.feed(b"x")


class Peer:
    """The other end: answers commands by a function; None is silence."""

    def __init__(self, answer: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
        ours, theirs = socket.socketpair()
        self.fd = theirs.detach()
        self.seen: list[dict[str, Any]] = []
        self._answer = answer
        self._sock = ours
        self.writer: asyncio.StreamWriter | None = None

    async def serve(self) -> None:
        reader, self.writer = await asyncio.open_connection(sock=self._sock)
        self.say(GREETING)
        while line := await reader.readline():
            message = json.loads(line)
            self.seen.append(message)
            answer = {"return": {}} if message["execute"] == "qmp_capabilities" else self._answer(message)
            if answer is not None:
                self.say({**answer, "id": message["id"]})
        self.die()

    def say(self, message: dict[str, Any]) -> None:
        assert self.writer is not None
        self.writer.write(json.dumps(message).encode() + b"\r\n")

    def die(self) -> None:
        assert self.writer is not None
        self.writer.close()


def echo(message: dict[str, Any]) -> dict[str, Any] | None:
    if message["execute"] == "refuse":
        return {"error": {"class": "GenericError", "desc": "No such slot"}}
    if message["execute"] == "silent":
        return None
    return {"return": message.get("arguments", "nothing")}


async def connected(peer: Peer, events: list[tuple[str, dict[str, Any]]] | None = None) -> QmpClient:
    task = asyncio.create_task(peer.serve())
    keep.append(task)
    log = events if events is not None else []
    return await QmpClient.connect(peer.fd, lambda name, data: log.append((name, data)), timeout_s=10)


keep: list[asyncio.Task[None]] = []


def test_commands_answers_refusals_and_events() -> None:
    async def work() -> None:
        peer = Peer(echo)
        events: list[tuple[str, dict[str, Any]]] = []
        client = await connected(peer, events)
        assert client.version == (7, 2, 22)
        assert await client.execute("echo", {"a": [1, None]}) == {"a": [1, None]}
        assert await client.execute("plain") == "nothing"
        with pytest.raises(HypervisorError, match="refused refuse: No such slot"):
            await client.execute("refuse")
        peer.say({"event": "SHUTDOWN", "data": {"reason": "guest-reset"}, "timestamp": {}})
        peer.say({"event": "RESUME", "timestamp": {}})
        await client.execute("plain")
        assert events == [("SHUTDOWN", {"reason": "guest-reset"}), ("RESUME", {})]
        client.close()

    asyncio.run(work())


def test_a_dead_hypervisor_fails_calls_at_once() -> None:
    async def work() -> None:
        peer = Peer(echo)
        client = await connected(peer)
        calls = [asyncio.create_task(client.execute("silent", timeout_s=3600)) for _ in range(3)]
        await asyncio.sleep(0)
        peer.die()
        for call in calls:
            with pytest.raises(HypervisorError, match="has ended"):
                await asyncio.wait_for(call, 10)
        with pytest.raises(HypervisorError, match="has ended"):
            await client.execute("echo")
        assert client.lost.done()
        assert not client.connected

    asyncio.run(work())


def test_a_silent_hypervisor_is_given_up() -> None:
    async def work() -> None:
        client = await connected(Peer(echo))
        with pytest.raises(HypervisorError, match=r"did not answer silent for 0\.05 s"):
            await client.execute("silent", timeout_s=0.05)
        assert await client.execute("plain") == "nothing", "a late answer would not be taken for this one's"
        client.close()

    asyncio.run(work())


def test_garbage_ends_the_connection() -> None:
    async def work() -> None:
        peer = Peer(echo)
        client = await connected(peer)
        call = asyncio.create_task(client.execute("silent", timeout_s=3600))
        await asyncio.sleep(0)
        assert peer.writer is not None
        peer.writer.write(b"Segmentation fault\n")
        with pytest.raises(HypervisorError, match="not QMP"):
            await asyncio.wait_for(call, 10)

    asyncio.run(work())


def test_an_end_before_the_greeting() -> None:
    async def work() -> None:
        ours, theirs = socket.socketpair()
        ours.close()
        with pytest.raises(HypervisorError, match="has ended"):
            await QmpClient.connect(theirs.detach())

    asyncio.run(work())

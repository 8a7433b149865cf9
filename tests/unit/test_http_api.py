"""The HTTP client for monitors: answers as Cloud Hypervisor 54 and Firecracker give them, and none at all."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Awaitable, Callable

import pytest

from kata.errors import HypervisorError
from kata.hypervisor.http_api import MAX_BODY, MAX_HEAD, ApiClient, Refused, words_of

NOT_CREATED = b'["Error from API","The VM info is not available","VM is not created"]'


def answer(status: str, body: bytes = b"") -> bytes:
    kind = b"Content-Type: application/json\r\n" if body else b""
    length = b"" if status.startswith("204") else b"Content-Length: %d\r\n" % len(body)
    return b"HTTP/1.1 %s \r\nServer: x\r\nConnection: keep-alive\r\n%s%s\r\n%s" % (
        status.encode(),
        kind,
        length,
        body,
    )


def talk(scenario: Callable[[ApiClient, socket.socket], Awaitable[None]]) -> None:
    """Run *scenario* with a client and the monitor's end of its connection."""

    async def main() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        client = ApiClient(ours, "The monitor", "/api/v1/")
        with theirs:
            await scenario(client, theirs)
            client.close()

    asyncio.run(asyncio.wait_for(main(), 60))


async def received(peer: socket.socket) -> bytes:
    return await asyncio.get_running_loop().sock_recv(peer, 65536)


def test_a_length_that_is_no_number_for_python() -> None:
    async def scenario(client: ApiClient, peer: socket.socket) -> None:
        peer.send(b"HTTP/1.1 200 \r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n")
        with pytest.raises(HypervisorError, match="with nonsense"):
            await client.call("GET", "vmm.ping")

    talk(scenario)


def test_answers_come_in_pieces_or_two_at_once() -> None:
    async def scenario(client: ApiClient, peer: socket.socket) -> None:
        asking = asyncio.create_task(client.call("GET", "vmm.ping"))
        assert (await received(peer)).startswith(b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n")
        for byte in answer("200", b'{"version":"54.0.0"}'):
            peer.send(bytes((byte,)))
            await asyncio.sleep(0)
        assert await asking == {"version": "54.0.0"}
        # What is already there of the next answer is kept.
        peer.send(answer("204") + answer("200", b"[1]"))
        assert await client.call("PUT", "vm.pause") is None
        assert await client.call("GET", "x") == [1]

    talk(scenario)


def test_a_request_carries_its_document_and_descriptors() -> None:
    async def scenario(client: ApiClient, peer: socket.socket) -> None:
        read, write = os.pipe()
        asking = asyncio.create_task(client.call("PUT", "vm.add-net", {"id": "é"}, fds=[write]))
        await asyncio.sleep(0.01)
        data, rights, _, _ = peer.recvmsg(65536, socket.CMSG_SPACE(4))
        given = array.array("i", rights[0][2])[0]
        assert data.endswith(b'Content-Length: 15\r\n\r\n{"id":"\\u00e9"}')
        os.write(given, b"x")
        assert os.read(read, 1) == b"x"
        peer.send(answer("200", b"{}"))
        await asking
        for fd in (read, write, given):
            os.close(fd)

    talk(scenario)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        ("404", NOT_CREATED, "Error from API: The VM info is not available: VM is not created"),
        ("400", b'{"fault_message":"Bad \\u0007 thing"}', r"Bad \x07 thing"),
        ("500", b'["No room\\n\\nStack backtrace:\\n 0: <unknown>"]', "No room"),
        ("500", b"", "500"),
        ("500", b"\xff not json", "\ufffd not json"),
    ],
)
def test_refusals_are_quoted(status: str, body: bytes, words: str) -> None:
    async def scenario(client: ApiClient, peer: socket.socket) -> None:
        peer.send(answer(status, body))
        with pytest.raises(Refused) as caught:
            await client.call("PUT", "vm.boot")
        assert str(caught.value.message) == f"The monitor refused PUT vm.boot: {words}"
        assert caught.value.status == int(status)
        # It can be asked again.
        peer.send(answer("204"))
        await client.call("PUT", "vm.boot")

    talk(scenario)


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 \r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY + 1),
        answer("200", b"{"),
        b"x" * (MAX_HEAD + 1),
    ],
)
def test_nonsense_is_named(said: bytes) -> None:
    async def scenario(client: ApiClient, peer: socket.socket) -> None:
        peer.send(said)
        with pytest.raises(HypervisorError, match=r"The monitor answered GET vm\.info with nonsense"):
            await client.call("GET", "vm.info")

    talk(scenario)


def test_one_that_hangs_or_goes_is_of_no_more_use() -> None:
    async def hangs(client: ApiClient, peer: socket.socket) -> None:
        peer.send(answer("200", b"[1]")[:-1])
        with pytest.raises(HypervisorError, match=r"did not answer GET x within 0\.05 s"):
            await client.call("GET", "x", timeout_s=0.05)
        peer.send(b"]")  # too late, and not the answer to what is asked next
        with pytest.raises(HypervisorError, match="not connected any more"):
            await client.call("GET", "y")

    async def goes(client: ApiClient, peer: socket.socket) -> None:
        peer.close()
        with pytest.raises(HypervisorError, match="went away while it was to answer PUT z"):
            await client.call("PUT", "z", {"a": 1})
        assert client.is_lost

    talk(hangs)
    talk(goes)


def test_who_is_cancelled_leaves_the_answer_to_nobody() -> None:
    async def scenario(client: ApiClient, peer: socket.socket) -> None:
        first = asyncio.create_task(client.call("GET", "first"))
        await received(peer)
        read, write = os.pipe()
        second = asyncio.create_task(client.call("PUT", "second", {}, fds=[write]))
        await asyncio.sleep(0.01)
        first.cancel()
        second.cancel()
        os.close(write)
        third = asyncio.create_task(client.call("GET", "third"))
        peer.send(answer("200", b"[1]"))
        await asyncio.sleep(0.01)
        data, rights, _, _ = peer.recvmsg(65536, socket.CMSG_SPACE(4))
        assert b"second" in data  # it had been asked for
        given = array.array("i", rights[0][2])[0]
        os.write(given, b"x")
        assert os.read(read, 1) == b"x"
        peer.send(answer("200", b"[2]") + answer("200", b"[3]"))
        assert await third == [3]
        os.close(given)
        os.close(read)

    talk(scenario)


def test_words_are_bounded_and_said_once() -> None:
    assert words_of(b'["a","a","b"]') == "a: b"
    assert len(words_of(b'["' + b"w" * 9999 + b'"]')) == 500
    assert words_of(b"3") == "3"

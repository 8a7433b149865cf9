"""Questions for names out of a guest, carried by the engine's own code to a resolver in its network namespace.

The agent is an ordinary process, and its guest another namespace: this host's."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import netlab
import pytest
from agent_host import HostAgent
from waiting import PATIENCE

from kata import sysio
from kata.agent.client import AgentClient
from kata.engine.forwarding import names
from kata.network import sk_lookup
from kata.ttrpc.client import Client

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(600)]

PLACE = (names.ADDRESS, names.PORT)
QUESTION = b"\x12\x34\x01\0\0\1\0\0\0\0\0\0\3web\0\0\1\0\1"


@pytest.fixture
def host(run_directory: Path) -> Iterator[HostAgent]:
    with HostAgent(run_directory) as agent:
        agent.connect().health()
        yield agent


def _serve(resolver: Callable[[bytes], bytes]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(PLACE)
        while True:
            question, asker = sock.recvfrom(1 << 16)
            if answer := resolver(question):
                sock.sendto(answer, asker)


def play(
    host: HostAgent,
    guest: Callable[[], dict[str, Any]],
    resolver: Callable[[bytes], bytes] | None = None,
    *,
    further: bool = False,
) -> dict[str, Any]:
    """What a program finds in the guest, while the engine is in a namespace with a resolver (or without one)."""

    def engine() -> dict[str, Any]:
        if resolver is not None:
            threading.Thread(target=_serve, args=(resolver,), daemon=True).start()
            netlab.Server(PLACE, b"by TCP")
        redirect = sk_lookup.LoopbackRedirect()  # as in a real sandbox's
        complaints: list[str] = []

        async def connect() -> Client:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(host.path))
            sock.setblocking(False)
            return await Client.connect(sock)

        async def run() -> dict[str, Any]:
            agent = AgentClient(await connect(), dial=connect if further else None)
            await agent.negotiate_features()
            sandbox = SimpleNamespace(
                living_agent=agent, log=complaints.append, create_task=asyncio.ensure_future
            )
            carried = names.Names(cast(Any, sandbox), cast(Any, sandbox))
            await carried.start(agent)
            try:
                return await asyncio.to_thread(in_the_guest, guest)
            finally:
                carried.close()
                await asyncio.sleep(0.2)
                agent.close()

        try:
            return {**asyncio.run(run()), "complaints": complaints}
        finally:
            redirect.close()

    def in_the_guest(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        fd = os.open(f"/proc/{host.process.pid}/ns/net", os.O_RDONLY)
        sysio.setns(fd, sysio.CLONE_NEWNET)  # of this thread, which does nothing else
        os.close(fd)
        return work()

    with netlab.lab(default_routes=False) as (name, _):
        found: dict[str, Any] = netlab.within(name, engine)
        return found


def client() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE)
    return sock


@pytest.mark.parametrize("further", [False, True], ids=["serial", "vsock"])
def test_a_resolver_in_the_engines_namespace_answers_the_guest(host: HostAgent, further: bool) -> None:
    """By the one channel to the agent that there is, and by connections of their own."""

    def guest() -> dict[str, Any]:
        found: dict[str, Any] = {}
        with client() as one, client() as other, socket.socket() as stream:
            # The port is free for a server of names in a container.
            other.bind(("0.0.0.0", names.PORT))
            one.sendto(b"x" * 5000, PLACE)  # too long: as if it had got lost
            one.sendto(b"1", PLACE)
            other.sendto(b"2", PLACE)
            found["one"], found["from"] = one.recvfrom(1 << 16)
            found["other"] = other.recv(1 << 16)
            stream.settimeout(PATIENCE)
            stream.connect(PLACE)
            stream.sendall(b"?")
            found["stream"] = stream.recv(100)
        return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}

    found = play(host, guest, lambda question: question * 60000, further=further)
    assert found == {
        "one": "1" * 60000,
        "from": list(PLACE),
        "other": "2" * 60000,
        "stream": "by TCP",
        "complaints": [],
    }


def test_no_more_questions_than_may_wait(host: HostAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "QUESTIONS", 4)
    monkeypatch.setattr(names, "ANSWER_S", 1.0)

    def guest() -> dict[str, Any]:
        began = time.monotonic()
        with client() as sock:
            for number in range(9):
                sock.sendto(bytes([number]), PLACE)
            # What is not answered is given up, and lets others in: twice four of them before the last.
            return {"answer": sock.recv(100)[0], "has waited": time.monotonic() - began > 1.9}

    found = play(host, guest, lambda question: question if question == b"\x08" else b"")
    assert found == {"answer": 8, "has waited": True, "complaints": []}


def test_without_a_resolver_the_guest_hears_of_it_at_once(host: HostAgent) -> None:
    def guest() -> dict[str, Any]:
        began = time.monotonic()
        with client() as sock, socket.socket() as stream:
            sock.sendto(b"no question", PLACE)
            sock.sendto(QUESTION + b"more", PLACE)
            answer = sock.recv(100)
            stream.settimeout(PATIENCE)
            stream.connect(PLACE)
            try:
                end = stream.recv(1)
            except ConnectionResetError:
                end = b""
        return {"answer": answer.hex(), "end": end.hex(), "is quick": time.monotonic() - began < 5}

    found = play(host, guest)
    assert found.pop("answer") == (b"\x12\x34\x81\x82" + QUESTION[4:]).hex()
    assert found.pop("complaints") == [
        f"the resolver at {names.ADDRESS} does not answer: Connection refused",
        f"resolver at {names.ADDRESS}: cannot connect to the host's socket: Connection refused",
    ]
    assert found == {"end": "", "is quick": True}


@pytest.mark.parametrize(
    "question",
    [
        b"",
        QUESTION[:11],
        QUESTION[:12],
        QUESTION[:-1],
        b"\x12\x34\x81" + QUESTION[3:],
        QUESTION[:12] + b"\xc0" * 9,
    ],
)
def test_what_is_no_question_has_no_answer(question: bytes) -> None:
    assert names.failure(question) == b""

"""The resolver at 127.0.0.11, asked for a guest: in a network namespace of the tests', with a resolver of theirs."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from apart import in_network

from kata.engine.forwarding import names
from kata.network import rtnetlink

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")

QUESTION = (
    struct.pack(">HHHHHH", 0x1234, 0x0100, 1, 0, 0, 0) + b"\3www\7example\0" + struct.pack(">HH", 1, 1)
)


def test_a_failure_answers_its_question_and_nothing_else() -> None:
    answer = names.failure(QUESTION)
    number, flags, questions, *others = struct.unpack(">HHHHHH", answer[:12])
    assert (number, questions, others) == (0x1234, 1, [0, 0, 0])
    assert flags & 0x8000, "it is an answer"
    assert flags & 0x0100, "recursion was desired"
    assert flags & 0xF == 2, "server failure"
    assert answer[12:] == QUESTION[12:]
    assert names.failure(QUESTION + b"additional records")[12:] == QUESTION[12:]


@pytest.mark.parametrize(
    "question",
    [
        b"",
        QUESTION[:12],
        QUESTION[:-1],
        QUESTION[:2] + b"\x81\x80" + QUESTION[4:],  # an answer
        QUESTION[:4] + b"\0\2" + QUESTION[6:],  # two questions
        QUESTION[:12] + b"\xc0\x0c" + QUESTION[14:],  # a pointer
        QUESTION[:12] + b"\x3f" + b"x" * 30,  # a name that does not end
        bytes(12) + bytes(600),
    ],
)
def test_what_is_no_question_gets_no_answer(question: bytes) -> None:
    assert names.failure(question) == b""


class Guest:
    """Notes what it is answered."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes]] = []
        self.messages: list[str] = []
        tasks: Any = SimpleNamespace(log=self.messages.append, create_task=asyncio.ensure_future)
        machine: Any = SimpleNamespace(living_agent=None)
        self.names = names.Names(machine, tasks)
        taking: Any = SimpleNamespace(answer=lambda number, data: self.answers.append((number, data)))
        self.names._datagrams = taking

    async def ask(self, *numbers: int) -> None:
        self.answers.clear()
        for number in numbers:
            self.names._asked(number, QUESTION)
        async with asyncio.timeout(10):
            while len(self.answers) < len(numbers):
                await asyncio.sleep(0.01)
        self.answers.sort()


class Resolver:
    """Answers datagrams on 127.0.0.11 in the calling thread's network namespace."""

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((names.ADDRESS, names.PORT))
        self._thread = threading.Thread(target=self._serve, args=(answer,))
        self._thread.start()

    def _serve(self, answer: Callable[[bytes], bytes]) -> None:
        while True:
            question, who = self.sock.recvfrom(1000)
            if question == b"end":
                return
            self.sock.sendto(answer(question), who)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"end", (names.ADDRESS, names.PORT))
        self._thread.join()
        self.sock.close()


@needs_root
def test_questions_are_asked_where_dockerd_listens() -> None:
    async def ask() -> None:
        guest = Guest()
        # Nobody is there: a failure for each, and one line.
        await guest.ask(1, 2)
        assert guest.answers == [(1, names.failure(QUESTION)), (2, names.failure(QUESTION))]
        assert guest.messages == ["the resolver at 127.0.0.11 does not answer: Connection refused"]
        resolver = Resolver(lambda question: question + b" is answered")
        try:
            await guest.ask(3)
            assert guest.answers == [(3, QUESTION + b" is answered")]
        finally:
            resolver.close()
        # It has gone again, which is news.
        await guest.ask(4)
        assert guest.answers == [(4, names.failure(QUESTION))]
        assert len(guest.messages) == 2
        guest.names.close()

    def work() -> None:
        with rtnetlink.Rtnl() as rtnl:
            rtnl.bring_up(1)
        asyncio.run(ask())

    in_network(work)


@needs_root
def test_a_question_without_an_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "ANSWER_S", 0.05)

    async def ask() -> None:
        guest = Guest()
        await guest.ask(1)
        assert guest.answers == [(1, b"")], "the guest's place for a question is free again"
        assert guest.messages == []
        guest.names._asked(2, QUESTION)
        guest.names.close()
        await asyncio.sleep(0.1)
        assert len(guest.answers) == 1, "after the end nobody is answered"

    def work() -> None:
        with rtnetlink.Rtnl() as rtnl:
            rtnl.bring_up(1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind((names.ADDRESS, names.PORT))
            asyncio.run(ask())

    in_network(work)


@needs_root
def test_by_tcp_the_kernels_words_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect() -> None:
        made = names._Resolver()
        tasks: Any = None
        with pytest.raises(ConnectionRefusedError, match="Connection refused"):
            await made.connect(tasks)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind((names.ADDRESS, names.PORT))
            listener.listen()
            with await made.connect(tasks) as ours, listener.accept()[0] as theirs:
                theirs.sendall(b"x")
                assert await asyncio.get_running_loop().sock_recv(ours, 1) == b"x"

    def work() -> None:
        with rtnetlink.Rtnl() as rtnl:
            rtnl.bring_up(1)
        asyncio.run(connect())

    in_network(work)

"""Carries a guest's questions for names to the resolver that Docker puts at 127.0.0.11, or answers them.

On a network of a user's own, dockerd answers such questions in the container's network namespace: rules there turn
what is for port 53 of that address to sockets of its own. That namespace is the sandbox's, on the host, and its
loopback is not the guest's. So the agent has that port in the guest, and the engine, which is in the namespace, asks
there.

* The guest says nothing about where a question goes: always to port 53 of 127.0.0.11, by the rules of whatever
  dockerd runs by then.
* In networks of `kata network` there is no dockerd: the engine knows their members (`kata.network.own_names`), and
  asks the user network's name servers for all else.
* At most `QUESTIONS` datagrams of a sandbox and `CONNECTIONS` connections at a time. A datagram that is not answered in
  time is given up.
* Nothing of it is there unless a container's ``resolv.conf`` names that address.

Source: RFC 1035, sections 4.1 (messages) and 4.2 (transport).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket

from kata.agent import dial
from kata.engine.forwarding import sockets
from kata.network import resolver

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.agent.client import AgentClient
    from kata.engine.access import MachineAccess
    from kata.engine.tasks import Tasks
    from kata.network import own_names
    from kata.ttrpc.status import ConnectionLost, TtrpcError

ADDRESS = resolver.DOCKER
PORT = 53
QUESTIONS = 64
CONNECTIONS = 16
ANSWER_S = 15.0
"""dockerd asks several servers, one after the other, for a name from outside; no program waits longer."""
SERVER_S = 5.0
"""Then the next server is asked."""
CONNECT_S = 10.0
MAX_ANSWER = 65535
_HEADER = 12
_DATAGRAMS, _STREAMS = 1 << 31, (1 << 31) + 1
"""Numbers that no volume's socket gets."""
_SERVFAIL = 2


class Names:
    """The resolver, for a guest.

    Args:
        machine: Its guest asks.
        tasks: The engine's; its event loop runs in the network namespace.
        own: What the engine answers itself; None for nothing, where dockerd answers.
    """

    def __init__(self, machine: MachineAccess, tasks: Tasks, own: own_names.OwnNames | None = None) -> None:
        self._machine = machine
        self._own = own
        self._servers = [ADDRESS] if own is None else own.servers
        self._engine_tasks = tasks
        self._datagrams = dial.Datagrams(QUESTIONS, self._asked, self._ended)
        self._relay = sockets.Relay(machine, tasks, asyncio.Semaphore(CONNECTIONS))
        self._relay.add(_Resolver(self._servers[0] if self._servers else ADDRESS))
        self._tasks: set[asyncio.Task[None]] = set()
        self._reported = False
        self._closed = False

    async def start(self, agent: AgentClient) -> None:
        """Have the port in the guest.

        Raises:
            KataError: See `AgentClient`.
        """
        address = resolver.pack(ADDRESS)
        await dial.listen_loopback(agent, _DATAGRAMS, address, PORT, datagrams=True)
        await dial.exchange(agent, _DATAGRAMS, self._datagrams)
        await self._relay.listen(agent)

    def close(self) -> None:
        """Answer no more. The guest is about to go."""
        self._closed = True
        self._ended(None)
        self._relay.close()

    def _ended(self, error: ConnectionLost | TtrpcError | None) -> None:
        for task in self._tasks:
            task.cancel()
        agent = None if self._closed else self._machine.living_agent
        if error is not None and agent is not None:
            self._engine_tasks.create_task(self._explain(agent, error))

    async def _explain(self, agent: AgentClient, error: ConnectionLost | TtrpcError) -> None:
        """Tell why there are no more questions; where the guest has broken the protocol, that is its end."""
        reason = await agent.explain(error)
        self._engine_tasks.log(f"the guest asks for no more names: {reason.message}")

    def _asked(self, number: int, question: bytes) -> None:
        task = asyncio.create_task(self._answer(number, question))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, number: int, question: bytes) -> None:
        answer = b""
        try:
            answer = await asyncio.wait_for(self._find(question), ANSWER_S)
            self._reported = False
        except TimeoutError:
            pass  # as with a datagram that has got lost
        except OSError as error:
            # Who has asked hears of it, and need not wait; with dockerd away there are nothing but refusals.
            answer = failure(question)
            if not self._reported:
                self._reported = True
                self._engine_tasks.log(
                    f"the resolver at {' '.join(self._servers)} does not answer: {error.strerror}"
                )
        self._datagrams.answer(number, answer)

    async def _find(self, question: bytes) -> bytes:
        if self._own is not None:
            answer = await self._engine_tasks.run_blocking(self._own.answer, question)
            if answer:
                return answer
        failed = OSError(errno.EDESTADDRREQ, "there is none")
        for server in self._servers:
            try:
                return await asyncio.wait_for(ask(question, server), SERVER_S)
            except TimeoutError:
                failed = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            except OSError as error:
                failed = error
        raise failed


class _Resolver(sockets.Socket):
    """The same by TCP."""

    __slots__ = ("_server",)

    def __init__(self, server: str = ADDRESS) -> None:
        super().__init__(_STREAMS, f"resolver at {server}")
        self._server = server

    async def listen(self, agent: AgentClient) -> None:
        """See `sockets.Socket`."""
        await dial.listen_loopback(agent, self.number, resolver.pack(ADDRESS), PORT)

    async def connect(self, tasks: Tasks) -> socket.socket:
        """See `sockets.Socket`."""
        sock = socket.socket(_family(self._server), socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            connecting = asyncio.get_running_loop().sock_connect(sock, (self._server, PORT))
            await asyncio.wait_for(connecting, CONNECT_S)
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError):  # whose own words are asyncio's, or none
                number = error.errno or errno.ETIMEDOUT
                raise OSError(number, os.strerror(number)) from None
            raise
        return sock


def _family(server: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in server else socket.AF_INET


async def ask(question: bytes, server: str = ADDRESS) -> bytes:
    """What a resolver answers to a datagram, in the network namespace of the calling thread.

    Raises:
        OSError: There is none.
    """
    loop = asyncio.get_running_loop()
    with socket.socket(_family(server), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect((server, PORT))
        await loop.sock_sendall(sock, question)
        return await loop.sock_recv(sock, MAX_ANSWER)


def failure(question: bytes) -> bytes:
    """The answer "server failure" to a question with one name; empty for anything else."""
    at = _HEADER
    while at < len(question) and 0 < question[at] < 64:
        at += 1 + question[at]
    end = at + 5  # the root's label, type and class
    if len(question) < end or question[at] or question[2] & 0x80 or question[4:6] != b"\0\1":
        return b""
    # Operation and "recursion desired" as asked, and recursion available.
    flags = bytes((question[2] & 0x79 | 0x80, 0x80 | _SERVFAIL))
    return question[:2] + flags + b"\0\1" + bytes(6) + question[_HEADER:end]

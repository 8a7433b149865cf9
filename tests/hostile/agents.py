"""Agents that answer wrongly: every call ends with an answer or an error of ours, and the connection with it."""

from __future__ import annotations

import asyncio
import random
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import child
import mutate
from agent_double import AgentDouble

from kata.agent.client import AgentClient
from kata.errors import KataError
from kata.ttrpc.client import Client

_CALL_S = 3.0
_EACH = 25
"""Connections a child: most of a child's time is Python's start of a loop."""


def sweep(directory: Path, count: int, seed: int) -> child.Tally:
    """Try so many connections.

    Args:
        directory: Unused.
        count: How many.
        seed: Of the choice of damage.
    """
    tally = child.Tally("agents")
    for first in range(0, count, _EACH):
        numbers = range(first, min(first + _EACH, count))
        name = f"agents {numbers.start} to {numbers.stop - 1} (seed {seed})"
        outcome = child.run(name, partial(_run, numbers, seed))
        tally.add(outcome, lambda status: status == 0)
        tally.count += len(numbers) - 1
    return tally


def _run(numbers: range, seed: int) -> int:
    return asyncio.run(_connections(numbers, seed))


async def _connections(numbers: range, seed: int) -> int:
    loop = asyncio.get_running_loop()
    stray: list[str] = []
    loop.set_exception_handler(
        lambda _, context: stray.append(str(context.get("exception") or context["message"]))
    )
    await asyncio.gather(
        *(_one(random.Random(f"{seed}/{number}"), stray, f"connection {number}") for number in numbers)
    )
    if stray:
        print("\n".join(stray[:5]), file=sys.stderr)
    return 1 if stray else 0


async def _one(random_: random.Random, stray: list[str], name: str) -> None:
    """A client, an agent, and in between somebody who changes what the agent says."""
    agent = AgentDouble()
    server = agent.server()
    near, between_near = socket.socketpair()
    between_far, far = socket.socketpair()
    served = asyncio.create_task(server.attach(far))
    client = AgentClient(await Client.connect(near))
    to_agent = asyncio.create_task(_carry(between_near, between_far, None))
    to_client = asyncio.create_task(_carry(between_far, between_near, random_))
    calls: list[Any] = [
        client.check(_CALL_S),
        client.negotiate_features(),
        client.details(),
        client.stats("c"),
        client.wait("c", ""),
    ]
    results = await asyncio.gather(
        *(asyncio.wait_for(call, _CALL_S + 1) for call in calls), return_exceptions=True
    )
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, (KataError, TimeoutError)):
            stray.append(f"{name}: {type(result).__name__}: {result}")
    client.close()
    for task in (to_agent, to_client, served):
        task.cancel()
    await asyncio.gather(to_agent, to_client, served, return_exceptions=True)
    for sock in (between_near, between_far):
        sock.close()


async def _carry(source: socket.socket, target: socket.socket, random_: random.Random | None) -> None:
    loop = asyncio.get_running_loop()
    source.setblocking(False)
    target.setblocking(False)
    while data := await loop.sock_recv(source, 1 << 16):
        if random_ is not None:
            data = mutate.damaged(data, random_) if random_.random() < 0.7 else random_.randbytes(40)
        await loop.sock_sendall(target, data)

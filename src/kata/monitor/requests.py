"""What all handlers of requests share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from aiohttp import web

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.monitor.discovery import Sandbox
    from kata.monitor.node import Node


WRITE_S = 30.0
"""How long a client may take to read what it has asked for, or one event of a stream."""


@contextlib.asynccontextmanager
async def reading(request: web.Request) -> AsyncIterator[None]:
    """Have a client read what is written in the block in time; else its connection ends.

    Raises:
        ConnectionError: It did not. What waits for it would stay in memory for as long as it likes.
    """
    try:
        async with asyncio.timeout(WRITE_S):
            yield
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionError(f"the client has not read for {WRITE_S:g} s") from None


def refused(status: int, message: str, hint: str) -> web.Response:
    """An answer to a request that is not granted."""
    told = {"error": message, **({"hint": hint} if hint else {})}
    return web.json_response(told, status=status)


def find(node: Node, request: web.Request) -> Sandbox:
    """The sandbox that a request names, in its path or its query.

    Raises:
        HTTPBadRequest: It names none.
        HTTPNotFound: There is none of that name.
    """
    name = request.match_info.get("id") or request.query.get("sandbox", "")
    if not name:
        raise web.HTTPBadRequest(reason="No sandbox is named")
    sandbox = node.find(name)
    if sandbox is None:
        raise web.HTTPNotFound(reason="No such sandbox")
    return sandbox

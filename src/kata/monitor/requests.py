"""What all handlers of requests share."""

from __future__ import annotations

from aiohttp import web

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.monitor.discovery import Sandbox
    from kata.monitor.node import Node


def refused(status: int, message: str, hint: str) -> web.Response:
    """An answer to a request that is not granted."""
    told = {"error": message, **({"hint": hint} if hint else {})}
    return web.json_response(told, status=status)


def find(node: Node, request: web.Request) -> Sandbox:
    """The sandbox that a request names, in its path or its query.

    Raises:
        HTTPNotFound: There is none of that name.
    """
    sandbox = node.find(request.match_info.get("id") or request.query.get("sandbox", ""))
    if sandbox is None:
        raise web.HTTPNotFound(reason="No such sandbox")
    return sandbox

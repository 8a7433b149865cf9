"""Bounds what those can hold who connect: how many at a time, and how long without a request that is admitted."""

from __future__ import annotations

import asyncio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aiohttp import web
    from aiohttp.web_protocol import RequestHandler

MOST = 256
"""Maximum number of connections; Prometheus has one, a browser up to six."""
PATIENCE_S = 20.0
"""How long a connection may be there that has not made a request which is admitted."""


class Connections:
    """Makes the protocols of a server's connections.

    Args:
        server: Whose.
        most: Maximum number of connections at a time; further ones are closed at once.
        patience_s: How long one may be there without being admitted.
    """

    def __init__(self, server: web.Server, most: int = MOST, patience_s: float = PATIENCE_S) -> None:
        self._server = server
        self._most = most
        self._patience_s = patience_s
        self._waiting: dict[RequestHandler, asyncio.TimerHandle] = {}

    def __call__(self) -> asyncio.Protocol:
        """The protocol of a new connection."""
        loop = asyncio.get_running_loop()
        handler: RequestHandler = self._server()
        if len(self._server.connections) + self._in_handshake() >= self._most:
            return _Refusal()
        self._waiting[handler] = loop.call_later(self._patience_s, self._give_up, handler)
        return handler

    def admitted(self, handler: object) -> None:
        """A request of this connection has been admitted: it may stay."""
        timer = self._waiting.pop(handler, None)  # type: ignore[call-overload]
        if timer is not None:
            timer.cancel()

    def _in_handshake(self) -> int:
        """How many have not been connected yet, as far as can be told: they may have gone already."""
        known = set(self._server.connections)
        return sum(1 for handler in self._waiting if handler not in known)

    def _give_up(self, handler: RequestHandler) -> None:
        del self._waiting[handler]
        if handler.transport is not None:
            handler.transport.abort()


class _Refusal(asyncio.Protocol):
    """Closes its connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()

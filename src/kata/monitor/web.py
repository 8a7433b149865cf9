"""What the monitor answers over HTTP; docs/monitor.md has the list."""

from __future__ import annotations

import asyncio
import html
import logging
import os
import re
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import quote

from aiohttp import web

from kata import paths
from kata.monitor import access, life
from kata.monitor.engines import Unreachable
from kata.monitor.expose import Metrics
from kata.monitor.requests import find, reading, refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.monitor.connections import Connections
    from kata.monitor.node import Node

MAX_TAIL_BYTES = 1 << 20
DEFAULT_EVENTS, MAX_EVENTS = 200, 10_000
DEFAULT_TAIL_BYTES = 64 << 10
KEEPALIVE_S = 15.0
"""How often a stream without news sends a comment, so that a connection that is gone is noticed."""
PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page")
_LOG = logging.getLogger("kata.monitor")

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""On every answer. The page shows what guests say, so it may run and load nothing but its own files."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Web:
    """The routes.

    Args:
        node: What is known of this node.
        metrics: What it answers Prometheus.
        secrets: Certificate and token.
        names: The names under which a browser may ask; empty takes any, where a token is asked for.

    Attributes:
        connections: Told of those whose requests are admitted, once there are any.
    """

    def __init__(
        self,
        node: Node,
        metrics: Metrics,
        secrets: access.Secrets,
        names: Iterable[str],
    ) -> None:
        self._node = node
        self._secrets = secrets
        self._names = frozenset(names)
        self._metrics = metrics
        self.connections: Connections | None = None
        self._complaint = ""

    def application(self) -> web.Application:
        """The application, to be served."""
        application = web.Application(middlewares=[self._guard], client_max_size=1 << 16)
        application.add_routes(
            [
                web.get("/metrics", self._metrics.answer),
                web.get("/sandboxes", self.sandboxes),
                web.get("/agent-url", self.agent_url),
                web.get("/healthz", self.healthz),
                web.get("/api/v1/sandboxes", self.states),
                web.get("/api/v1/sandboxes/{id}", self.state),
                web.get("/api/v1/sandboxes/{id}/console", self.console),
                web.get("/api/v1/sandboxes/{id}/logs", self.logs),
                web.get("/api/v1/events", self.events),
                web.get("/api/v1/stream", self.stream),
                web.get("/", self.page),
                web.get("/{file:[A-Za-z0-9_-]+(?:[.][A-Za-z0-9_-]+)*}", self.page),
            ]
        )
        application.on_response_prepare.append(self._headers)
        return application

    # ---- of every request ----

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if (complaint := self._secrets.refresh()) and complaint != self._complaint:
            _LOG.warning("%s; what was read before goes on to count", complaint)
        self._complaint = complaint
        if self._names and access.host_of(request.headers.get("Host", "")) not in self._names:
            return refused(
                421, "this monitor has another name", "ask for localhost, or start it with --allow-host"
            )
        if self._secrets.has_token and not self._secrets.admits(request.headers.get("Authorization", "")):
            answer = refused(401, "a token is needed", "Authorization: Bearer TOKEN")
            answer.headers.add("WWW-Authenticate", 'Bearer realm="kata-monitor"')
            # Browsers ask for a name, which does not matter, and a password, which is the token.
            answer.headers.add("WWW-Authenticate", 'Basic realm="kata-monitor", charset="UTF-8"')
            return answer
        if self.connections is not None:
            self.connections.admitted(request.protocol)
        _LOG.debug("%s %s", request.method, request.path_qs)
        try:
            return await handler(request)
        except web.HTTPException as error:
            return refused(error.status, error.reason.lower(), "")
        except Unreachable as error:
            return refused(502, str(error), "kata ps, kata inspect")
        except ConnectionError as error:
            _LOG.info("an answer to %s was not taken: %s", request.path, error)
            return refused(500, "nobody takes this answer", "")
        except Exception as error:
            from kata import crash

            told = crash.explain(error, "kata-monitor")
            _LOG.error("%s (%s)", told.message, told.hint)
            return refused(500, "the monitor met a fault of its own", "see its log")

    async def _headers(self, request: web.Request, response: web.StreamResponse) -> None:
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        response.headers.pop("Server", None)

    # ---- as the original ----

    async def sandboxes(self, request: web.Request) -> web.StreamResponse:
        """The ids of this node's sandboxes: a line each, or a list of links for a browser."""
        ids = [one.id for one in self._node.sandboxes()]
        if "text/html" in request.headers.get("Accept", ""):
            items = "".join(
                f'<li>{html.escape(one)}: <a href="/metrics?sandbox={quote(one)}">metrics</a>, '
                f'<a href="/agent-url?sandbox={quote(one)}">agent</a></li>\n'
                for one in ids
            )
            text = f"<!doctype html>\n<title>Sandboxes</title>\n<h1>Sandboxes</h1>\n<ul>\n{items}</ul>\n"
            return web.Response(text=text, content_type="text/html")
        return web.Response(text="".join(f"{one}\n" for one in ids))

    async def agent_url(self, request: web.Request) -> web.StreamResponse:
        """Where the agent of a sandbox listens."""
        return await self._passed_on(request, "/agent-url", 4096)

    async def healthz(self, request: web.Request) -> web.StreamResponse:
        """That the monitor answers, and what keeps it from knowing all sandboxes."""
        about = {"status": "ok", "sandboxes": len(self._node.sandboxes()), "watching": not self._node.blind}
        return web.json_response(about)

    # ---- for the page ----

    async def states(self, request: web.Request) -> web.StreamResponse:
        """All sandboxes."""
        return web.Response(body=await self._node.sampler.sample(), content_type="application/json")

    async def state(self, request: web.Request) -> web.StreamResponse:
        """One sandbox."""
        found = await self._node.sampler.state(find(self._node, request))
        return web.Response(body=found, content_type="application/json")

    async def console(self, request: web.Request) -> web.StreamResponse:
        """The end of a guest's console."""
        return await self._passed_on(request, f"/kata/v1/console?tail={tail(request)}")

    async def logs(self, request: web.Request) -> web.StreamResponse:
        """The end of a container's log."""
        container = request.query.get("container", "")
        if not paths.may_be_name(container):
            return refused(400, "container is not the id of a container", "?container=ID")
        return await self._passed_on(request, f"/kata/v1/logs?container={container}&tail={tail(request)}")

    async def _passed_on(
        self, request: web.Request, target: str, most: int = MAX_TAIL_BYTES
    ) -> web.StreamResponse:
        """What the engine of the named sandbox answers, as plain text whatever it is; why it refuses, as JSON."""
        async with self._node.engines.get(find(self._node, request), target) as answer:
            status = answer.status if answer.status in (200, 400, 404, 409, 501, 503) else 502
            text = answer.body[-most:].decode("utf-8", "replace")
        if status != 200:
            message, _, hint = text[:4096].rstrip("\n").partition("\nhint: ")
            return refused(status, message or f"its engine answered with {answer.status}", hint)
        return web.Response(text=text, status=status, content_type="text/plain", charset="utf-8")

    async def events(self, request: web.Request) -> web.StreamResponse:
        """What has happened to the sandboxes."""
        text = request.query.get("limit", str(DEFAULT_EVENTS))
        if not re.fullmatch(r"[0-9]{1,9}", text):
            return refused(400, "limit is not a number of events", f"?limit={DEFAULT_EVENTS}")
        body = await asyncio.to_thread(life.newest, min(int(text), MAX_EVENTS))
        return web.Response(body=body, content_type="application/json")

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events: ``snapshot``, every *interval* seconds, and ``life``."""
        try:
            interval = float(request.query.get("interval", "2"))
            if not interval > 0:  # nor NaN
                raise ValueError
            watcher = self._node.sampler.attach(interval)
        except ValueError:
            return refused(400, "interval is not a number of seconds", "?interval=2")
        except OverflowError:
            return refused(503, "too many watch already", "close some of the pages")
        try:
            response = web.StreamResponse(
                headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
            )
            await response.prepare(request)
            await response.write(b"retry: 3000\n\n")
            while True:
                try:
                    item = await asyncio.wait_for(watcher.next(), KEEPALIVE_S)
                except TimeoutError:
                    async with reading(request):
                        await response.write(b": still here\n\n")
                    continue
                if item is None:
                    break
                async with reading(request):
                    await response.write(b"event: %s\ndata: %s\n\n" % (item[0].encode(), item[1]))
            return response
        except ConnectionError:
            return response
        finally:
            self._node.sampler.detach(watcher)

    async def page(self, request: web.Request) -> web.StreamResponse:
        """A file of the page."""
        name = request.match_info.get("file", "index.html")
        path = os.path.join(PAGE, name)
        if not os.path.isfile(path):
            return refused(
                404, "there is nothing here", "/, /metrics, /sandboxes, /healthz, /api/v1/sandboxes"
            )
        answer = web.FileResponse(path)
        answer.headers["Cache-Control"] = "no-cache"
        return answer


def tail(request: web.Request) -> int:
    """The bytes that a request for the end of something wants.

    Raises:
        HTTPBadRequest: It does not say a number.
    """
    text = request.query.get("tail", str(DEFAULT_TAIL_BYTES))
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise web.HTTPBadRequest(reason="Tail is not a number of bytes")
    return min(int(text), MAX_TAIL_BYTES)

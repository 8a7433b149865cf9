"""What the monitor answers Prometheus: the route ``/metrics``."""

from __future__ import annotations

import asyncio
import itertools
import logging
import zlib
from collections.abc import Iterable, Iterator

from aiohttp import web

from kata.monitor import merge
from kata.monitor.figures import Figures
from kata.monitor.requests import find, reading, refused
from kata.monitor.scrape import Scraper

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kata.monitor.node import Node

_LOG = logging.getLogger("kata.monitor")
TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
SCRAPE_S = 10.0
"""How long a scrape may take whose client does not say; Prometheus' own default."""
MAX_SCRAPE_S = 120.0
MAX_SCRAPES = 4
"""Scrapes at a time; more are refused, since each holds all sandboxes' metrics."""
_CHUNK = 1 << 18


class Metrics:
    """Scrapes when it is asked to.

    Args:
        node: Whose sandboxes.
        series: Maximum number of series of one sandbox.
    """

    def __init__(self, node: Node, series: int) -> None:
        self._node = node
        self._scraper = Scraper(node.engines, Figures(), series)
        self._scrapes = 0

    def close(self) -> None:
        """End its thread."""
        self._scraper.close()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """All sandboxes' metrics, or one's (``sandbox``), or some families (``filter_family``)."""
        wanted = [one for one in request.query.get("filter_family", "").split(",") if one]
        if self._scrapes >= MAX_SCRAPES:
            return refused(503, f"{MAX_SCRAPES} scrapes are going on already", "scrape less often")
        self._scrapes += 1
        try:
            if "sandbox" in request.query:
                whole = await self._scraper.single(find(self._node, request), wanted)
            else:
                whole = await self._whole(scrape_seconds(request), wanted)
            return await self._exposition(request, whole)
        finally:
            self._scrapes -= 1

    async def _exposition(self, request: web.Request, whole: merge.Merged) -> web.StreamResponse:
        modern = wants_openmetrics(request.headers.get("Accept", ""))
        response = web.StreamResponse(headers={"Content-Type": OPENMETRICS if modern else TEXT})
        response.headers["Vary"] = "Accept, Accept-Encoding"
        packed = accepts_gzip(request.headers.get("Accept-Encoding", ""))
        if packed:
            response.headers["Content-Encoding"] = "gzip"
        try:
            await response.prepare(request)
            if request.method == "HEAD":
                await response.write_eof()
                return response
            async with reading(request):
                await self._write(response, whole, modern=modern, packed=packed)
        except ConnectionError as error:
            _LOG.info("a scrape's answer was not taken: %s", error)
        return response

    async def _write(
        self, response: web.StreamResponse, whole: merge.Merged, *, modern: bool, packed: bool
    ) -> None:
        parts = chunks(whole.openmetrics() if modern else whole.text(), merge.EOF if modern else "")
        packer = zlib.compressobj(4, zlib.DEFLATED, 31)
        for part in parts:
            if packed:
                part = await asyncio.to_thread(packer.compress, part)
            if part:
                await response.write(part)
        if packed:
            await response.write(packer.flush())
        await response.write_eof()

    async def _whole(self, seconds: float, wanted: Sequence[str]) -> merge.Merged:
        pods = self._node.pods
        pods.look_again()
        return await self._scraper.node(
            self._node.sandboxes(), lambda one: pods.labels(one.id), seconds, wanted
        )


def scrape_seconds(request: web.Request) -> float:
    """How long Prometheus waits for the answer: it says so in each request."""
    try:
        given = float(request.headers.get("X-Prometheus-Scrape-Timeout-Seconds", ""))
    except ValueError:
        return SCRAPE_S
    return min(given, MAX_SCRAPE_S) if given > 0 else SCRAPE_S


def weights(header: str) -> Iterator[tuple[str, float]]:
    """The items of a header ``Accept...`` in lower case, without parameters, and their weights (RFC 9110, 12.4.2)."""
    for item in header.lower().split(",")[:64]:
        name, *parameters = (part.strip() for part in item.split(";"))
        weight = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip() == "q":
                try:
                    weight = float(value)
                except ValueError:
                    weight = 0.0
        if name:
            yield name, weight


def wants_openmetrics(accept: str) -> bool:
    """Whether a client would rather have OpenMetrics than the text format."""
    best: dict[str, float] = {}
    for name, weight in weights(accept):
        best[name] = max(weight, best.get(name, 0.0))
    modern = best.get("application/openmetrics-text", 0.0)
    return modern > 0.0 and modern >= best.get("text/plain", 0.0)


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether a client takes gzip."""
    found = dict(weights(accept_encoding))
    return found.get("gzip", found.get("*", 0.0)) > 0.0


def chunks(parts: Iterable[str], end: str) -> Iterator[bytes]:
    """Text in pieces of a size that is worth a write, in UTF-8.

    Args:
        parts: The text.
        end: What comes behind it; empty for nothing.
    """
    waiting: list[str] = []
    size = 0
    for part in itertools.chain(parts, [end] if end else ()):
        waiting.append(part)
        size += len(part)
        if size >= _CHUNK:
            yield "".join(waiting).encode("utf-8", "replace")
            waiting, size = [], 0
    if waiting:
        yield "".join(waiting).encode("utf-8", "replace")

"""What the management socket answers: the original's paths, and some of ours below ``/kata/v1``.

Imported with the first connection. Nothing is measured unless somebody asks, and those who ask at the same time share
one measurement. What the paths mean is a table in ``docs/reference.md``.
"""

from __future__ import annotations

import asyncio
import json
import os

from kata import sysio
from kata.agent.client import AGENT, ASK_S
from kata.engine.lifecycle.boot import CONSOLE_NAME
from kata.engine.lifecycle.sandbox_state import SandboxState
from kata.engine.log import LEVELS
from kata.engine.services import tails
from kata.engine.services.http1 import MAX_BODY, HttpError, HttpServer, Request, Response
from kata.errors import KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

    from kata.agent.client import AgentClient
    from kata.engine.lifecycle.sandbox import Sandbox

METRICS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus 3 takes a target as down whose answer names no version that it knows."""
JSON = "application/json"
DEFAULT_TAIL = 64 * 1024
_GZIP_FROM = 1400
"""A smaller answer is sent as it is."""
_STATUS = {3: 400, 4: 504, 5: 404, 6: 409, 7: 403, 8: 503, 9: 409, 12: 501, 14: 503}
"""gRPC code of an error -> status of the answer; 500 for others."""


class Management:
    """Answers for one sandbox.

    Args:
        sandbox: Which.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._collecting: asyncio.Task[str] | None = None
        self.server = HttpServer(self.answer, sandbox.tasks.log, sysio.give_back_memory)

    async def answer(self, request: Request) -> Response:
        """Answer one request.

        Raises:
            HttpError: With what is wrong.
        """
        route = _ROUTES.get(request.path)
        if route is None and request.path.startswith(_STATS + "/"):
            request.query.setdefault("path", request.path[len(_STATS) :])
            route = _ROUTES[_STATS]
        if route is None:
            raise HttpError(404, f"there is no {request.path!a} here; there are {', '.join(_ROUTES)}")
        handler = route.get("GET" if request.method == "HEAD" else request.method)
        if handler is None:
            allowed = ", ".join([*route, "HEAD"] if "GET" in route else route)
            raise HttpError(405, f"{request.path} can be asked with {allowed}", {"Allow": allowed})
        if self._sandbox.life.state is SandboxState.NEW:
            # Nothing may run in the helper thread before the machine has been started (`Sandbox.power_on`).
            raise HttpError(503, "the sandbox has not been created yet")
        try:
            return _packed(request, await handler(self, request))
        except KataError as error:
            hint = f"\nhint: {error.hint}" if error.hint else ""
            raise HttpError(_STATUS.get(error.grpc_code, 500), f"{error.message}{hint}") from None

    async def _metrics(self, request: Request) -> Response:
        if self._collecting is None or self._collecting.done():
            self._collecting = asyncio.get_running_loop().create_task(_collect(self._sandbox))
        text = await asyncio.shield(self._collecting)
        return Response(text.encode("utf-8", "replace"), METRICS_TEXT)

    async def _state(self, request: Request) -> Response:
        from kata.engine.services.state import state

        return _json(await state(self._sandbox))

    async def _timings(self, request: Request) -> Response:
        return _json(self._sandbox.timings.in_seconds())

    async def _start(self, request: Request) -> Response:
        return _json(self._sandbox.timings.record())

    async def _console(self, request: Request) -> Response:
        path = os.path.join(self._sandbox.run_dir, CONSOLE_NAME)
        return await self._text(tails.of_console, path, _tail(request))

    async def _logs(self, request: Request) -> Response:
        container_id = request.query.get("container") or self._sandbox.id
        self._sandbox.container(container_id, may_come=True)
        own = self._sandbox.settings.container if container_id == self._sandbox.id else None
        if own is None or own.log is None:
            raise HttpError(
                404, f"the output of container {container_id!a} is not kept here, but by its client"
            )
        return await self._text(tails.of_log, own.log.path, _tail(request))

    async def _text(self, read: Callable[[str, int], bytes], path: str, tail: int) -> Response:
        try:
            return Response(await self._sandbox.run_blocking(read, path, tail))
        except OSError as error:
            raise HttpError(500, f"{path} cannot be read: {error.strerror}") from None

    async def _debug_console(self, request: Request) -> Response:
        from kata.engine.services import debug_console

        if debug_console.PROTOCOL not in request.lists("upgrade"):
            raise HttpError(426, "this is a terminal, not a document", {"Upgrade": debug_console.PROTOCOL})
        described = self._sandbox.settings.machine
        if described is None:
            raise HttpError(503, "there is no machine yet")
        debug_console.check(described.guest)
        agent = await self._agent()
        headers = {"Connection": "Upgrade", "Upgrade": debug_console.PROTOCOL}
        return Response(
            b"",
            status=101,
            headers=headers,
            takes_over=lambda reader, writer: debug_console.carry(agent, reader, writer),
        )

    async def _log_level(self, request: Request) -> Response:
        level = request.body.decode("utf-8", "replace").strip()
        if level not in LEVELS:
            raise HttpError(400, f"a level is one of {', '.join(LEVELS)}")
        self._sandbox.tasks.set_level(level)
        return Response(b"")

    # ---- of the original ----

    async def _agent_url(self, request: Request) -> Response:
        vm = self._sandbox.runtime.vm
        if vm is None:
            raise HttpError(503, "there is no machine yet")
        if not vm.channel.url:
            raise HttpError(
                501,
                f"the agent's channel ({vm.channel.kind}) is the engine's alone and has no address\n"
                f"hint: kata-agent-ctl --sandbox {self._sandbox.id}",
            )
        return Response(vm.channel.url.encode())

    async def _agent(self) -> AgentClient:
        """The agent, if it can be asked now: who manages a sandbox does not wait for its start."""
        if self._sandbox.life.state is SandboxState.BOOTING:
            raise HttpError(503, "the guest is not up yet")
        return await self._sandbox.ready()

    async def _get_iptables(self, request: Request) -> Response:
        from kata.proto import agent_pb

        asked = agent_pb.GetIPTablesRequest(is_ipv6=request.path == _IP6TABLES)
        agent = await self._agent()
        answer = await agent.call(AGENT, "GetIPTables", asked, agent_pb.GetIPTablesResponse, ASK_S)
        if len(answer.data) > MAX_BODY:
            raise HttpError(500, "the guest's rules are longer than can be")
        return Response(tails.escaped(answer.data))

    async def _set_iptables(self, request: Request) -> Response:
        from kata.proto import agent_pb

        asked = agent_pb.SetIPTablesRequest(is_ipv6=request.path == _IP6TABLES, data=request.body)
        agent = await self._agent()
        answer = await agent.call(AGENT, "SetIPTables", asked, agent_pb.SetIPTablesResponse, ASK_S)
        return Response(tails.escaped(answer.data[:MAX_BODY]))

    async def _volume_stats(self, request: Request) -> Response:
        from kata.proto import agent_pb, csi_pb

        path = request.query.get("path", "")
        if not path:
            raise HttpError(400, "which volume? ?path=PATH names it")
        asked = agent_pb.VolumeStatsRequest(volume_guest_path=self._volume(path))
        agent = await self._agent()
        found = await agent.call(AGENT, "GetVolumeStats", asked, csi_pb.VolumeStatsResponse, ASK_S)
        usage = [
            {"available": one.available, "total": one.total, "used": one.used, "unit": one.unit}
            for one in found.usage[:8]
        ]
        condition = found.volume_condition
        answer: dict[str, Any] = {"usage": usage}
        if condition is not None:
            answer["volume_condition"] = {"abnormal": condition.abnormal, "message": condition.message[:256]}
        return _json(answer)

    async def _volume_resize(self, request: Request) -> Response:
        from kata.proto import agent_pb, google_pb

        try:
            wanted = json.loads(request.body)
            found = {key.lower(): value for key, value in wanted.items()}  # as Go reads names
            path, size = found["volumepath"], found["size"]
        except (ValueError, KeyError, AttributeError, RecursionError):
            path, size = "", 0
        if not isinstance(path, str) or not path or type(size) is not int or not 0 <= size < 1 << 63:
            raise HttpError(400, 'the body is {"VolumePath": "/PATH", "Size": BYTES}')
        asked = agent_pb.ResizeVolumeRequest(volume_guest_path=self._volume(path), size=size)
        agent = await self._agent()
        await agent.call(AGENT, "ResizeVolume", asked, google_pb.Empty, ASK_S)
        return Response(b"")

    def _volume(self, path: str) -> str:
        """Where a volume of the host is in the guest.

        Args:
            path: Its path on the host, as a container's mount names it.
        """
        for container in self._sandbox.containers.values():
            guest = container.volume_in_guest(path)
            if guest:
                return guest
        raise HttpError(
            404, f"no container of the sandbox has {path!a} as a volume with a file system of its own"
        )


def _json(value: object) -> Response:
    return Response(json.dumps(value).encode() + b"\n", JSON)


def _tail(request: Request) -> int:
    text = request.query.get("tail", str(DEFAULT_TAIL))
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise HttpError(400, "tail is a number of bytes")
    return min(int(text), tails.MAX_TAIL)


def _packed(request: Request, response: Response) -> Response:
    """The answer, compressed if the client takes that."""
    if len(response.body) >= _GZIP_FROM and request.accepts("gzip"):
        import zlib

        response.body = zlib.compress(response.body, 1, 31)  # 31: in gzip's format
        response.headers["Content-Encoding"] = "gzip"
    response.headers["Vary"] = "Accept-Encoding"
    return response


async def _collect(sandbox: Sandbox) -> str:
    from kata.engine.services import metrics

    return await metrics.collect(sandbox)


_STATS = "/direct-volume/stats"
_IP6TABLES = "/ip6tables"
_TABLES = {"GET": Management._get_iptables, "PUT": Management._set_iptables}
_ROUTES: dict[str, dict[str, Callable[[Management, Request], Awaitable[Response]]]] = {
    "/metrics": {"GET": Management._metrics},
    "/agent-url": {"GET": Management._agent_url},
    _STATS: {"GET": Management._volume_stats, "POST": Management._volume_stats},
    "/direct-volume/resize": {"POST": Management._volume_resize},
    "/iptables": dict(_TABLES),
    _IP6TABLES: dict(_TABLES),
    "/kata/v1/state": {"GET": Management._state},
    "/kata/v1/start": {"GET": Management._start},
    "/kata/v1/timings": {"GET": Management._timings},
    "/kata/v1/console": {"GET": Management._console},
    "/kata/v1/logs": {"GET": Management._logs},
    "/kata/v1/debug-console": {"POST": Management._debug_console},
    "/kata/v1/log-level": {"PUT": Management._log_level},
}

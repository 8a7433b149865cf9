"""The program ``kata-monitor``: from its options to a server that runs until it is told to end."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import sys

from kata import __version__, sysio
from kata.errors import HostError, UsageError
from kata.monitor import access, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from kata.agent_ctl.options import Values

_LOG = logging.getLogger("kata.monitor")
_MAX_FILES = 1 << 16
HANDSHAKE_S = 10.0
SHUTDOWN_S = 2.0
"""How long answers that are being given may take when the monitor is told to end."""


class _Logfmt(logging.Formatter):
    """``time=... level=... msg="..."``: a line each, whatever is in the message."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z")
        text = record.getMessage()
        if record.exc_info:
            text += ": " + self.formatException(record.exc_info)
        shown = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'time={stamp} level={record.levelname.lower()} msg="{shown}"'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and turn every outcome into an exit status: 1 for any failure."""
    try:
        return dispatch(sys.argv[1:] if argv is None else argv)
    except BaseException as error:
        from kata.cli.report import exit_status

        return exit_status(error, "kata-monitor", 1)


def dispatch(argv: Sequence[str]) -> int:
    """Run one command line.

    Args:
        argv: Without the program's name.

    Returns:
        The exit status.

    Raises:
        KataError: It cannot be run.
    """
    if argv[:1] == ["__cri"]:
        from kata.monitor.cri_query import main as query

        return query(argv[1:])
    if argv[:1] == ["__complete"]:  # for the shells' completion scripts
        from kata.cli import complete

        return complete.of_program(argv[1:], options.OPTIONS)
    values = options.parsed(argv)
    if values.flag("help"):
        sys.stdout.write(options.usage())
        return 0
    if values.flag("version"):
        sys.stdout.write(f"kata-monitor {__version__}\n")
        return 0
    given = values.value("listen-address")
    address = access.Address(access.DEFAULT_ADDRESS if given is None else given)
    secrets = access.Secrets(
        values.value("tls-cert") or "", values.value("tls-key") or "", values.value("token-file") or ""
    )
    access.check(address, secrets)
    level = options.level(values)
    for name, default, least in (("parallel", options.PARALLEL, 1), ("max-series", options.SERIES, 1)):
        values.integer(name, default, least, 1 << 20)
    values.number("timeout", options.TIMEOUT_S, 0.01)
    handler = logging.StreamHandler()
    handler.setFormatter(_Logfmt())
    logging.basicConfig(level=level, handlers=[handler])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if os.geteuid() != 0:
        _LOG.warning("this is not root, so the engines will not answer")
    asyncio.run(serve(address, secrets, values))
    return 0


async def serve(address: access.Address, secrets: access.Secrets, values: Values) -> None:
    """Serve until a signal says to end.

    Raises:
        KataError: It cannot listen there.
    """
    try:
        from aiohttp import web
    except ImportError as error:
        raise HostError(f"a package is missing: {error.name}", "tools/setup run, or make install") from error
    from kata.monitor.connections import Connections
    from kata.monitor.discovery import places
    from kata.monitor.expose import Metrics
    from kata.monitor.node import Node
    from kata.monitor.web import Web

    node = Node(
        places(),
        _endpoints(values),
        values.number("timeout", options.TIMEOUT_S),
        values.integer("parallel", options.PARALLEL),
    )
    metrics = Metrics(node, values.integer("max-series", options.SERIES))
    # Where a token is asked for, a page of a stranger's has none: then any name is fine.
    guarded = address.path or secrets.has_token
    names = () if guarded else access.names_of(address, values.many("allow-host"))
    pages = Web(node, metrics, secrets, names)
    application = pages.application()

    async def let_go(_: web.Application) -> None:
        await node.close()

    async def end(_: web.Application) -> None:
        metrics.close()

    application.on_shutdown.append(let_go)
    # Not before: the scrapes that are going on have `SHUTDOWN_S`, and parse what they get meanwhile.
    application.on_cleanup.append(end)
    runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    assert runner.server is not None
    pages.connections = Connections(runner.server)
    listening: list[socket.socket] = []
    servers: list[asyncio.Server] = []
    loop = asyncio.get_running_loop()
    try:
        for one in _sockets(address):
            listening.append(one)
            tls: dict[str, Any] = (
                {"ssl": secrets.tls, "ssl_handshake_timeout": HANDSHAKE_S} if secrets.tls else {}
            )
            if address.path:
                servers.append(await loop.create_unix_server(pages.connections, sock=one, **tls))
            else:
                servers.append(await loop.create_server(pages.connections, sock=one, **tls))
        told = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, told.set)
        loop.add_signal_handler(signal.SIGHUP, _reload, secrets)
        scheme = "https" if secrets.tls else "http"
        for one in listening:
            _LOG.info("kata-monitor %s listens on %s", __version__, _shown(one, scheme))
        _LOG.info("sandboxes on this node: %d", len(node.sandboxes()))
        _notify("READY=1")
        await told.wait()
        _notify("STOPPING=1")
    finally:
        for server in servers:
            server.close()
        await runner.cleanup()
        if address.path and listening:
            try:
                os.unlink(address.path)
            except FileNotFoundError:
                pass


def _endpoints(values: Values) -> Sequence[str]:
    from kata.monitor.cri import USUAL_ENDPOINTS

    given = values.value("runtime-endpoint")
    if given is None:
        return USUAL_ENDPOINTS
    path = given.removeprefix("unix://")
    if path and not path.startswith("/"):
        raise UsageError(
            f"--runtime-endpoint: {given!r} is not an absolute path",
            "unix:///run/containerd/containerd.sock",
        )
    return [path] if path else []


def _sockets(address: access.Address) -> list[socket.socket]:
    """What to listen on, bound.

    Raises:
        HostError: The address is taken, or is not this machine's.
    """
    if address.path:
        access.clear_socket(address.path)
        one = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)
        try:
            with sysio.SocketName(address.path) as name:
                one.bind(name)
        except OSError as error:
            one.close()
            raise HostError(f"cannot listen on {address.path}: {error.strerror}") from error
        finally:
            os.umask(before)
        return [one]
    try:
        if not address.host and socket.has_dualstack_ipv6():
            return [socket.create_server(("::", address.port), family=socket.AF_INET6, dualstack_ipv6=True)]
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        return [socket.create_server((address.host, address.port), family=family)]
    except OSError as error:
        raise HostError(
            f"cannot listen on {address.text}: {error.strerror}",
            "is a monitor running already? --listen-address names another place",
        ) from error


def _shown(one: socket.socket, scheme: str) -> str:
    name = one.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"{scheme}://{host}:{name[1]}/"


def _reload(secrets: access.Secrets) -> None:
    if complaint := secrets.refresh():
        _LOG.warning("%s; what was read before goes on to count", complaint)


def _notify(text: str) -> None:
    """Tell systemd, if it started this (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as one:
        try:
            one.connect("\0" + path[1:] if path[0] == "@" else path)
            one.send(text.encode())
        except OSError as error:
            _LOG.warning("systemd cannot be told %s: %s", text, error.strerror)

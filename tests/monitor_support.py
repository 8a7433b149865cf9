"""Engines that there are none of: management sockets in the places where a monitor looks, and who answers on them."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from kata import sysio

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 60.0
PROGRAM = (sys.executable, "-I", "-S", str(ROOT / "src/kata/monitor/__main__.py"))

_CONFINE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
for capability in range(64):
    libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; from 41 on there are none
libc.prctl(65, 1, 0, 0, 0)  # PR_SET_MDWE, as MemoryDenyWriteExecute=, where the kernel has it
os.umask(0o077)
os.execv(sys.argv[1], sys.argv[1:])
"""
CONFINED = (sys.executable, "-I", "-c", _CONFINE)
"""A command that executes another one with nothing of root but the name, as the service does."""

Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


def exposition(number: int, series: int = 40) -> str:
    """What an honest sandbox says: the families of a small one, with values that tell which it is."""
    lines = [
        "# HELP kata_guest_load The guest's load.",
        "# TYPE kata_guest_load gauge",
        f'kata_guest_load{{item="load1"}} {number}.25',
        "# HELP kata_agent_process_cpu_seconds_total The agent's processor time.",
        "# TYPE kata_agent_process_cpu_seconds_total counter",
        f"kata_agent_process_cpu_seconds_total {number}",
        "# HELP kata_agent_scrape_count How often the agent was asked.",
        "# TYPE kata_agent_scrape_count counter",
        "kata_agent_scrape_count 7",
        "# HELP kata_shim_rpc_durations_histogram_milliseconds How long calls took.",
        "# TYPE kata_shim_rpc_durations_histogram_milliseconds histogram",
        'kata_shim_rpc_durations_histogram_milliseconds_bucket{action="create",le="1"} 1',
        'kata_shim_rpc_durations_histogram_milliseconds_bucket{action="create",le="2"} 3',
        'kata_shim_rpc_durations_histogram_milliseconds_bucket{action="create",le="+Inf"} 4',
        'kata_shim_rpc_durations_histogram_milliseconds_sum{action="create"} 17.5',
        'kata_shim_rpc_durations_histogram_milliseconds_count{action="create"} 4',
        "# HELP kata_guest_vm_stat The guest's /proc/vmstat.",
        "# TYPE kata_guest_vm_stat gauge",
        *(f'kata_guest_vm_stat{{item="item_{item}"}} {item * number}' for item in range(series)),
    ]
    return "\n".join(lines) + "\n"


def state(name: str) -> dict[str, Any]:
    """What an honest sandbox says of itself."""
    return {"id": name, "name": f"name of {name}", "state": "ready", "vcpus": 1, "containers": []}


def says(
    body: str | bytes,
    status: str = "200 OK",
    more: str = "",
    document: dict[str, Any] | bytes | None = None,
    heard: list[str] | None = None,
) -> Peer:
    """An engine that answers every request: with *document* one for the state, with *body* all others."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        target = head.split(b" ", 2)[1].decode()
        if heard is not None:
            heard.append(target)
        said = body.encode() if isinstance(body, str) else body
        if target == "/kata/v1/state" and document is not None:
            said = document if isinstance(document, bytes) else json.dumps(document).encode()
        kind = "text/plain; version=0.0.4"
        writer.write(
            f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(said)}\r\n{more}\r\n".encode()
            + said
        )
        await writer.drain()
        writer.close()

    return peer


async def stuck(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes the request and says nothing."""
    await asyncio.sleep(3600)


async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says a byte from time to time, without end."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(b"#")
            await writer.drain()
            await asyncio.sleep(0.05)


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says without end, and fast."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(b"# x\n" * 50_000)
            await writer.drain()


async def no_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says what is not HTTP."""
    writer.write(b"\x00\xff" * 5000)
    await writer.drain()
    writer.close()


async def cut_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Promises more than it says."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nkata_guest_load 1\n")
    await writer.drain()
    writer.close()


class Engines:
    """Engines of a test, served by a thread.

    Args:
        run_directory: What stands for ``KATA_RUN_DIR``.
    """

    def __init__(self, run_directory: Path) -> None:
        self.run_directory = run_directory
        self._loop = asyncio.new_event_loop()
        self._servers: dict[str, asyncio.Server] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def directory(self, name: str) -> Path:
        return self.run_directory / "sandboxes" / name

    def add(self, name: str, peer: Peer | None, sandbox_id: str = "", directory: Path | None = None) -> Path:
        """A sandbox: its directory, with a socket on which *peer* answers; with none, on which nobody listens.

        Returns:
            The socket's path.
        """
        where = directory or self.directory(name)
        where.mkdir(parents=True, exist_ok=True)
        if directory is None:
            (where / "sandbox.json").write_text(json.dumps({"id": sandbox_id or name}))
        path = where / "shim-monitor.sock"
        path.unlink(missing_ok=True)
        if peer is None:
            with socket.socket(socket.AF_UNIX) as one, sysio.SocketName(str(path)) as short:
                one.bind(short)
        else:
            listening = socket.socket(socket.AF_UNIX)
            with sysio.SocketName(str(path)) as short:
                listening.bind(short)
            listening.listen(64)

            async def serve(peer: Peer = peer) -> None:
                async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                        await peer(reader, writer)

                self._servers[name] = await asyncio.start_unix_server(guarded, sock=listening)

            asyncio.run_coroutine_threadsafe(serve(), self._loop).result(PATIENCE_S)
        return path

    def remove(self, name: str) -> None:
        """End a sandbox and remove its directory."""
        server = self._servers.pop(name, None)
        if server is not None:
            self._loop.call_soon_threadsafe(server.close)
        for path in self.directory(name).iterdir():
            path.unlink()
        self.directory(name).rmdir()

    def close(self) -> None:
        async def end() -> None:
            for server in self._servers.values():
                server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(PATIENCE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()


class Answer:
    """What an HTTP server said."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Monitor:
    """The program, running.

    Args:
        directory: For its log, and ``KATA_RUN_DIR`` unless that is another one.
        run_dir: ``KATA_RUN_DIR``; need not be there.
        arguments: Of the program; listens on a free port of loopback unless they say something else.
        around: A command that executes it.
        program: Another way to start it.
    """

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        run_dir: Path | None = None,
        around: Sequence[str] = (),
        program: Sequence[str] = (),
    ) -> None:
        self.log = directory / f"monitor-{time.monotonic_ns()}.log"
        if not any(one.startswith("--listen-address") for one in arguments):
            arguments = ("--listen-address", "127.0.0.1:0", *arguments)
        if not any(one.startswith("--runtime-endpoint") for one in arguments):
            arguments = ("--runtime-endpoint", "", *arguments)
        places = {"KATA_RUN_DIR": str(run_dir or directory), "KATA_STATE_DIR": str(directory)}
        environment = {**os.environ, **places}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*around, *(program or PROGRAM), *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.port = 0
        give_up = time.monotonic() + PATIENCE_S
        while not (found := re.search(r"listens on (\S+?)\"?$", self.log.read_text(), re.M)):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < give_up, self.log.read_text()
            time.sleep(0.02)
        if port := re.search(r":(\d+)/", found[1]):
            self.port = int(port[1])
        while "sandboxes on this node:" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def get(self, target: str, timeout: float = PATIENCE_S, method: str = "GET", **headers: str) -> Answer:
        """GET *target*; names of headers with ``_`` for ``-``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, target, headers=named)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def rss_kib(self, what: str = "VmRSS") -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"^{what}:\s+(\d+) kB", text, re.M)
        assert found
        return int(found[1])

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def switches(self) -> int:
        """How often its threads have gone to sleep and been woken since they are there."""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", (task / "status").read_text(), re.M)
            assert found
            total += int(found[1])
        return total

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


class Stream:
    """Server-sent events as they arrive."""

    def __init__(self, one: Monitor, target: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=PATIENCE_S)
        self._connection.request("GET", target)
        self.response = self._connection.getresponse()

    def next(self) -> tuple[str, Any]:
        name = ""
        while line := self.response.readline().decode():
            if line.startswith("event: "):
                name = line[7:].strip()
            elif line.startswith("data: "):
                return name, json.loads(line[6:])
        return "", None

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def monitor(
    directory: Path,
    *arguments: str,
    run_dir: Path | None = None,
    around: Sequence[str] = (),
    program: Sequence[str] = (),
) -> Iterator[Monitor]:
    """The program while the block runs; it has to end well. The arguments are those of `Monitor`."""
    one = Monitor(directory, *arguments, run_dir=run_dir, around=around, program=program)
    try:
        yield one
    finally:
        status = one.stop()
    assert status == 0, one.log.read_text()
    assert "Traceback" not in one.log.read_text()

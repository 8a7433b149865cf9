"""The management socket: HTTP by plain bytes and by curl, endpoints against a double of the agent."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_double import Engine
from hypothesis import given
from hypothesis import strategies as st

from kata import management as client
from kata import paths
from kata.cli.main import main as kata
from kata.engine.launch import listen
from kata.engine.lifecycle.sandbox_state import SandboxState
from kata.engine.services import http1, management, management_socket, tails
from kata.engine.services.http1 import HttpError, Request, Response, parse_head
from kata.engine.services.management_socket import ManagementSocket
from kata.engine.standard_streams.logfile import LogFile
from kata.errors import HostError, NotFoundError, UnsupportedError
from kata.journal import Journal
from kata.journal_undo import undo
from kata.oci_runtime import commands
from kata.oci_runtime import main as oci_runtime
from kata.proto import agent_pb, csi_pb, google_pb
from kata.ttrpc.status import TtrpcError


def head(*lines: str) -> bytes:
    return "\r\n".join((*lines, "", "")).encode("latin-1")


def refusal(data: bytes) -> int:
    with pytest.raises(HttpError) as caught:
        parse_head(data)
    return caught.value.status


# ---- requests, by plain bytes ----


def test_a_head_is_read() -> None:
    request = parse_head(
        head(
            "GET /a%20b?x=1&y=%2Fz+z&x=2&n HTTP/1.1",
            "Host: h",
            "Accept-Encoding: br, gzip;q=0.5",
            "A: 1",
            "a:2",
        )
    )
    assert (request.method, request.path, request.version) == ("GET", "/a b", 1)
    assert request.query == {"x": "1", "y": "/z z", "n": ""}
    assert request.headers["a"] == "1, 2"
    assert request.accepts("gzip")
    assert request.keeps_alive
    old = parse_head(head("GET http://h/metrics?q HTTP/1.0", "Accept-Encoding: gzip;q=0"))
    assert (old.path, old.keeps_alive, old.accepts("gzip")) == ("/metrics", False, False)
    assert not parse_head(head("GET / HTTP/1.1", "Host:", "Connection: Keep-Alive, Close")).keeps_alive


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["GET /", "Host: h"], 400),
        (["GET  / HTTP/1.1", "Host: h"], 400),
        (["G(T / HTTP/1.1", "Host: h"], 400),
        (["GET / HTTP/1.1"], 400),
        (["GET / HTTP/2.0", "Host: h"], 505),
        (["GET / HTTP/1.10", "Host: h"], 400),
        (["GET relative HTTP/1.1", "Host: h"], 400),
        (["GET /# HTTP/1.1", "Host: h"], 400),
        (["GET /%0 HTTP/1.1", "Host: h"], 400),
        (["GET /%00 HTTP/1.1", "Host: h"], 400),
        (["GET /\xe4 HTTP/1.1", "Host: h"], 400),
        (["GET / HTTP/1.1", "Host: h", "Host: h"], 400),
        (["GET / HTTP/1.1", "Host: h", "Content-Length: 1", "Content-Length: 1"], 400),
        (["GET / HTTP/1.1", "Host: h", " folded"], 400),
        (["GET / HTTP/1.1", "Host: h", "A : b"], 400),
        (["GET / HTTP/1.1", "Host: h", "A: b\nc: d"], 400),
        (["GET / HTTP/1.1", "Host: h", *(f"A{n}: b" for n in range(64))], 431),
    ],
)
def test_what_is_not_a_request_is_refused(lines: list[str], status: int) -> None:
    assert refusal(head(*lines)) == status


PIECES = (
    *(
        b"GET",
        b"PUT",
        b" ",
        b"/",
        b"?",
        b"&",
        b"=",
        b"%",
        b"%41",
        b"+",
        b"HTTP/1.1",
        b"HTTP/1.0",
        b"\r\n",
        b"\n",
    ),
    *(
        b"Host: h",
        b"Content-Length: ",
        b"Transfer-Encoding: chunked",
        b"Expect: 100-continue",
        b":",
        b"5",
        b"\0",
    ),
    *(
        b"Accept-Encoding: gzip;q=",
        b"http://",
        b"\xff",
        b"Connection: close",
        b"4\r\nbody\r\n",
        b"0\r\n\r\n",
    ),
)


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=25))
def test_whatever_is_sent_is_a_request_or_refused(pieces: list[bytes]) -> None:
    """And nothing else: no other exception, no endless loop, no more than there is."""

    async def read(request: Request, data: bytes) -> None:
        reader = asyncio.StreamReader(http1.MAX_HEAD)
        reader.feed_data(data)
        reader.feed_eof()
        request.body = await http1.read_body(request, reader, lambda: None)
        assert len(request.body) <= len(data)

    whole = b"".join(pieces)
    head_, _, rest = whole.partition(b"\r\n\r\n")
    with contextlib.suppress(HttpError, asyncio.IncompleteReadError):
        request = parse_head(head_ + b"\r\n\r\n")
        assert request.path.startswith("/")
        request.accepts("gzip")
        asyncio.run(read(request, rest))


def body_of(headers: dict[str, str], data: bytes, version: int = 1) -> bytes:
    async def read() -> bytes:
        reader = asyncio.StreamReader(http1.MAX_HEAD)
        reader.feed_data(data)
        reader.feed_eof()
        return await http1.read_body(Request("PUT", "/", {}, version, headers), reader, lambda: None)

    return asyncio.run(read())


def test_bodies_are_read() -> None:
    assert body_of({}, b"next") == b""
    assert body_of({"content-length": "4"}, b"bodynext") == b"body"
    chunks = b"4;x=y\r\nbody\r\n00A \r\n0123456789\r\n0\r\nTrailer: x\r\n\r\nnext"
    assert body_of({"transfer-encoding": "Chunked"}, chunks) == b"body0123456789"


@pytest.mark.parametrize(
    ("headers", "data", "status"),
    [
        ({"content-length": "-1"}, b"", 400),
        ({"content-length": "0x4"}, b"", 400),
        ({"content-length": "4", "transfer-encoding": "chunked"}, b"", 400),
        ({"transfer-encoding": "gzip, chunked"}, b"", 501),
        ({"content-length": str(http1.MAX_BODY + 1)}, b"", 413),
        ({"transfer-encoding": "chunked"}, b"-4\r\nbody\r\n", 400),
        ({"transfer-encoding": "chunked"}, b"2\r\nbody\r\n", 400),
        ({"transfer-encoding": "chunked"}, b"0" * 300 + b"\r\n", 400),
        ({"transfer-encoding": "chunked"}, b"0" * 20000 + b"\r\n", 400),
        ({"transfer-encoding": "chunked"}, b"100001\r\n", 413),
        ({"transfer-encoding": "chunked"}, b"0\r\n" + b"A: b\r\n" * 65, 431),
        ({"content-length": "1", "expect": "a miracle"}, b"", 417),
    ],
)
def test_bodies_that_are_not_clear_are_refused(headers: dict[str, str], data: bytes, status: int) -> None:
    with pytest.raises(HttpError) as caught:
        body_of(headers, data)
    assert caught.value.status == status


# ---- an engine with a double of the agent ----


class Managed:
    """An engine with its management socket."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.engine = Engine(directory, self._prepare, **settings)
        self.path = os.path.join(self.engine.run_dir, paths.MANAGEMENT_SOCKET)

    def _prepare(self, engine: Engine) -> None:
        self.socket = ManagementSocket(engine.sandbox)
        self.socket.listen()

    def curl(self, target: str, *arguments: str, data: bytes | None = None) -> tuple[int, str, bytes]:
        """Ask with curl: status, content type, body."""
        command = ["curl", "-sS", "--max-time", "20", "--unix-socket", self.path, "-o", "-"]
        command += ["-w", "\\n%{http_code} %{content_type}", *arguments, f"http://sandbox{target}"]
        done = subprocess.run(command, input=data or b"", capture_output=True, check=True)
        body, _, words = done.stdout.rpartition(b"\n")
        status, _, kind = words.decode().partition(" ")
        return int(status), kind, body

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(self.path)
        return sock

    def descriptors(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    def settle(self) -> None:
        """Wait until there is no connection any more."""
        deadline = time.monotonic() + 10
        while self.socket._management and self.socket._management.server.connections:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.engine.do(lambda: None)  # a transport is closed a moment after its task

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.socket.close(), self.engine.loop).result(10)
        self.engine.stop()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Managed]]:
    made: list[Managed] = []

    def build(**settings: Any) -> Managed:
        made.append(Managed(tmp_path, **settings))
        return made[-1]

    yield build
    for one in made:
        one.stop()


@pytest.fixture
def managed(make: Callable[..., Managed]) -> Managed:
    return make()


def test_endpoints(make: Callable[..., Managed], tmp_path: Path) -> None:
    managed = make(client={"ends_with_init": False})
    engine = managed.engine
    assert os.stat(managed.path).st_mode & 0o7777 == 0o600
    with engine.client() as client:
        client.create("c1", engine.bundle("say", "out\x1b[31m", "err"))
        client.start("c1")
        client.wait("c1")
    status, kind, metrics = managed.curl("/metrics")
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert b"# TYPE kata_shim_threads gauge\nkata_shim_threads " in metrics
    assert managed.curl("/metrics", "--head")[:2] == (200, kind)
    status, kind, body = managed.curl("/kata/v1/timings")
    assert (status, kind) == (200, "application/json")
    assert {"kernel", "agent"} <= {one["name"] for one in json.loads(body)}
    status, kind, body = managed.curl("/kata/v1/start")
    assert (status, kind, json.loads(body)["path"]) == (200, "application/json", "cold")
    assert {"engine", "kernel", "agent", "process"} <= {one["name"] for one in json.loads(body)["steps"]}
    status, kind, body = managed.curl("/kata/v1/state")
    assert (status, kind, json.loads(body)["id"]) == (200, "application/json", "c1")
    (Path(engine.run_dir) / "console.log.1").write_bytes(b"older\n")
    (Path(engine.run_dir) / "console.log").write_bytes(b"Linux\r\n\x1b[2J\xff\n")
    assert managed.curl("/kata/v1/console") == (200, http1.TEXT, "older\nLinux\n\\x1b[2J\ufffd\n".encode())
    assert managed.curl("/kata/v1/console?tail=8")[2] == "\nLinux\n\\x1b[2J\ufffd\n".encode()[-12:]
    assert managed.curl("/kata/v1/console?tail=x")[0] == 400
    assert sorted(managed.curl("/kata/v1/logs?container=c1")[2].replace(b"err", b"")) == sorted(
        b"out\\x1b[31m"
    )
    assert managed.curl("/kata/v1/logs?container=../../etc")[0] == 404
    assert managed.curl("/agent-url")[0] == 501
    assert managed.curl("/kata/v1/log-level", "-T", "-", data=b"loud")[0] == 400
    assert managed.curl("/kata/v1/log-level", "-T", "-", data=b"debug\n")[0] == 200
    assert engine.sandbox.tasks.lines.level == "debug"
    status, _, body = managed.curl("/nothing")
    assert status == 404
    assert b"/metrics" in body
    assert managed.curl("/metrics", "-X", "POST", "-d", "x")[0] == 405
    assert managed.curl("/iptables", "-X", "DELETE")[0] == 405


def create_with_volume(engine: Engine) -> None:
    """Make the container c1, with a volume whose source is /dev/null."""
    bundle = engine.bundle("sleep")
    path = engine.container_dir / "config.json"
    config = json.loads(path.read_text())
    config["mounts"].append(
        {"type": "bind", "source": "/dev/null", "destination": "/v", "options": ["bind"]}
    )
    path.write_text(json.dumps(config))
    with engine.client() as client:
        client.create("c1", bundle)


def test_the_original_s_paths_reach_the_agent(managed: Managed) -> None:
    engine = managed.engine
    create_with_volume(engine)
    double: Any = engine.double

    async def get(request: Any, context: Any) -> agent_pb.GetIPTablesResponse:
        return agent_pb.GetIPTablesResponse(data=b"*filter v6\x1b[2J" if request.is_ipv6 else b"*filter v4")

    async def put(request: Any, context: Any) -> agent_pb.SetIPTablesResponse:
        if b"bad" in request.data:
            raise TtrpcError(9, 'it was started without the extension "iptables"')
        return agent_pb.SetIPTablesResponse(data=b"%d" % len(request.data))

    async def stats(request: Any, context: Any) -> csi_pb.VolumeStatsResponse:
        assert request.volume_guest_path == "/dev/null"
        return csi_pb.VolumeStatsResponse(usage=[csi_pb.VolumeUsage(total=9, used=4, available=5, unit=1)])

    async def resize(request: Any, context: Any) -> google_pb.Empty:
        double.requests["ResizeVolume"] = request
        return google_pb.Empty()

    double.GetIPTables, double.SetIPTables = get, put
    double.GetVolumeStats, double.ResizeVolume = stats, resize
    assert managed.curl("/iptables")[2] == b"*filter v4"
    assert managed.curl("/ip6tables")[2] == b"*filter v6\\x1b[2J"
    rules = b"x" * 300_000
    # With a length, and as curl sends what it reads from a pipe: in chunks, after "100 Continue".
    assert managed.curl("/iptables", "-X", "PUT", "--data-binary", "@-", data=rules)[2] == b"300000"
    assert managed.curl("/ip6tables", "-T", "-", data=rules)[2] == b"300000"
    status, _, body = managed.curl("/iptables", "-T", "-", data=b"bad")
    assert (status, b"extension" in body) == (409, True)
    assert managed.curl("/iptables", "-T", "-", data=b"x" * ((1 << 20) + 1))[0] == 413
    expected = {"usage": [{"available": 5, "total": 9, "used": 4, "unit": 1}]}
    for target in ("?path=/dev/null", "?path=%2Fdev%2Fnull", "/dev/null"):
        assert json.loads(managed.curl(f"/direct-volume/stats{target}")[2]) == expected
    assert managed.curl("/direct-volume/stats")[0] == 400
    assert managed.curl("/direct-volume/stats?path=/elsewhere")[0] == 404
    wanted = '{"VolumePath": "/dev/null", "Size": 4096}'
    assert managed.curl("/direct-volume/resize", "-d", wanted)[:1] == (200,)
    assert double.requests["ResizeVolume"].size == 4096
    for bad in (
        "",
        "[]",
        '{"VolumePath": "/dev/null"}',
        '{"VolumePath": "/dev/null", "Size": -1}',
        "[" * 5000,
    ):
        assert managed.curl("/direct-volume/resize", "-d", bad)[0] == 400


def test_two_at_the_same_time_share_a_measurement(managed: Managed, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[float] = []

    async def slow(sandbox: object) -> str:
        began.append(time.monotonic())
        await asyncio.sleep(0.5)
        return "a 1\n" * 1000

    monkeypatch.setattr(management, "_collect", slow)
    answers: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: answers.append(managed.curl("/metrics")[2])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [b"a 1\n" * 1000] * 4
    assert len(began) == 1
    packed = managed.curl("/metrics", "-H", "Accept-Encoding: gzip")[2]
    assert gzip.decompress(packed) == answers[0]
    assert len(began) == 2


def exchange(sock: socket.socket, data: bytes, *, half_close: bool = False) -> bytes:
    """Send, and read to the end of the connection."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(data)
    if half_close:
        sock.shutdown(socket.SHUT_WR)
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(1 << 16):
            answer += piece
    sock.close()
    return answer


def test_strange_clients(managed: Managed, monkeypatch: pytest.MonkeyPatch) -> None:
    managed.curl("/metrics")
    managed.settle()
    before = managed.descriptors()
    get = head("GET /metrics HTTP/1.1", "Host: h")
    answer = exchange(managed.connect(), get + get, half_close=True)  # pipelined, then the end
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2
    nothing = head("GET /nothing HTTP/1.1", "Host: h")
    answer = exchange(
        managed.connect(), nothing + get, half_close=True
    )  # after an error that is no mistake of HTTP
    assert [answer.count(b"HTTP/1.1 %d " % status) for status in (404, 200)] == [1, 1]
    answer = exchange(managed.connect(), head("GET / HTTP/1.1") + get, half_close=True)
    assert [answer.count(b"HTTP/1.1 %d " % status) for status in (400, 200)] == [1, 0]
    assert exchange(managed.connect(), b"\x16\x03\x01garbage\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert exchange(managed.connect(), head("GET / HTTP/1.1", "A: " + "x" * 9000)).startswith(
        b"HTTP/1.1 431 "
    )
    assert exchange(managed.connect(), b"GET /" + b"x" * (4 << 20)).startswith(b"HTTP/1.1 414 ")
    assert exchange(managed.connect(), get[:-2], half_close=True).startswith(b"HTTP/1.1 400 ")
    assert exchange(managed.connect(), b"", half_close=True) == b""
    monkeypatch.setattr(http1, "CLIENT_S", 0.3)
    slow = managed.connect()
    slow.sendall(b"GET /metrics")
    assert exchange(slow, b"").startswith(b"HTTP/1.1 408 ")
    idle = managed.connect()
    idle.sendall(get)
    assert exchange(idle, b"").startswith(b"HTTP/1.1 200 ")
    # One that asks for much and does not read it.
    monkeypatch.setattr(management, "_collect", lambda sandbox: _much())
    deaf = managed.connect()
    deaf.sendall(get)
    monkeypatch.setattr(http1, "REFUSAL_S", 5.0)
    monkeypatch.setattr(http1, "CLIENT_S", 5.0)
    waiting = [managed.connect() for _ in range(100)]
    for sock in waiting:
        with contextlib.suppress(BrokenPipeError):
            sock.sendall(get[:-2])  # all at once, none complete
    time.sleep(0.5)
    with managed.engine.client() as client:
        client.describe()  # the engine goes on
    words = []
    for sock in waiting:
        with contextlib.suppress(BrokenPipeError):
            sock.sendall(b"Connection: close\r\n\r\n")
        words.append(exchange(sock, b"")[9:12])
    assert 15 <= words.count(b"200") <= 16  # the deaf one may have a place
    assert words.count(b"503") == http1.MAX_REFUSALS
    deaf.close()
    managed.settle()
    assert managed.descriptors() == before
    assert managed.curl("/metrics")[0] == 200


async def _much() -> str:
    return "a 1\n" * 500_000


def test_an_engine_that_may_open_no_more_files_waits(
    managed: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(management_socket, "PAUSE_S", 0.2)
    managed.curl("/metrics")
    managed.settle()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        full = max(map(int, os.listdir("/proc/self/fd"))) + 1
        spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(full)]  # every number below
        full = max(spare) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (full, hard))
        try:
            sock.connect(managed.path)
            sock.sendall(head("GET /kata/v1/timings HTTP/1.1", "Host: h", "Connection: close"))
            began = time.process_time()
            time.sleep(1.0)
            assert time.process_time() - began < 0.3  # it does not try again and again
            sock.settimeout(0)
            with pytest.raises(BlockingIOError):
                sock.recv(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in spare:
                os.close(fd)
        sock.settimeout(20)
        assert sock.recv(15) == b"HTTP/1.1 200 OK"


def test_a_bug_is_logged_and_answered(
    managed: Managed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def broken(sandbox: object) -> str:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(management, "_collect", broken)
    assert managed.curl("/metrics")[0] == 500
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_machine_that_is_gone(make: Callable[..., Managed]) -> None:
    managed = make(client={"ends_with_init": False})
    with managed.engine.client() as client:
        client.create("c1", managed.engine.bundle("sleep"))
        managed.engine.do(lambda: managed.engine.sandbox.runtime.fail("it burnt down"))
        status, _, body = managed.curl("/iptables")
        assert (status, b"burnt down" in body) == (503, True)
        assert managed.curl("/metrics")[0] == 200
        assert managed.curl("/kata/v1/state")[0] == 200


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_nobody_else_may_connect(managed: Managed) -> None:
    """Also where the path could be opened."""
    os.chmod(managed.engine.run_dir, 0o755)
    os.chmod(managed.path, 0o666)
    program = (
        "import os, socket; os.setgid(65534); os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
        f" s.connect({paths.MANAGEMENT_SOCKET!r}); s.sendall(b'GET /metrics HTTP/1.0\\r\\n\\r\\n');"
        " print(s.recv(9))"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-c", program], capture_output=True, text=True, cwd=managed.engine.run_dir
    )
    assert "HTTP" not in done.stdout
    assert "BrokenPipe" in done.stderr or "ConnectionReset" in done.stderr or done.stdout == "b''\n"


# ---- the client, and the commands that use it ----


@pytest.fixture
def known(make: Callable[..., Managed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Managed:
    """An engine that commands find."""
    managed = make(client={"ends_with_init": False})
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "sandboxes").symlink_to("r")
    (Path(managed.engine.run_dir) / "sandbox.json").write_text('{"id": "c1"}')
    return managed


def test_the_client(known: Managed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, headers, body = client.get(known.path, "/metrics")
    assert (status, headers["content-type"]) == (200, management.METRICS_TEXT)
    assert int(headers["content-length"]) == len(body)
    with pytest.raises(NotFoundError, match="there is no '/x' here"):
        client.content(known.path, "GET", "/x")
    with pytest.raises(UnsupportedError) as caught:
        client.content(known.path, "GET", "/agent-url")
    assert caught.value.hint == "kata-agent-ctl --sandbox c1"
    with pytest.raises(NotFoundError, match="no engine is running"):
        client.get(str(tmp_path / "none"), "/metrics")
    monkeypatch.setattr(client, "MAX_ANSWER", 100)
    with pytest.raises(HostError, match="longer than 100 bytes"):
        client.get(known.path, "/metrics")


def test_the_client_does_not_wait_for_ever(tmp_path: Path) -> None:
    path = str(tmp_path / ("d" * 100) / "sock")
    os.mkdir(os.path.dirname(path))
    with socket.socket(fileno=listen(path, Journal.create_dir(str(tmp_path), "j", {}))) as listener:
        with pytest.raises(HostError, match=r"did not answer /metrics within 0\.3 s") as late:
            client.get(path, "/metrics", 0.3)
        assert f"{os.path.dirname(path)}/engine.log" in late.value.hint

        def trickle() -> None:
            peer, _ = listener.accept()
            with peer, contextlib.suppress(OSError):
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(100):
                    peer.sendall(b"x")
                    time.sleep(0.05)

        listener.accept()[0].close()
        thread = threading.Thread(target=trickle)
        thread.start()
        began = time.monotonic()
        with pytest.raises(HostError, match="did not answer"):
            client.get(path, "/metrics", 0.5)
        assert time.monotonic() - began < 3
        thread.join()
    with pytest.raises(HostError, match="cannot reach"):
        client.get(path, "/metrics", 0.5)


def test_kata_metrics(known: Managed, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["c1"], ["c"], []):
        assert kata(["metrics", *arguments]) == 0
        assert "kata_shim_threads " in capsys.readouterr().out
    assert kata(["metrics", "nobody"]) == 125
    assert "hint: kata ps" in capsys.readouterr().err
    (Path(known.engine.run_dir) / "sandbox.json").unlink()
    assert kata(["metrics"]) == 125
    assert "no sandbox is running" in capsys.readouterr().err


def test_kata_runtime(known: Managed, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    engine, double = known.engine, known.engine.double

    async def get(request: Any, context: Any) -> agent_pb.GetIPTablesResponse:
        return agent_pb.GetIPTablesResponse(data=b"*nat\x1b[2J\n" if request.is_ipv6 else b"*filter\n")

    async def put(request: Any, context: Any) -> agent_pb.SetIPTablesResponse:
        double.requests["SetIPTables"] = request
        return agent_pb.SetIPTablesResponse()

    async def stats(request: Any, context: Any) -> csi_pb.VolumeStatsResponse:
        return csi_pb.VolumeStatsResponse(usage=[csi_pb.VolumeUsage(total=9)])

    double.GetIPTables, double.SetIPTables, double.GetVolumeStats = get, put, stats  # type: ignore[attr-defined]
    create_with_volume(engine)

    def run(*argv: str) -> tuple[int, str]:
        status = oci_runtime.main(argv)
        output = capsys.readouterr()
        return status, output.out + output.err

    assert run("metrics", "c1")[1].startswith("# HELP ")
    assert run("iptables", "get", "--sandbox-id", "c1") == (0, "*filter\n")
    assert run("iptables", "get", "--sandbox-id", "c1", "--v6") == (0, "*nat\\x1b[2J\n")
    (tmp_path / "rules").write_bytes(b"*filter\nCOMMIT\n")
    assert run("iptables", "set", "--sandbox-id", "c1", str(tmp_path / "rules")) == (0, "")
    assert double.requests["SetIPTables"].data == b"*filter\nCOMMIT\n"
    assert '"total": 9' in run("direct-volume", "stats", "--volume-path", "/dev/null")[1]
    for argv, words in (
        (("direct-volume", "stats", "--volume-path", "/none"), "no running sandbox has the volume"),
        (("direct-volume", "stats", "--volume-path", "/dev/null", "--size", "1"), "for 'resize' only"),
        (("direct-volume", "resize", "--volume-path", "/dev/null"), "for 'resize' only"),
        (("direct-volume", "add"), "mountInfo.json are not known"),
        (("iptables", "get"), "--sandbox-id ID"),
        (("iptables", "set", "--sandbox-id", "c1"), "get, or set FILE"),
        (("iptables", "set", "--sandbox-id", "c1", "/none"), "No such file or directory: /none"),
        (("metrics", "x"), "no running sandbox"),
        (("metrics", ""), "the name of a sandbox is empty"),
        (("create", "c1"), "a bundle is a directory"),
        (("exec", "c1"), "no debug console of sandbox 'c1'"),
        (("exec", "c1", "true"), "does not exist"),
        (("checkpoint", "c1"), "stop the container and start it again"),
        (("mertics",), "unknown command"),
        (("metrics", "--loud"), "kata-runtime metrics: unknown option"),
    ):
        status, output = run(*argv)
        assert (status, words in output, "hint: " in output or "/none" in output) == (
            255 if argv[0] == "exec" else 1,  # a command in the container may end with 1 itself
            True,
            True,
        ), (argv, output)
    assert run("version")[0] == 0
    assert run("--help")[0] == 0
    assert commands.complete([], "me") == [("metrics", commands.COMMANDS["metrics"].summary)]
    assert [word for word, _ in commands.complete(["iptables"], "--")] == [
        "--sandbox-id",
        "--v6",
        "--help",
    ]
    assert [word for word, _ in commands.complete(["direct-volume"], "")] == ["stats", "resize"]


def test_a_pod_that_is_not_described_yet(managed: Managed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may begin to work in an engine whose machine has yet to be started."""
    monkeypatch.setattr(managed.engine.sandbox.life, "state", SandboxState.NEW)
    for target in ("/metrics", "/kata/v1/state", "/kata/v1/console"):
        assert managed.curl(target)[0] == 503
    assert managed.curl("/kata/v1/log-level", "-T", "-", data=b"debug")[0] == 503
    monkeypatch.undo()
    assert managed.curl("/kata/v1/state")[0] == 200


# ---- where it is ----


class Owner:
    """What a management socket takes of a sandbox."""

    def __init__(self, directory: Path, sandbox_id: str, name: str) -> None:
        self.id = sandbox_id
        self.journal = Journal.create_dir(str(directory / "sandboxes"), name, {})
        self.run_dir = os.path.dirname(self.journal.path)
        self.lines: list[str] = []
        self.tasks = self
        self.log = self.lines.append


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KATA_VC_DIR", raising=False)
    directory = tmp_path / ("d" * 90)
    directory.mkdir()
    first, second = Owner(directory, "same", "a.same"), Owner(directory, "same", "b.same")

    async def listen() -> None:
        sockets = [ManagementSocket(owner) for owner in (first, second)]  # type: ignore[arg-type]
        for one in sockets:
            one.listen()
        link = directory / "vc/sbs/same" / paths.MANAGEMENT_SOCKET
        assert len(os.fsencode(os.path.join(first.run_dir, paths.MANAGEMENT_SOCKET))) > paths.MAX_SOCKET_PATH
        assert os.readlink(link) == os.path.join(first.run_dir, paths.MANAGEMENT_SOCKET)
        assert oct(link.parent.stat().st_mode & 0o777) == "0o700"
        assert first.lines == []
        assert "another sandbox's" in second.lines[0]
        for one in sockets:
            await one.close()

    asyncio.run(listen())
    # As after the death of their engines: each takes back what it has made, and no more.
    assert undo(second.journal) == []
    assert (directory / "vc/sbs/same").is_dir()
    assert undo(first.journal) == []
    assert os.listdir(directory / "vc/sbs") == []
    assert os.listdir(directory / "sandboxes") == []


def test_where_the_original_s_tools_look(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KATA_RUN_DIR", "KATA_VC_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert paths.compat_dirs("abc") == ["/run/vc/sbs/abc", "/run/kata/abc"]
    assert paths.compat_dirs("sandboxes") == ["/run/vc/sbs/sandboxes"]
    assert paths.compat_dirs("abc", "/tmp/r") == ["/tmp/r/vc/sbs/abc"]
    monkeypatch.setenv("KATA_VC_DIR", "/elsewhere")
    assert paths.compat_dirs("abc", "/tmp/r") == ["/elsewhere/abc"]


def test_the_end_of_a_log_over_its_files(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    log = LogFile(path, max_bytes=300, files=3)
    for number in range(10):
        log.write("stdout", f"line {number}\n".encode())
    log.write("stderr", b"\xff\x00binary")
    log.close()
    text = tails.of_log(path, 40)
    assert text.endswith("line 9\n\ufffd\\x00binary".encode())
    assert len(text) <= 48
    assert tails.of_log(path, 0) == b""
    assert tails.of_log(str(tmp_path / "none"), 40) == b""
    assert tails.of_log(path, 1 << 20).startswith(b"line ")
    # Records that are much larger than what they hold.
    wide = LogFile(str(tmp_path / "wide"))
    for number in range(3):
        wide.write("stdout", b"\x1b" * 65000 + b"%d" % number)
    wide.close()
    assert tails.of_log(str(tmp_path / "wide"), 5) == b"\\x1b" * 4 + b"2"
    assert tails.of_log(str(tmp_path / "wide"), 1 << 20).count(b"\\x1b") == 195000


def test_answers_name_their_length() -> None:
    text = Response(b"abc", http1.TEXT).encode(head_only=True, keep_alive=False)
    assert text.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nContent-Length: 3\r\n" in text
    assert text.endswith(b"Connection: close\r\n\r\n")

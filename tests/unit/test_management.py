"""The management socket of an engine, asked by curl and by strange clients."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from managed_engine import Managed, create_with_volume, head, make_fixture, managed_fixture  # noqa: F401 - fixtures

from kata import paths
from kata.engine.lifecycle.sandbox_state import SandboxState
from kata.engine.services import http1, management, management_socket
from kata.engine.services.management_socket import ManagementSocket
from kata.journal import Journal
from kata.journal_undo import undo
from kata.proto import agent_pb, csi_pb, google_pb
from kata.ttrpc.status import TtrpcError


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


def test_a_pod_that_is_not_described_yet(managed: Managed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may begin to work in an engine whose machine has yet to be started."""
    monkeypatch.setattr(managed.engine.sandbox.life, "state", SandboxState.NEW)
    for target in ("/metrics", "/kata/v1/state", "/kata/v1/console"):
        assert managed.curl(target)[0] == 503
    assert managed.curl("/kata/v1/log-level", "-T", "-", data=b"debug")[0] == 503
    monkeypatch.undo()
    assert managed.curl("/kata/v1/state")[0] == 200


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

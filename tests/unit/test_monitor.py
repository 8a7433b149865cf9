"""kata-monitor as a program, against engines that behave and engines that do not."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from monitor_support import (
    PATIENCE_S,
    ROOT,
    Engines,
    Monitor,
    cut_off,
    drips,
    endless,
    monitor,
    no_http,
    says,
    state,
    stuck,
)
from test_monitor_access import TOKEN, make_certificate
from waiting import until


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Engines]:
    one = Engines(tmp_path)
    yield one
    one.close()


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


def shows(stream: Stream, sandboxes: int) -> bool:
    return len(stream.next()[1]["sandboxes"]) == sandboxes


def test_what_is_asked_for_is_answered(engines: Engines) -> None:
    engines.add("web", says("", document=state("web")))
    engines.add("k8s.io.pod1", says("vsock://7:1024", document=state("x")), sandbox_id="pod1")
    engines.add("gone", None)
    with monitor(engines.run_directory) as one:
        assert one.get("/sandboxes").text == "gone\npod1\nweb\n"
        page = one.get("/sandboxes", Accept="text/html,*/*")
        assert '<a href="/metrics?sandbox=pod1">' in page.text
        assert page.headers["content-type"].startswith("text/html")
        assert one.get("/agent-url?sandbox=pod1").text == "vsock://7:1024"
        assert one.get("/healthz").json == {"status": "ok", "sandboxes": 3, "watching": True}
        whole = one.get("/api/v1/sandboxes")
        assert whole.headers["content-type"].startswith("application/json")
        assert set(whole.json) == {"time", "node", "version", "sandboxes"}
        assert abs(whole.json["time"] - time.time()) < 60
        by_id = {sandbox["id"]: sandbox for sandbox in whole.json["sandboxes"]}
        assert by_id["web"] == {**state("web"), "cri": None, "reachable": True, "problem": ""}
        assert by_id["pod1"]["id"] == "pod1"
        assert not by_id["gone"]["reachable"]
        assert "cannot be reached" in by_id["gone"]["problem"]
        assert one.get("/api/v1/sandboxes/web").json == by_id["web"]
        console = one.get("/api/v1/sandboxes/pod1/console?tail=100")
        assert console.headers["content-type"] == "text/plain; charset=utf-8"
        for target, status in [
            ("/agent-url?sandbox=none", 404),
            ("/agent-url", 404),
            ("/api/v1/sandboxes/none", 404),
            ("/agent-url?sandbox=gone", 502),
            ("/nothing/here", 404),
            ("/..%2f..%2fetc%2fpasswd", 404),
            ("/api/v1/sandboxes/web/logs", 400),
            ("/api/v1/sandboxes/web/logs?container=..%2fx", 400),
            ("/api/v1/sandboxes/web/console?tail=x", 400),
            ("/api/v1/stream?interval=x", 400),
        ]:
            answer = one.get(target)
            assert (target, answer.status) == (target, status)
            assert answer.json["error"]
        assert one.get("/api/v1/sandboxes", method="POST").status == 405
        for target in ("/sandboxes", "/nothing"):
            headers = one.get(target).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"
            assert "default-src 'self'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["cache-control"] == "no-store"
            assert "server" not in headers


def test_what_the_page_asks_for_reaches_the_engine_as_it_is_meant(engines: Engines) -> None:
    heard: list[str] = []
    engines.add("web", says(b"\x1b[1mlog\n<b>\xff", heard=heard))
    with monitor(engines.run_directory) as one:
        answer = one.get("/api/v1/sandboxes/web/logs?container=c1&tail=99999999")
        assert answer.text == "\x1b[1mlog\n<b>\ufffd"  # as it is: plain text, which nobody takes for a page
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        one.get("/api/v1/sandboxes/web/console")
    assert heard == [f"/kata/v1/logs?container=c1&tail={1 << 20}", f"/kata/v1/console?tail={64 << 10}"]


def test_engines_that_say_nonsense_of_themselves(engines: Engines) -> None:
    documents = [b"", b"[]", b"{", b'{"a":' * 100_000, b'{"a":"' + b"x" * (2 << 20) + b'"}', b"\xff"]
    for number, document in enumerate(documents):
        engines.add(f"n{number}", says("", document=document))
    odd = b'{"id":"another","vcpus":NaN,"cpu":1e999,"more":Infinity,"state":"ready","name":"\\ud800"}'
    engines.add("odd", says("", document=odd))
    for name, peer in {
        "stuck": stuck,
        "drips": drips,
        "endless": endless,
        "no": no_http,
        "cut": cut_off,
    }.items():
        engines.add(name, peer)
    with monitor(engines.run_directory, "--timeout", "1") as one:
        started = time.monotonic()
        answer = one.get("/api/v1/sandboxes")
        assert time.monotonic() - started < 10
        by_id = {sandbox["id"]: sandbox for sandbox in answer.json["sandboxes"]}
        assert by_id.pop("odd") == {
            "id": "odd",
            "vcpus": None,
            "cpu": None,
            "more": None,
            "state": "ready",
            "name": "\ud800",
            "cri": None,
            "reachable": True,
            "problem": "",
        }
        assert len(by_id) == len(documents) + 5
        assert all(not sandbox["reachable"] and sandbox["problem"] for sandbox in by_id.values())
        assert "within 1 s" in by_id["stuck"]["problem"]
        assert b"NaN" not in answer.body
        assert b"Infinity" not in answer.body


def test_a_sample_is_taken_while_somebody_looks_and_one_for_all(engines: Engines) -> None:
    heard: list[str] = []
    engines.add("web", says("", document=state("web"), heard=heard))
    with monitor(engines.run_directory) as one:
        time.sleep(1.0)
        assert heard == [], "nobody has asked"
        streams = [Stream(one, "/api/v1/stream?interval=1") for _ in range(4)]
        for each in streams:
            assert each.response.getheader("Content-Type") == "text/event-stream"
            name, data = each.next()
            assert name == "snapshot"
            assert [sandbox["id"] for sandbox in data["sandboxes"]] == ["web"]
        engines.add("worker", says("", document=state("worker")))
        for each in streams:
            until(partial(shows, each, 2), "the new one is in the stream")
        started, before = time.monotonic(), len(heard)
        for _ in range(3):
            assert streams[0].next()[0] == "snapshot"
        taken = time.monotonic() - started
        assert len(heard) - before <= taken + 2, "one sample a second, however many look"
        for each in streams:
            each.close()
        time.sleep(2.5)
        before = len(heard)
        time.sleep(2.0)
        assert len(heard) == before, "nobody looks any more"


def test_an_idle_monitor_sleeps(engines: Engines) -> None:
    engines.add("web", says("", document=state("web")))
    engines.add("stuck", stuck)
    with monitor(engines.run_directory) as one:
        one.get("/api/v1/sandboxes", timeout=PATIENCE_S)
        time.sleep(0.5)
        before = (one.switches(), one.cpu_s())
        time.sleep(4.0)
        assert (one.switches(), one.cpu_s()) == before
        engines.add("fresh", says(""))
        until(lambda: one.get("/sandboxes").text == "fresh\nstuck\nweb\n", "the new one is there")
        engines.remove("fresh")
        until(lambda: one.get("/sandboxes").text == "stuck\nweb\n", "it has gone")


def test_a_page_of_a_stranger_can_not_ask_by_a_name_of_its_own(engines: Engines) -> None:
    with monitor(engines.run_directory, "--allow-host", "metrics.local") as one:
        for host in ("localhost", "127.0.0.1:8090", "[::1]:1", "metrics.local:80"):
            assert one.get("/healthz", Host=host).status == 200
        for host in ("evil.example", "evil.example:8090", "localhost.evil.example", ""):
            answer = one.get("/healthz", Host=host)
            assert answer.status == 421
            assert "--allow-host" in answer.json["hint"]


def test_a_token_over_tls(engines: Engines) -> None:
    token = engines.run_directory / "token"
    token.write_text(TOKEN)
    certificate, key = make_certificate(engines.run_directory)
    arguments = ["--tls-cert", certificate, "--tls-key", key, "--token-file", str(token)]
    with monitor(engines.run_directory, "--listen-address", "0.0.0.0:0", *arguments) as one:
        url = f"https://localhost:{one.port}/healthz"
        curl = [
            "curl",
            "-s",
            "--max-time",
            "20",
            "--cacert",
            certificate,
            "-w",
            "%{http_code}",
            "-o",
            "/dev/null",
        ]

        def status(*more: str) -> str:
            return subprocess.run([*curl, *more, url], capture_output=True, check=False).stdout.decode()

        assert status() == "401"
        assert status("-H", f"Authorization: Bearer {TOKEN}") == "200"
        assert status("-u", f"anybody:{TOKEN}") == "200"
        assert status("-u", f"{TOKEN}:") == "401"
        token.write_text("f" * 64)
        assert status("-H", f"Authorization: Bearer {TOKEN}") == "401"
        assert status("-H", f"Authorization: Bearer {'f' * 64}", "-H", "Host: anything.example") == "200"
        # A certificate that takes the place of the old one is used by connections from then on.
        (engines.run_directory / "second").mkdir()
        fresh, fresh_key = make_certificate(engines.run_directory / "second")
        os.replace(fresh_key, key)
        os.replace(fresh, certificate)
        one.process.send_signal(signal.SIGHUP)
        until(
            lambda: status("-H", f"Authorization: Bearer {'f' * 64}") == "200", "the new certificate is used"
        )


def test_a_unix_socket(engines: Engines, tmp_path: Path) -> None:
    path = tmp_path / "own.sock"
    engines.add("web", says("", document=state("web")))
    with monitor(engines.run_directory, "--listen-address", f"unix:{path}") as one:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        curl = ["curl", "-s", "--unix-socket", str(path), "http://any.name/sandboxes"]
        assert subprocess.run(curl, capture_output=True, check=True).stdout == b"web\n"
        second = subprocess.run(
            [sys.executable, str(ROOT / "src/kata/monitor/__main__.py"), "--listen-address", f"unix:{path}"],
            capture_output=True,
            check=False,
        )
        assert second.returncode == 1
        assert b"already\nhint: " in second.stderr
        # Killed, it leaves its socket; the next one takes it over.
        one.process.kill()
        one.process.wait()
        assert path.exists()
        with monitor(engines.run_directory, "--listen-address", f"unix:{path}"):
            assert subprocess.run(curl, capture_output=True, check=True).stdout == b"web\n"
        assert not path.exists()
        one.process.returncode = 0


def test_it_ends_at_once_and_says_when_it_is_ready(engines: Engines, tmp_path: Path) -> None:
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(tmp_path / "notify"))
    told.settimeout(PATIENCE_S)
    engines.add("stuck", stuck)
    with pytest.MonkeyPatch.context() as patch, contextlib.closing(told):
        patch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        one = Monitor(engines.run_directory)
        assert told.recv(100) == b"READY=1"
        stream = Stream(one, "/api/v1/stream")
        started = time.monotonic()
        one.process.send_signal(signal.SIGINT)
        assert told.recv(100) == b"STOPPING=1"
        assert one.process.wait(PATIENCE_S) == 0
        assert time.monotonic() - started < 5
        stream.close()


def test_a_port_that_is_taken_is_said(engines: Engines) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [
                sys.executable,
                str(ROOT / "src/kata/monitor/__main__.py"),
                "--listen-address",
                f"127.0.0.1:{port}",
            ],
            capture_output=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: cannot listen on 127.0.0.1:")
    assert b"\nhint: " in done.stderr

"""The management socket of real sandboxes, asked with curl: in each state of the machine, and by strange clients."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, Kata
from management_support import curl, descriptors, private_kib
from waiting import until, until_gone

from kata.engine.services import http1

GROWTH_KIB = 1792
"""What a scraped engine may take more than before its first scrape. Measured: 1050."""


class Managed:
    """A container of `kata run`, with its sockets."""

    def __init__(self, kata: Kata, name: str) -> None:
        self.kata = kata
        self.id = str(json.loads(kata.ok("inspect", name))[0]["id"])
        self.path = kata.run_dir / "sandboxes" / self.id / "shim-monitor.sock"
        self.link = kata.run_dir / "vc/sbs" / self.id / "shim-monitor.sock"
        self.engine = kata.engine_pid(name)


@pytest.fixture
def managed(shared_kata: Kata, busybox_image: str, tmp_path: Path) -> Iterator[Managed]:
    (tmp_path / "file").write_text("content")
    script = "echo out; echo aside >&2; while :; do sleep 0.2; done"
    volume = ("-v", f"{tmp_path}:/shared")
    shared_kata.ok("run", "-d", "--name", "managed", *volume, busybox_image, "sh", "-c", script)
    until(lambda: b"aside" in shared_kata.call("logs", "managed").stderr, "its first words")
    yield Managed(shared_kata, "managed")
    if '"managed"' in shared_kata.ok("ps", "-a", "--json"):
        shared_kata.ok("rm", "-f", "managed")


def test_every_endpoint(managed: Managed, tmp_path: Path) -> None:
    kata = managed.kata
    assert managed.path.stat().st_mode & 0o777 == 0o600
    settled = descriptors(managed.engine)
    before = private_kib(managed.engine)
    for path in (managed.path, managed.link):
        status, kind, body = curl(path, "/metrics")
        assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
        for family in ("kata_guest_meminfo", "kata_hypervisor_threads", "kata_shim_threads"):
            assert f"# TYPE {family} " in body
    assert curl(managed.path, "/metrics", "--compressed")[2].count("\n") > 100
    state = json.loads(curl(managed.path, "/kata/v1/state")[2])
    assert (state["id"], state["state"]) == (managed.id, "ready")
    assert [one["state"] for one in state["containers"]] == ["running"]
    timings = {one["name"]: one for one in json.loads(curl(managed.path, "/kata/v1/timings")[2])}
    assert timings["kernel"]["duration_seconds"] > 0
    assert "is serving" in curl(managed.path, "/kata/v1/console?tail=1000")[2]
    assert sorted(curl(managed.path, "/kata/v1/logs")[2].split()) == ["aside", "out"]
    status, _, body = curl(managed.path, "/agent-url")
    assert (status, "vsock://" in body or "no address" in body) in ((200, True), (501, True))
    usage = json.loads(curl(managed.path, f"/direct-volume/stats?path={tmp_path}")[2])["usage"]
    host = os.statvfs(tmp_path)
    assert usage[0]["total"] == host.f_blocks * host.f_frsize
    resize = json.dumps({"VolumePath": str(tmp_path), "Size": 1 << 20})
    status, _, body = curl(managed.path, "/direct-volume/resize", "-d", resize)
    assert (status, "no disk of its own" in body) == (409, True)
    status, _, body = curl(managed.path, "/iptables")
    assert (status, "extension" in body) == (409, True)
    assert curl(managed.path, "/nothing")[0] == 404
    # The commands that ask for the same.
    assert kata.ok("metrics", "managed").startswith("# HELP ")
    assert kata.ok("metrics", managed.id[:10]).startswith("# HELP ")
    program = [str(ROOT / "src/kata/oci_runtime/__main__.py"), "direct-volume", "stats", "--volume-path"]
    told = subprocess.run(
        [*program, tmp_path], env=kata.env, capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(told)["usage"][0]["total"] == usage[0]["total"]
    # What all of that has cost.
    for _ in range(100):
        curl(managed.path, "/metrics")
    until(
        lambda: descriptors(managed.engine) <= settled, lambda: str(os.listdir(f"/proc/{managed.engine}/fd"))
    )
    assert private_kib(managed.engine) - before < GROWTH_KIB
    with socket.socket(socket.AF_UNIX) as listening:
        listening.connect(str(managed.path))  # an open connection keeps nothing from ending
        kata.ok("rm", "-f", "managed")
        until(lambda: not managed.path.parent.exists(), "the sandbox is gone")
        until_gone(managed.engine)
    assert not managed.link.parent.exists()


def test_paused_stopped_and_dying_machines(managed: Managed) -> None:
    kata, path = managed.kata, managed.path
    kata.ok("pause", "managed")
    assert 'kata_shim_containers{state="paused"} 1' in curl(path, "/metrics")[2]
    kata.ok("resume", "managed")
    # A machine that does not run does not hold up who asks; what the host knows is answered.
    hypervisor = int(json.loads(kata.ok("inspect", "managed"))[0]["state"]["pid"])
    os.kill(hypervisor, signal.SIGSTOP)
    try:
        began = time.monotonic()
        status, _, body = curl(path, "/metrics")
        assert status == 200
        assert "kata_shim_agent_up 0" in body
        assert "# TYPE kata_hypervisor_threads " in body
        assert time.monotonic() - began < 15
        assert curl(path, "/kata/v1/state")[0] == 200
    finally:
        os.kill(hypervisor, signal.SIGCONT)
    until(lambda: "kata_shim_agent_up 1" in curl(path, "/metrics")[2], "the guest answers again")
    # Whoever asks while everything ends gets an answer, or learns that there is nobody.
    stop = threading.Event()
    seen: list[int] = []

    def ask() -> None:
        while not stop.is_set():
            with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
                seen.append(curl(path, "/metrics")[0])

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    os.kill(hypervisor, signal.SIGKILL)
    try:
        until(lambda: not path.exists(), "the sandbox has ended")
        until_gone(managed.engine)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(seen) <= {200, 503}
    assert not managed.link.parent.exists()


def test_strange_clients_do_not_hold_up_the_engine(managed: Managed) -> None:
    kata, path = managed.kata, str(managed.path)
    curl(managed.path, "/metrics")
    settled = descriptors(managed.engine)
    head = b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
    sockets = []
    for number in range(120):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        sock.connect(path)
        sockets.append(sock)
        with contextlib.suppress(BrokenPipeError):
            sock.sendall((head, b"\x16\x03\x01garbage" * 100, b"GET /" + b"x" * 20000, b"")[number % 4])
        if number % 8 == 0:
            sock.shutdown(socket.SHUT_WR)
    assert kata.ok("exec", "managed", "echo", "goes on") == "goes on\n"
    assert kata.ok("top", "managed")
    for sock in sockets:
        sock.close()
    until(lambda: descriptors(managed.engine) <= settled, "its connections are closed")
    assert curl(managed.path, "/metrics")[0] == 200


def test_what_is_answered_during_a_start_and_after_a_killed_engine(
    shared_kata: Kata, busybox_image: str
) -> None:
    before = set(shared_kata.sandboxes())
    starting = shared_kata.start("run", "-d", "--name", "young", busybox_image, "sleep", "1000")
    statuses: set[tuple[str, int]] = set()
    found: list[Path] = []
    deadline = time.monotonic() + 120
    while starting.poll() is None and time.monotonic() < deadline:
        found = [
            shared_kata.run_dir / "sandboxes" / name / "shim-monitor.sock"
            for name in set(shared_kata.sandboxes()) - before
        ]
        for path in found:
            for target in ("/metrics", "/kata/v1/state", "/iptables", "/kata/v1/console"):
                with contextlib.suppress(FileNotFoundError, subprocess.CalledProcessError):  # not there yet
                    statuses.add((target, curl(path, target)[0]))
    assert starting.wait(60) == 0
    starting.communicate()
    allowed = {"/iptables": {409, 503}}
    assert all(status in allowed.get(target, {200}) for target, status in statuses), statuses
    assert ("/iptables", 503) in statuses
    young = Managed(shared_kata, "young")
    os.kill(young.engine, signal.SIGKILL)
    until_gone(young.engine)
    assert young.link.is_symlink()
    shared_kata.ok("gc")
    assert not young.link.parent.exists()
    assert not young.path.exists()
    shared_kata.ok("rm", "-f", "young")


RULES = """*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -p tcp -m tcp --dport 4242 -j DROP
COMMIT
"""


def test_the_guests_packet_filter(kata_env: Kata, guest_assets: Path, busybox_image: str) -> None:
    kata = kata_env
    guest = shutil.copytree(guest_assets, kata.directory / "guest")
    kata.env["KATA_GUEST_DIR"] = str(guest)
    kata.ok("guest", "build", "--extension", "iptables")
    kata.env["KATA_GUEST_EXTENSIONS"] = "iptables"
    kata.ok("run", "-d", "--name", "filtered", busybox_image, "sleep", "1000")
    managed = Managed(kata, "filtered")
    program = str(ROOT / "src/kata/oci_runtime/__main__.py")

    def runtime(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [program, "iptables", *arguments, "--sandbox-id", "filtered"]
        return subprocess.run(
            command, input=stdin, env=kata.env, capture_output=True, text=True, check=False
        )

    assert "4242" not in curl(managed.path, "/iptables")[2]
    assert runtime("set", "-", stdin=RULES).stderr == ""
    assert "--dport 4242 -j DROP" in runtime("get").stdout
    assert "4242" not in runtime("get", "--v6").stdout
    (kata.directory / "rules").write_text(RULES.replace("4242", "4343"))
    assert curl(managed.path, "/ip6tables", "-T", str(kata.directory / "rules"))[0] == 200
    assert "--dport 4343 -j DROP" in curl(managed.path, "/ip6tables")[2]
    done = runtime("set", "-", stdin="nonsense")
    assert (done.returncode, "line 1 failed" in done.stderr) == (1, True)
    # Many at once: each has an answer, by their number, and what it took is given back.
    settled = descriptors(managed.engine)
    with ThreadPoolExecutor(40) as pool:
        statuses = list(pool.map(lambda _: curl(managed.path, "/metrics")[0], range(100)))
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) >= http1.MAX_CONNECTIONS
    until(lambda: descriptors(managed.engine) <= settled, "its connections are closed")
    kata.ok("rm", "-f", "filtered")

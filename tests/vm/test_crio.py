"""CRI-O, with our shim as a runtime of type "vm" and `kata-runtime` as one of type "oci": pods through crictl."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cni_support import forwarded
from crio_support import Crio, lacks
from terminal import Terminal
from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

CONTAINER = 1
"""NamespaceMode of the CRI: a namespace of the container's own."""


@pytest.fixture(scope="module")
def daemon(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Crio]:
    if missing := lacks():
        pytest.skip(f"needs {missing}")
    directory = Path(tempfile.mkdtemp(prefix="o", dir=run_directory))
    one = Crio(directory, guest_assets, Path(busybox_image.removeprefix("oci:")))
    try:
        one.make_namespace()
        one.start()
        yield one
    finally:
        one.remove()


@pytest.fixture
def crio(daemon: Crio) -> Iterator[Crio]:
    try:
        yield daemon
    finally:
        daemon.ask("rm", "-a", "-f")  # it kills at once, which the removal of a pod does not
        daemon("rmp", "-a", "-f")
        until(lambda: not daemon.sandboxes(), "no sandbox is left", daemon.diagnosis, 15)


@pytest.mark.parametrize("handler", ["kata", "kata-oci"])
def test_a_pod_and_its_containers(crio: Crio, handler: str) -> None:
    pod = crio.pod(handler, sysctls={"net.ipv4.ip_forward": "1"})
    one = crio.container(pod, "one", "sleep", "1000")
    two = crio.container(pod, "two", "sh", "-c", "echo said; echo wrong >&2; exit 5")
    assert len(crio.sandboxes()) == 1
    release = crio("exec", "-s", one, "uname", "-r").strip()
    assert release not in ("", os.uname().release)
    assert crio("exec", "-s", one, "hostname").strip() == "pod-of-crio"
    address = json.loads(crio("inspectp", pod[0]))["status"]["network"]["ip"]
    assert f"inet {address}/" in crio("exec", "-s", one, "ip", "address", "show", "eth0")
    assert crio("exec", "-s", one, "cat", "/proc/sys/net/ipv4/ip_forward").strip() == "1"
    assert crio("exec", "-i", one, "cat", stdin=b"through") == "through"
    crio("exec", "-s", one, "sh", "-c", "exit 4", code=1)

    until(lambda: crio.status(two)["state"] == "CONTAINER_EXITED", "the container has ended", crio.diagnosis)
    assert crio.status(two)["exitCode"] == 5
    lines = (crio.directory / "logs/two.log").read_text().splitlines()
    assert sorted(line.split(" ", 1)[1] for line in lines) == ["stderr F wrong", "stdout F said"]
    assert json.loads(crio("stats", "-o", "json", one))["stats"]
    crio("stop", "--timeout", "1", one)
    # The pod's processes see each other unless it says otherwise, so this is not process 1, which ignores TERM.
    assert crio.status(one)["exitCode"] == 143
    for which in (one, two):
        crio("rm", which)
    again = crio.container(pod, "again", "sleep", "1000")
    # It goes on without its daemon, and is known again.
    crio.stop()
    crio.start()
    assert crio.status(again)["state"] == "CONTAINER_RUNNING"
    assert crio("exec", "-s", again, "echo", "there").strip() == "there"
    crio("stopp", pod[0])
    crio("rmp", pod[0])
    until(lambda: not crio.sandboxes(), "no sandbox is left", crio.diagnosis, 15)


@pytest.mark.parametrize("handler", ["kata", "kata-oci"])
def test_out_of_memory_is_the_reason(crio: Crio, handler: str) -> None:
    pod = crio.pod(handler)
    limits = {"resources": {"memory_limit_in_bytes": 32 << 20}}
    one = crio.container(pod, "one", "sh", "-c", "x=a; while :; do x=$x$x; done", linux=limits)
    until(lambda: crio.status(one)["state"] == "CONTAINER_EXITED", "it has been killed", crio.diagnosis)
    status = crio.status(one)
    assert (status["exitCode"], status["reason"]) == (137, "OOMKilled")


@pytest.mark.parametrize("handler", ["kata", "kata-oci"])
def test_volumes_of_the_host(crio: Crio, tmp_path: Path, handler: str) -> None:
    (tmp_path / "from-host").write_text("hello")
    mounts = [
        {"container_path": "/data", "host_path": str(tmp_path)},
        {"container_path": "/ro", "host_path": str(tmp_path), "readonly": True},
    ]
    one = crio.container(crio.pod(handler), "one", "sleep", "1000", mounts=mounts)
    script = "cat /data/from-host; echo; echo back >/data/from-guest; touch /ro/x 2>/dev/null || echo not"
    assert crio("exec", "-s", one, "sh", "-c", script).split() == ["hello", "not"]
    assert (tmp_path / "from-guest").read_text() == "back\n"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("handler", ["kata", "kata-oci"])
def test_pids_of_their_own(crio: Crio, handler: str) -> None:
    """As the kubelet has them: the first process of each container is process 1, which TERM does not end."""
    own = {"security_context": {"namespace_options": {"pid": CONTAINER}}}
    pod = crio.pod(handler, **own)
    stopped = crio.container(pod, "stopped", "sleep", "1000", linux=own)
    removed = crio.container(pod, "removed", "sleep", "1000", linux=own)
    assert crio("exec", "-s", stopped, "cat", "/proc/1/comm").strip() == "sleep"
    crio("stop", "--timeout", "1", stopped)
    assert crio.status(stopped)["exitCode"] == 137
    assert crio.status(removed)["state"] == "CONTAINER_RUNNING"
    # CRI-O waits for what does not end by TERM as long as its caller waits for it, and then kills it.
    if crio.ask("--timeout", "4s", "rmp", "-f", pod[0]).returncode != 0:
        crio("rmp", "-f", pod[0])
    until(lambda: not crio.sandboxes(), "no sandbox is left", crio.diagnosis, 15)


def test_terminals_and_forwarded_ports(crio: Crio) -> None:
    """By type "oci", where conmon holds the terminals, and CRI-O itself goes to the pod's ports."""
    pod = crio.pod("kata-oci")
    waits = "while ! read -t 1 a; do echo up; done; echo got $a; exit 5"
    serve = "echo served >/tmp/f; httpd -p 127.0.0.1:8080 -h /tmp"
    one = crio.container(pod, "one", "sh", "-c", f"{serve}; {waits}", tty=True, stdin=True)
    sized = (
        'until test "$(stty size)" = "24 200"; do sleep 0.1; done; echo sized; read a; echo got $a; exit 6'
    )
    with Terminal(crio.command("exec", "-it", one, "sh", "-c", sized)) as shell:
        shell.expect("sized")
        shell.typed("there\r")
        shell.ended()
        assert "got there" in shell.said
        assert "exit code 6" in shell.said
    answer = forwarded(
        crio.endpoint, crio.around, pod[0], 8080, b"GET /f HTTP/1.0\r\n\r\n", more=crio.diagnosis
    )
    assert answer.endswith(b"\r\n\r\nserved\n")
    with Terminal(crio.command("attach", "-it", one)) as client:
        client.expect("up")
        client.typed("hello\r")
        client.ended()
        assert "got hello" in client.said
    until(lambda: crio.status(one)["state"] == "CONTAINER_EXITED", "the container has ended", crio.diagnosis)
    assert crio.status(one)["exitCode"] == 5

"""containerd 2: a short path with `ctr` and one with crictl. KATA_TEST_CONTAINERD=2 has all tests use it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_cri
from containerd_support import RUNTIME, Containerd, Events, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def daemon(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Containerd]:
    directory = Path(tempfile.mkdtemp(prefix="d", dir=run_directory))
    one = Containerd(directory, guest_assets, second=True)
    one.start()
    try:
        one.import_image(Path(busybox_image.removeprefix("oci:")))
        yield one
        until(lambda: not one.sandboxes(), "no sandbox is left", one.diagnosis, 15)
    finally:
        for name in one.tasks():
            one.ctr("task", "rm", "-f", name)
        one.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def cri(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[test_cri.Cri]:
    with test_cri.running(run_directory, guest_assets, busybox_image, second=True) as one:
        yield one


def bootstrap(daemon: Containerd, plugin: str, namespace: str, name: str) -> dict[str, object]:
    """What containerd has written down of how a shim is reached."""
    path = daemon.directory / "state" / plugin / namespace / name / "bootstrap.json"
    return dict(json.loads(path.read_text()))


def test_a_task_outlives_a_restart_of_containerd(daemon: Containerd) -> None:
    info = daemon.ok("plugins", "inspect-runtime", "--runtime", RUNTIME)
    assert '"Name": "io.containerd.kata.v2"' in info
    done = daemon.run("once", "sh", "-c", "uname -r; exit 7")
    assert done.returncode == 7
    assert done.stdout.decode().strip() not in ("", os.uname().release)
    events = Events(daemon)
    try:
        pid = daemon.detached("life", "sleep", "1000")
        told = bootstrap(daemon, "io.containerd.runtime.v2.task", "default", "life")
        assert (told["version"], told["protocol"]) == (3, "ttrpc")
        daemon.stop()
        daemon.start()
        assert daemon.tasks()["life"] == (pid, "RUNNING")
        done = daemon.ctr("task", "exec", "--exec-id", "e", "life", "sh", "-c", "cat; exit 3", stdin=b"hi")
        assert (done.returncode, done.stdout) == (3, b"hi")
        assert "cpu" in daemon.ok("task", "metrics", "life").lower()
        daemon.ok("task", "kill", "-s", "KILL", "life")
        until(lambda: daemon.tasks()["life"][1] == "STOPPED", "the task has ended")
        daemon.remove("life")
    finally:
        events.close()
    assert [topic for topic, _ in events.topics("life")] == [
        "create",
        "start",
    ]  # then its containerd went away


def test_a_pod_and_its_containers(cri: test_cri.Cri) -> None:
    pod = cri.pod()
    one = cri.container(pod, "one", "sleep", "1000")
    two = cri.container(pod, "two", "sh", "-c", "echo said; exit 5")
    assert len(cri.daemon.sandboxes()) == 1
    # It was told the pod's address when that was made: it does not ask a shim again.
    told = [
        bootstrap(cri.daemon, "io.containerd.runtime.v2.task", "k8s.io", name) for name in (pod[0], one, two)
    ]
    assert told[0]["version"] == 3
    assert len({str(entry["address"]) for entry in told}) == 1
    assert cri("exec", "-i", one, "cat", stdin=b"through") == "through"
    until(lambda: cri.status(two)["state"] == "CONTAINER_EXITED", "the container has ended")
    assert (cri.status(two)["exitCode"], cri("logs", two)) == (5, "said\n")
    assert cri.status(one)["state"] == "CONTAINER_RUNNING"
    test_cri.clean(cri)

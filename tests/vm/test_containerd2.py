"""containerd 2: a short path with `ctr` and one with crictl. KATA_TEST_CONTAINERD=2 has all tests use it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_cri
from containerd_support import RUNTIME, Containerd, Events, running
from waiting import until

from kata.proto import cgroups_v1_pb, podsandbox_pb
from kata.ttrpc import sync_client
from kata.ttrpc.status import TtrpcError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def daemon(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Containerd]:
    with running(run_directory, guest_assets, busybox_image, second=True) as one:
        yield one
        until(lambda: not one.sandboxes(), "no sandbox is left", one.diagnosis, 15)


@pytest.fixture(scope="module")
def cri(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[test_cri.Cri]:
    with test_cri.running(run_directory, guest_assets, busybox_image, second=True) as one:
        yield one


@pytest.fixture(autouse=True)
def _clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that failed leaves nothing to its next try, or to the tests after it."""
    used = [request.getfixturevalue(name) for name in ("cri", "pods") if name in request.fixturenames]
    yield
    for one in used:
        test_cri.clean(one)


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
    pod = cri.pod(security_context={"privileged": True})
    one = cri.container(pod, "one", "sleep", "1000")
    two = cri.container(pod, "two", "sh", "-c", "readlink /proc/self/fd/0; echo said; exit 5")
    assert len(cri.daemon.sandboxes()) == 1
    # It was told the pod's address when that was made: it does not ask a shim again.
    told = [
        bootstrap(cri.daemon, "io.containerd.runtime.v2.task", "k8s.io", name) for name in (pod[0], one, two)
    ]
    assert told[0]["version"] == 3
    assert len({str(entry["address"]) for entry in told}) == 1
    assert cri("exec", "-i", one, "cat", stdin=b"through") == "through"
    until(lambda: cri.status(two)["state"] == "CONTAINER_EXITED", "the container has ended")
    assert (cri.status(two)["exitCode"], cri("logs", two)) == (5, "/dev/null\nsaid\n")
    assert cri.status(one)["state"] == "CONTAINER_RUNNING"
    # The handler that was installed gives a privileged one the devices of its guest. It is a debugger, too.
    options = {"privileged": True, "namespace_options": {"pid": 3, "target_id": one}}
    three = cri.container(pod, "three", "sleep", "9999", linux={"security_context": options})
    script = (
        "ps | grep -c 'sleep 1000$'; dd if=/dev/zero of=/dev/shm/i bs=1M count=4 2>/dev/null;"
        " mke2fs -F /dev/shm/i >/dev/null && mkdir /m && mount -o loop /dev/shm/i /m && ls /m; exec 3<>/dev/net/tun"
    )
    assert cri("exec", "-s", three, "sh", "-c", script).split() == ["1", "lost+found"]
    assert "No such file or directory" in cri("exec", "-s", one, "sh", "-c", "ls /dev/loop0 2>&1; true")
    assert cri("exec", "-s", one, "readlink", "/proc/self/fd/0").strip() == "/dev/null"


def test_a_pods_roots_of_erofs_layers(run_directory: Path, guest_assets: Path, busybox_image: str) -> None:
    more = 'snapshotter = "erofs"'
    with test_cri.running(run_directory, guest_assets, busybox_image, second=True, more=more) as one:
        plugins = one.daemon.ok("plugins", "ls")
        if not any(
            {"erofs", "ok"} <= set(line.split()) for line in plugins.splitlines() if "snapshotter" in line
        ):
            pytest.skip("needs erofs in the host's kernel")
        try:
            pod = one.pod()
            names = [one.container(pod, name, "sleep", "1000") for name in ("one", "two")]
            for name in names:
                assert one("exec", "-s", name, "sh", "-c", "echo kept > /made; cat /made").strip() == "kept"
            blobs = one.daemon.directory.glob("root/io.containerd.snapshotter.v1.erofs/snapshots/*")
            # Of the pod and of its containers, each above the layer of an image.
            assert sum((path / "fs/made").exists() for path in blobs) == len(names)
        finally:
            test_cri.clean(one)


# ---- the Sandbox API: the runtime's configuration says `sandboxer = "shim"` ----


@pytest.fixture(scope="module")
def pods(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[test_cri.Cri]:
    more = 'sandboxer = "shim"\ndisable_pause_image_pull = true'
    with test_cri.running(run_directory, guest_assets, busybox_image, second=True, more=more) as one:
        yield one


def test_a_pod_without_a_container_of_its_own(pods: test_cri.Cri) -> None:
    pod = pods.pod(sysctls={"net.ipv4.ip_forward": "1"})
    status = json.loads(pods("inspectp", pod[0]))
    assert status["status"]["state"] == "SANDBOX_READY"
    one = pods.container(pod, "one", "sleep", "1000")
    two = pods.container(pod, "two", "sh", "-c", "echo said; exit 5")
    tasks = pods.daemon.ok("--namespace", "k8s.io", "task", "ls")
    assert (one in tasks, pod[0] in tasks) == (True, False)
    assert pods.daemon.ok("--namespace", "k8s.io", "sandboxes", "ls").count(pod[0]) == 1
    assert len(pods.daemon.sandboxes()) == 1
    told = bootstrap(pods.daemon, "io.containerd.runtime.v2.task", "k8s.io", one)
    assert (told["version"], str(told["address"]).endswith("engine.sock")) == (3, True)
    # What the files of a pod's own container would say.
    about = "hostname; cat /etc/resolv.conf; cat /proc/sys/net/ipv4/ip_forward; grep p1 /etc/hosts"
    seen = pods("exec", "-s", one, "sh", "-c", about)
    assert seen.splitlines()[0] == "p1"
    assert "nameserver 10.88.7.1" in seen
    assert "search example.test" in seen
    assert "\n1\n" in seen
    address = status["status"]["network"]["ip"]
    assert f"{address}\tp1" in seen
    assert address in pods("exec", "-s", one, "ip", "address", "show", "eth0")
    until(lambda: pods.status(two)["state"] == "CONTAINER_EXITED", "the container has ended")
    assert (pods.status(two)["exitCode"], pods("logs", two)) == (5, "said\n")
    asked = podsandbox_pb.SandboxMetricsRequest(sandbox_id=pod[0])
    with sync_client.connect(str(told["address"]).removeprefix("unix://")) as engine:
        service = "containerd.runtime.sandbox.v1.Sandbox"
        engine.call(service, "PingSandbox", asked, podsandbox_pb.PingResponse)
        runs = engine.call(service, "Platform", asked, podsandbox_pb.PlatformResponse).platform
        assert runs is not None
        assert runs.os == "linux"
        found = engine.call(service, "SandboxMetrics", asked, podsandbox_pb.SandboxMetricsResponse).metrics
        assert found is not None
        assert found.id == pod[0]
        assert found.data is not None
        if found.data.type_url.endswith("v1.Metrics"):
            figures = cgroups_v1_pb.Metrics.decode(found.data.value)
            assert figures.memory is not None
            assert figures.memory.usage is not None
            assert figures.memory.usage.usage > 50 << 20  # a booted machine
        other = podsandbox_pb.PingRequest(sandbox_id="other")
        with pytest.raises(TtrpcError, match="not served here"):
            engine.call(service, "PingSandbox", other, podsandbox_pb.PingResponse)
    # It outlives its containers.
    pods("stop", "--timeout", "0", one)
    for container in (one, two):
        pods("rm", container)
    again = pods.container(pod, "again", "sleep", "1000")
    assert pods("exec", "-s", again, "sh", "-c", "echo x >/dev/shm/x; cat /dev/shm/x").strip() == "x"
    pods("stopp", pod[0])
    assert pods.status(again)["exitCode"] == 137
    assert json.loads(pods("inspectp", pod[0]))["status"]["state"] == "SANDBOX_NOTREADY"


def test_such_a_pod_outlives_a_restart_of_containerd_and_says_when_it_dies(pods: test_cri.Cri) -> None:
    pod = pods.pod()
    one = pods.container(pod, "one", "sleep", "1000")
    pods.daemon.stop()
    pods.daemon.start()
    assert json.loads(pods("inspectp", pod[0]))["status"]["state"] == "SANDBOX_READY"
    assert pods("exec", "-s", one, "echo", "there").strip() == "there"
    [sandbox] = pods.daemon.sandboxes()
    machine = pods.daemon.victim(sandbox, "machine")
    os.kill(machine, signal.SIGKILL)
    until(lambda: pods.status(one)["state"] == "CONTAINER_EXITED", "the container is told to have ended")
    assert pods.status(one)["exitCode"] == 137
    until(
        lambda: json.loads(pods("inspectp", pod[0]))["status"]["state"] == "SANDBOX_NOTREADY",
        "the pod is told to have ended",
    )


def test_such_a_pods_host_namespaces_are_refused(pods: test_cri.Cri) -> None:
    path = pods.daemon.directory / "host.json"
    options = {"security_context": {"namespace_options": {"pid": 2}}}
    path.write_text(
        json.dumps({"metadata": {"name": "h", "uid": "h", "namespace": "test"}, "linux": options})
    )
    pods("runp", "--runtime", "kata", str(path), code=1)
    assert "host's PID namespace" in pods.daemon.log.read_text()

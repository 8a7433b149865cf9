"""Pods as Kubernetes makes them: crictl, containerd's CRI plugin, CNI's bridge."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from containerd_support import PATIENCE, USE_SECOND, Containerd, until, with_command

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PLUGINS = Path("/usr/lib/cni")
BUSYBOX = "docker.io/local/busybox:latest"
PAUSE = "docker.io/local/pause:latest"


class Cri:
    """crictl, and the daemon that it talks to, in a network namespace where CNI may make its bridge.

    Args:
        directory: Made by the caller.
        guest: The guest's directory.
        second: Take containerd 2.
        more: Further text for the runtime's section in the daemon's configuration.
    """

    def __init__(self, directory: Path, guest: Path, *, second: bool = USE_SECOND, more: str = "") -> None:
        self.daemon = Containerd(directory, guest, second=second)
        self.netns = f"kt{os.getpid()}c"
        self.daemon.around = ["nsenter", f"--net=/run/netns/{self.netns}"]
        networks = directory / "net.d"
        networks.mkdir()
        plugin = {
            "type": "bridge",
            "bridge": "kt0",
            "isGateway": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.88.7.0/24"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
                "dataDir": str(directory / "ipam"),
            },
        }
        (networks / "10-kt.conflist").write_text(
            json.dumps({"cniVersion": "0.4.0", "name": "kt", "plugins": [plugin]})
        )
        section = 'plugins."io.containerd.grpc.v1.cri"'
        self.daemon.configure(
            [],
            f"""
[{section}]
sandbox_image = "{PAUSE}"
[{section}.cni]
bin_dir = "{PLUGINS}"
conf_dir = "{networks}"
[{section}.containerd]
default_runtime_name = "kata"
[{section}.containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
privileged_without_host_devices = true
{more}
""",
        )
        self._count = 0

    def __call__(self, *arguments: str, stdin: bytes = b"", code: int | None = 0) -> str:
        """Run crictl; its standard output, after a look at its exit status."""
        socket = f"unix://{self.daemon.socket}"
        done = subprocess.run(
            # A streaming server on loopback carries exec's and attach's streams: it is in there as well.
            [*self.daemon.around, "crictl", "--timeout", "2m", "-r", socket, "-i", socket, *arguments],
            input=stdin,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        said = f"crictl {' '.join(arguments)}: {done.stderr.decode()}\n{self.daemon.diagnosis()}"
        assert code is None or done.returncode == code, said
        return done.stdout.decode()

    def pod(self, **linux: Any) -> tuple[str, Path]:
        """Run a pod; its id, and its configuration's file."""
        self._count += 1
        name = f"p{self._count}"
        path = self._write(
            name,
            {
                "metadata": {"name": name, "uid": name, "namespace": "test"},
                "hostname": name,
                "log_directory": str(self.daemon.directory / name),
                "dns_config": {"servers": ["10.88.7.1"], "searches": ["example.test"]},
                "linux": linux,
            },
        )
        return self("runp", "--runtime", "kata", str(path)).strip(), path

    def container(self, pod: tuple[str, Path], name: str, *command: str, **more: Any) -> str:
        """Make and start a container in a pod; its id."""
        config = {"metadata": {"name": name}, "image": {"image": BUSYBOX}, "command": command, **more}
        path = self._write(f"{pod[0][:8]}-{name}", {"log_path": f"{name}.log", "linux": {}, **config})
        made = self("create", pod[0], str(path), str(pod[1])).strip()
        self("start", made)
        return made

    def status(self, container: str) -> dict[str, Any]:
        """What ``crictl inspect`` says of a container's status."""
        return dict(json.loads(self("inspect", container))["status"])

    def _write(self, name: str, content: dict[str, Any]) -> Path:
        path = self.daemon.directory / f"{name}.json"
        path.write_text(json.dumps(content))
        return path


@contextlib.contextmanager
def running(
    run_directory: Path, guest: Path, busybox: str, *, second: bool = USE_SECOND, more: str = ""
) -> Iterator[Cri]:
    """A daemon with its network and images; the arguments are those of `Cri`."""
    if shutil.which("crictl") is None:
        pytest.skip("needs crictl (sigs.k8s.io/cri-tools, built with Go)")
    if not (PLUGINS / "bridge").exists():
        pytest.skip("needs CNI's plugins (apt-get install containernetworking-plugins)")
    directory = Path(tempfile.mkdtemp(prefix="k", dir=run_directory))
    one = Cri(directory, guest, second=second, more=more)
    subprocess.run(["ip", "netns", "add", one.netns], check=True)
    try:
        subprocess.run(["ip", "-n", one.netns, "link", "set", "lo", "up"], check=True)
        one.daemon.start()
        layout = Path(busybox.removeprefix("oci:"))
        one.daemon.import_image(layout, BUSYBOX, "k8s.io")
        pause = with_command(layout, directory / "pause", "/bin/busybox", "sleep", "2147483647")
        one.daemon.import_image(pause, PAUSE, "k8s.io")
        yield one
    finally:
        one.daemon.stop()
        subprocess.run(["ip", "netns", "delete", one.netns], check=False)
        shutil.rmtree(directory, ignore_errors=True)


def clean(cri: Cri) -> None:
    """Remove all pods; nothing of them may be left."""
    for pod in cri("pods", "-q").split():
        cri("rmp", "-f", pod)
    until(lambda: not cri.daemon.sandboxes(), "no sandbox is left", cri.daemon.diagnosis, 15)
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert "cni-" not in names


@pytest.fixture(scope="module")
def cri(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Cri]:
    with running(run_directory, guest_assets, busybox_image) as one:
        yield one


@pytest.fixture(autouse=True)
def _clean(cri: Cri) -> Iterator[None]:
    yield
    clean(cri)


def test_a_pod_is_one_machine_with_several_containers(cri: Cri) -> None:
    pod = cri.pod()
    one = cri.container(pod, "one", "sleep", "1000")
    two = cri.container(pod, "two", "sleep", "1000")
    assert len(cri.daemon.sandboxes()) == 1
    seen = [
        cri("exec", "-s", each, "sh", "-c", "hostname; hostname -i; cat /etc/resolv.conf")
        for each in (one, two)
    ]
    assert seen[0] == seen[1]
    assert seen[0].splitlines()[0] == "p1"
    assert "nameserver 10.88.7.1" in seen[0]
    assert "search example.test" in seen[0]
    address = json.loads(cri("inspectp", pod[0]))["status"]["network"]["ip"]
    assert address in cri("exec", "-s", one, "ip", "address", "show", "eth0")
    # One network, so one container's server is another's on loopback.
    cri("exec", "-s", one, "sh", "-c", "echo served | nc -l -p 7000 >/dev/null 2>&1 &")
    until(lambda: "served" in cri("exec", "-s", two, "nc", "127.0.0.1", "7000", code=None), "the loopback")
    ping = ["nsenter", f"--net=/run/netns/{cri.netns}", "ping", "-c", "1", "-W", "20", address]
    if shutil.which("ping"):
        assert subprocess.run(ping, capture_output=True, check=False).returncode == 0


def test_logs_streams_and_codes(cri: Cri) -> None:
    pod = cri.pod()
    one = cri.container(pod, "one", "sh", "-c", "echo out; echo err >&2; exit 5")
    until(lambda: cri.status(one)["state"] == "CONTAINER_EXITED", "the container has ended")
    assert cri.status(one)["exitCode"] == 5
    lines = (cri.daemon.directory / "p2" / "one.log").read_text().splitlines()
    assert {tuple(line.split()[1:]) for line in lines} == {("stdout", "F", "out"), ("stderr", "F", "err")}
    two = cri.container(pod, "two", "sleep", "1000")
    assert cri("exec", "-i", two, "cat", stdin=b"through") == "through"
    assert cri("exec", "-s", two, "sh", "-c", "exit 9", code=None) == ""
    missing = cri("exec", "-s", two, "nosuch", code=None)
    assert missing == ""


def test_stop_sends_one_term_and_the_pod_goes_on(cri: Cri) -> None:
    pod = cri.pod()
    script = "trap 'n=$((n+1)); echo term $n; exit 3' TERM; echo ready; while :; do sleep 0.1; done"
    one = cri.container(pod, "one", "sh", "-c", script)
    two = cri.container(pod, "two", "sleep", "1000")
    until(lambda: "ready" in cri("logs", one), "the trap is set")
    cri("stop", "--timeout", "60", one)
    status = cri.status(one)
    assert (status["exitCode"], status["state"]) == (3, "CONTAINER_EXITED")
    assert cri("logs", one).splitlines() == ["ready", "term 1"]
    cri("rm", one)
    again = cri.container(pod, "again", "sleep", "1000")
    assert cri.status(again)["state"] == cri.status(two)["state"] == "CONTAINER_RUNNING"
    cri("stopp", pod[0])
    assert cri.status(two)["exitCode"] in (137, 143)


def test_out_of_memory_is_the_reason(cri: Cri) -> None:
    pod = cri.pod()
    eat = "x=a; while :; do x=$x$x; done"
    limits = {"resources": {"memory_limit_in_bytes": 32 << 20}}
    one = cri.container(pod, "one", "sh", "-c", eat, linux=limits)
    until(lambda: cri.status(one)["state"] == "CONTAINER_EXITED", "the container has been killed")
    status = cri.status(one)
    assert (status["exitCode"], status["reason"]) == (137, "OOMKilled")


@pytest.mark.parametrize("mode", [0, 1], ids=["of the pod", "of the container"])
def test_whose_processes_are_seen(cri: Cri, mode: int) -> None:
    linux = {"security_context": {"namespace_options": {"pid": mode}}}
    pod = cri.pod(**linux)
    cri.container(pod, "one", "sleep", "1234", linux=linux)
    two = cri.container(pod, "two", "sleep", "4321", linux=linux)
    seen = cri("exec", "-s", two, "ps")
    assert ("sleep 1234" in seen) == (mode == 0)
    assert "sleep 4321" in seen


def test_volumes_of_the_host(cri: Cri) -> None:
    pod = cri.pod()
    shared = cri.daemon.directory / "volume"
    shared.mkdir()
    (shared / "from-host").write_text("hello")
    mounts = [
        {"container_path": "/data", "host_path": str(shared)},
        {"container_path": "/ro", "host_path": str(shared), "readonly": True},
    ]
    one = cri.container(pod, "one", "sleep", "1000", mounts=mounts)
    assert cri("exec", "-s", one, "cat", "/data/from-host").strip() == "hello"
    cri("exec", "-s", one, "sh", "-c", "echo back >/data/from-guest")
    assert (shared / "from-guest").read_text() == "back\n"
    assert "Read-only" in cri("exec", "-s", one, "sh", "-c", "touch /ro/x 2>&1; true")


@pytest.mark.parametrize(("option", "name"), [("network", "network"), ("pid", "PID"), ("ipc", "IPC")])
def test_the_hosts_namespaces_are_refused(cri: Cri, option: str, name: str) -> None:
    path = cri.daemon.directory / f"host-{option}.json"
    options = {"security_context": {"namespace_options": {option: 2}}}
    pod = {"metadata": {"name": f"host-{option}", "uid": option, "namespace": "test"}, "linux": options}
    path.write_text(json.dumps(pod))
    cri("runp", "--runtime", "kata", str(path), code=1)
    assert f"host's {name} namespace" in cri.daemon.log.read_text()

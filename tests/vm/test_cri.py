"""Pods as Kubernetes makes them: crictl, containerd's CRI plugin, CNI's bridge."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tutorials
from cni_support import PLUGINS, forwarded, write_network
from containerd_support import USE_SECOND, Containerd, with_command
from management_support import curl
from monitor_support import monitor
from socket_support import Service, answer, client
from waiting import PATIENCE, until

from kata.resources import host_cgroup

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

BUSYBOX = "docker.io/local/busybox:latest"
PAUSE = "docker.io/local/pause:latest"


class Cri:
    """crictl, and the daemon that it talks to, in a network namespace where CNI may make its bridge.

    Args:
        directory: Made by the caller.
        guest: The guest's directory.
        second: Take containerd 2.
        more: Further text for the runtime's section in the daemon's configuration.

    Attributes:
        count: Of pods so far; the last one's name is ``pN``.
    """

    def __init__(self, directory: Path, guest: Path, *, second: bool = USE_SECOND, more: str = "") -> None:
        self.daemon = Containerd(directory, guest, second=second)
        self.netns = f"kt{os.getpid()}{directory.name}"
        self.daemon.around = ["nsenter", f"--net=/run/netns/{self.netns}"]
        networks = write_network(directory, "kt", "10.88.7.0/24")
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
""",
        )
        self.daemon.kata("install", "containerd", "--config", str(directory / "config.toml"))
        if more:
            path = directory / "config.toml"
            known = "privileged_without_host_devices = true\n"
            path.write_text(path.read_text().replace(known, known + more + "\n", 1))
        self.count = 0

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

    def pod(self, annotations: Any = None, **linux: Any) -> tuple[str, Path]:
        """Run a pod; its id, and its configuration's file."""
        self.count += 1
        name = f"p{self.count}"
        path = self._write(
            name,
            {
                "metadata": {"name": name, "uid": name, "namespace": "test"},
                "hostname": name,
                "log_directory": str(self.daemon.directory / name),
                "dns_config": {"servers": ["10.88.7.1"], "searches": ["example.test"]},
                "annotations": annotations or {},
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
        pytest.skip("needs crictl (tools/setup test builds it)")
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
    networks = []
    for pod in cri("pods", "-q").split():
        about = json.loads(cri("inspectp", pod))["info"].get("runtimeSpec") or {"linux": {"namespaces": []}}
        networks += [one["path"] for one in about["linux"]["namespaces"] if one["type"] == "network"]
        cri("rmp", "-f", pod)
    until(lambda: not cri.daemon.sandboxes(), "no sandbox is left", cri.daemon.diagnosis, 15)
    assert [path for path in networks if os.path.exists(path)] == []


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
    link = cri.daemon.run_dir / "vc/sbs" / pod[0] / "shim-monitor.sock"
    state = json.loads(curl(link, "/kata/v1/state")[2])
    assert {one["id"] for one in state["containers"]} >= {one, two}
    assert f'container_id="{one}"' in curl(link, "/metrics")[2]
    seen = [
        cri("exec", "-s", each, "sh", "-c", "hostname; cat /etc/hosts /etc/resolv.conf")
        for each in (one, two)
    ]
    assert seen[0] == seen[1]
    assert seen[0].splitlines()[0] == "p1"
    # containerd gives a copy of the host's, where there is no kubelet: the pod's own name is not in it.
    assert Path("/etc/hosts").read_text() in seen[0]
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


def test_what_a_containers_root_is_made_of(cri: Cri) -> None:
    """By default of disks: one of the image for all containers, one for each to write to, which the host measures."""
    pod = cri.pod()
    one, two = (
        cri.container(pod, name, "sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done")
        for name in ("one", "two")
    )
    for name in (one, two):
        mounts = "awk '$2 == \"/\" {print $3}' /proc/mounts; cut -d' ' -f3 /proc/mounts | grep -c virtiofs"
        assert cri("exec", "-s", name, "sh", "-c", mounts, code=None).split()[0] == "overlay"
    cri("exec", "-s", one, "sh", "-c", "rm /etc/passwd; dd if=/dev/urandom of=/data bs=1M count=24; sync")
    assert (
        cri("exec", "-s", two, "sh", "-c", "ls /etc/passwd; ls /data 2>&1; true").splitlines()[0]
        == "/etc/passwd"
    )
    snapshots = cri.daemon.directory / "root/io.containerd.snapshotter.v1.overlayfs/snapshots"
    disks = list(snapshots.glob("*/fs/.kata-writable-layer.img"))
    assert len(disks) == 2
    assert len(list((cri.daemon.directory / "s/layers").glob("*.erofs"))) == 1
    # What the kubelet asks for to keep a limit on ephemeral storage; containerd measures every ten seconds.

    def measured() -> int:
        (stats,) = json.loads(cri("stats", "-o", "json", "--id", one))["stats"]
        return int((stats["writableLayer"].get("usedBytes") or {}).get("value") or 0)

    until(lambda: measured() > 24 << 20, "what it takes is measured", cri.daemon.diagnosis)
    cri("exec", "-s", one, "sh", "-c", "cp /data /more; sync; rm /more; sync")
    until(
        lambda: max(disk.stat().st_blocks * 512 for disk in disks) < 32 << 20,
        "what was deleted is counted no longer",
        cri.daemon.diagnosis,
    )

    cri("stop", "-t", "20", one)
    assert cri.status(one)["exitCode"] == 3
    [carried] = snapshots.glob("*/fs/data")
    assert carried.stat().st_size == 24 << 20
    assert stat.S_ISCHR(os.lstat(carried.parent / "etc/passwd").st_mode)
    until(lambda: len(list(snapshots.glob("*/fs/.kata*"))) == 1, "its disk is gone", cri.daemon.diagnosis)
    again = cri.container(pod, "again", "sleep", "1000")
    assert "/etc/passwd" in cri("exec", "-s", again, "ls", "/etc/passwd")


def test_a_containers_root_is_live_where_that_is_wanted(cri: Cri) -> None:
    pod = cri.pod({"io.katacontainers.config.runtime.rootfs_upper_layer": "live"})
    one = cri.container(pod, "one", "sleep", "1000")
    cri("exec", "-s", one, "touch", "/seen-at-once")
    snapshots = cri.daemon.directory / "root/io.containerd.snapshotter.v1.overlayfs/snapshots"
    assert list(snapshots.glob("*/fs/seen-at-once"))
    assert not list(snapshots.glob("*/fs/.kata-writable-layer.img"))


def test_a_pod_is_watched_under_its_name(cri: Cri) -> None:
    daemon = cri.daemon
    endpoint = ("--runtime-endpoint", f"unix://{daemon.socket}")
    with monitor(daemon.directory, *endpoint, run_dir=daemon.run_dir) as watching:
        pod, path = cri.pod()
        one = cri.container((pod, path), "one", "sleep", "1000")
        name = json.loads(path.read_text())["metadata"]["name"]
        labels = f'sandbox_id="{pod}",cri_uid="{name}",cri_name="{name}",cri_namespace="test"'
        up = f"kata_shim_agent_up{{{labels}}} 1\n"
        until(lambda: up in watching.get("/metrics").text, "the pod's name is known", watching.log.read_text)
        assert watching.get("/sandboxes").text == f"{pod}\n"
        found = watching.get("/metrics").text
        assert f'kata_container_info{{{labels},container_id="{one}"' in found
        (state,) = watching.get("/api/v1/sandboxes").json["sandboxes"]
        assert state["id"] == pod
        assert state["cri"] == {"uid": name, "name": name, "namespace": "test"}
        assert {"one"} <= {container["name"] for container in state["containers"]}


def test_logs_streams_and_codes(cri: Cri) -> None:
    pod = cri.pod()
    one = cri.container(pod, "one", "sh", "-c", "echo out; echo err >&2; exit 5")
    until(lambda: cri.status(one)["state"] == "CONTAINER_EXITED", "the container has ended")
    assert cri.status(one)["exitCode"] == 5
    log = Path(json.loads(pod[1].read_text())["log_directory"]) / "one.log"
    lines = log.read_text().splitlines()
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


def test_a_silent_pod_is_stopped_and_removed(cri: Cri) -> None:
    pod = cri.pod()
    cri.container(pod, "one", "sleep", "1000")
    os.kill(int(json.loads(cri("inspectp", pod[0]))["info"]["pid"]), signal.SIGSTOP)
    began = time.monotonic()
    cri("stopp", pod[0])
    cri("rmp", pod[0])
    assert time.monotonic() - began < 20


def test_a_termination_message_sysctls_and_groups(cri: Cri) -> None:
    pod = cri.pod(sysctls={"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "1"})
    message = cri.daemon.directory / "termination-message"
    message.touch()
    message.chmod(0o666)
    # As a kubelet has it: a file of the host's, which it reads when the container has ended.
    mounts = [{"container_path": "/dev/termination-log", "host_path": str(message)}]
    context = {"run_as_user": {"value": 1000}, "run_as_group": {"value": 50}, "supplemental_groups": [77]}
    names = ("net/ipv4/ip_unprivileged_port_start", "kernel/shm_rmid_forced")
    script = (
        f"echo the reason >/dev/termination-log; id; cat {' '.join('/proc/sys/' + one for one in names)}"
    )
    one = cri.container(pod, "one", "sh", "-c", script, mounts=mounts, linux={"security_context": context})
    until(lambda: cri.status(one)["state"] == "CONTAINER_EXITED", "the container has ended")
    assert message.read_text() == "the reason\n"
    user, *values = cri("logs", one).splitlines()
    assert user.startswith("uid=1000 gid=50")
    assert "77" in user.partition("groups=")[2]
    assert values == ["80", "1"]


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
    # As `kubectl debug --target` does: a container that sees those of another one, whose end is its own.
    options = {"pid": 3, "target_id": two}
    debugger = cri.container(
        pod, "debugger", "sleep", "9999", linux={"security_context": {"namespace_options": options}}
    )
    seen = cri("exec", "-s", debugger, "ps")
    assert "sleep 4321" in seen
    assert "sleep 9999" in seen
    assert ("sleep 1234" in seen) == (mode == 0)
    if mode == 1:
        number = int(json.loads(cri("inspect", two))["info"]["pid"])
        machine = int(json.loads(cri("inspectp", pod[0]))["info"]["pid"])
        assert os.readlink(f"/proc/{number}/ns/net") == os.readlink(f"/proc/{machine}/ns/net")
        cri("stop", "--timeout", "0", two)
        until(lambda: cri.status(debugger)["state"] == "CONTAINER_EXITED", "the end of all in its namespace")
        cri("rm", two)
        assert not Path(f"/proc/{number}").exists()


def test_volumes_of_the_host(cri: Cri) -> None:
    pod = cri.pod()
    shared = cri.daemon.directory / "volume"
    shutil.rmtree(shared, ignore_errors=True)  # of a try that failed
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


def test_a_socket_of_the_host(cri: Cri, tmp_path: Path) -> None:
    programs = client(tmp_path).parent
    mounts = [
        {"container_path": "/run/x.sock", "host_path": str(tmp_path / "x.sock"), "readonly": True},
        {"container_path": "/programs", "host_path": str(programs), "readonly": True},
    ]
    with Service(tmp_path / "x.sock"):
        pod = cri.pod()
        for name in ("one", "two"):
            one = cri.container(pod, name, "sleep", "1000", mounts=mounts)
            said = cri("exec", "-s", one, "/programs/unix-client", "/run/x.sock")
            assert said.split() == [answer(b"").decode().strip()], cri.daemon.diagnosis()
            cri("stop", "-t", "0", one)
            cri("rm", one)


@pytest.mark.parametrize(("option", "name"), [("network", "network"), ("pid", "PID"), ("ipc", "IPC")])
def test_the_hosts_namespaces_are_refused(cri: Cri, option: str, name: str) -> None:
    path = cri.daemon.directory / f"host-{option}.json"
    options = {"security_context": {"namespace_options": {option: 2}}}
    pod = {"metadata": {"name": f"host-{option}", "uid": option, "namespace": "test"}, "linux": options}
    path.write_text(json.dumps(pod))
    cri("runp", "--runtime", "kata", str(path), code=1)
    assert f"host's {name} namespace" in cri.daemon.log.read_text()


WHO = """\
#include <stdio.h>
#include <unistd.h>
int main(void) { printf("%d\\n", geteuid()); return 0; }
"""
WATCH = """\
#include <stdio.h>
#include <sys/inotify.h>
#include <unistd.h>
int main(int argc, char **argv) {
    char room[4096], *at;
    int fd = inotify_init();
    inotify_add_watch(fd, argv[1], IN_CREATE | IN_MOVED_TO);
    for (;;) {
        ssize_t got = read(fd, room, sizeof room);
        for (at = room; at < room + got; at += sizeof(struct inotify_event) + ((struct inotify_event *)at)->len)
            printf("%s\\n", ((struct inotify_event *)at)->name), fflush(stdout);
    }
}
"""


def _program(cri: Cri, name: str, source: str) -> Path:
    """A program that busybox has none like."""
    path = cri.daemon.directory / "programs" / name
    path.parent.mkdir(exist_ok=True)
    subprocess.run(["gcc", "-static", "-x", "c", "-", "-o", path], input=source, text=True, check=True)
    return path


def _volume(cri: Cri, kind: str, name: str) -> Path:
    """A directory where a kubelet would have a volume of this kind."""
    path = cri.daemon.directory / f"pods/uid/volumes/kubernetes.io~{kind}/{name}"
    shutil.rmtree(path, ignore_errors=True)  # of a try that failed
    path.mkdir(parents=True)
    return path


def test_what_a_kubelet_changes_is_noticed_in_the_guest(cri: Cri) -> None:
    source = _volume(cri, "projected", "token")
    # Versions are directories, and a link says which one counts: the kubelet switches by renaming.
    for version in ("1", "2"):
        (source / f"..{version}").mkdir()
        (source / f"..{version}/token").write_text(f"version {version}\n")
    (source / "..data").symlink_to("..1")
    (source / "token").symlink_to("..data/token")
    pod = cri.pod()
    mounts = [
        {"container_path": "/var/token", "host_path": str(source), "readonly": True},
        {"container_path": "/programs", "host_path": str(_program(cri, "watch", WATCH).parent)},
    ]
    one = cri.container(pod, "one", "/programs/watch", "/var/token", mounts=mounts)
    assert cri("exec", "-s", one, "cat", "/var/token/token").strip() == "version 1"
    (source / "..next").symlink_to("..2")
    (source / "..next").rename(source / "..data")
    until(
        lambda: "version 2" in cri("exec", "-s", one, "cat", "/var/token/token"), "the new version is there"
    )
    until(lambda: "..data" in cri("logs", one), "the watcher has heard of it")
    assert "Read-only" in cri("exec", "-s", one, "sh", "-c", "touch /var/token/x 2>&1; true")


def test_memory_that_containers_share_is_the_guests(cri: Cri) -> None:
    source = _volume(cri, "empty-dir", "memory")
    subpath = cri.daemon.directory / "pods/uid/volume-subpaths/memory/two/0"
    subpath.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=1770,gid=7", "none", source], check=True)
    try:
        (source / "sub").mkdir(mode=0o755)
        subprocess.run(["mount", "--bind", source / "sub", subpath], check=True)
        pod = cri.pod()
        whole = [{"container_path": "/memory", "host_path": str(source)}]
        part = [{"container_path": "/part", "host_path": str(subpath)}]
        one = cri.container(pod, "one", "sleep", "1000", mounts=whole)
        two = cri.container(pod, "two", "sleep", "1000", mounts=part)
        seen = cri(
            "exec",
            "-s",
            one,
            "sh",
            "-c",
            "stat -fc %T /memory /dev/shm; stat -c '%a %g' /memory; df -m /memory",
        )
        assert seen.split()[:4] == ["tmpfs", "tmpfs", "1770", "7"]
        assert seen.split()[-5] == "3"
        cri("exec", "-s", two, "sh", "-c", "echo said >/part/word; echo shared >/dev/shm/word")
        assert cri("exec", "-s", one, "cat", "/memory/sub/word", "/dev/shm/word").split() == [
            "said",
            "shared",
        ]
        # It is the pod's: a container that comes back finds it.
        for each in (one, two):
            cri("rm", "-f", each)
        again = cri.container(pod, "again", "sleep", "1000", mounts=whole)
        assert cri("exec", "-s", again, "cat", "/memory/sub/word").strip() == "said"
        assert not (source / "sub/word").exists()
    finally:
        subprocess.run(["umount", subpath], check=False)
        subprocess.run(["umount", source], check=False)


def test_mounts_of_the_host_come_along_as_asked(cri: Cri) -> None:
    pod = cri.pod()
    base = cri.daemon.directory / "base"
    for name in ("below", "late"):
        (base / name).mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "none"]
    subprocess.run(["mount", "--bind", base, base], check=True)
    try:
        # Made when the pod is already there, and shared, as volumes of storage drivers are.
        subprocess.run(["mount", "--make-shared", base], check=True)
        subprocess.run([*mount, base / "below"], check=True)
        (base / "below/file").write_text("below")
        follows = {"container_path": "/follows", "host_path": str(base), "propagation": 1}
        apart = {"container_path": "/apart", "host_path": str(base), "readonly": True}
        one = cri.container(pod, "one", "sleep", "1000", mounts=[follows, apart])
        subprocess.run([*mount, base / "late"], check=True)
        (base / "late/file").write_text("late")
        files = ["/follows/below/file", "/follows/late/file", "/apart/below/file"]
        assert cri("exec", "-s", one, "cat", *files).strip() == "belowlatebelow"
        assert cri("exec", "-s", one, "ls", "/apart/late").strip() == ""
        # Read-only is the mount that was named, and not those below it.
        said = cri("exec", "-s", one, "sh", "-c", "echo x >/apart/below/new; touch /apart/x 2>&1; true")
        assert "Read-only" in said
        assert (base / "below/new").exists()
    finally:
        for name in ("late", "below", ""):
            subprocess.run(["umount", "-l", base / name], check=False)


def test_privileges_are_gained_only_where_they_may_be(cri: Cri) -> None:
    program = _program(cri, "who", WHO)
    program.chmod(0o4755)
    pod = cri.pod()
    mounts = [{"container_path": "/programs", "host_path": str(program.parent)}]
    for name, may in (("may", True), ("not", False)):
        context = {"run_as_user": {"value": 1000}, "no_new_privs": not may}
        one = cri.container(pod, name, "/programs/who", mounts=mounts, linux={"security_context": context})
        said = partial(cri, "logs", one)
        until(said, "it has ended")
        assert said() == ("0\n" if may else "1000\n")


def test_a_pods_machine_is_in_the_pods_cgroup(cri: Cri) -> None:
    parent = f"/ktpods{os.getpid()}/pod1"
    pod = cri.pod(cgroup_parent=parent)
    one = cri.container(pod, "one", "sleep", "1000", linux={"resources": {"oom_score_adj": 500}})
    two = cri.container(pod, "two", "sleep", "1000", linux={"resources": {"oom_score_adj": 100}})
    assert cri("exec", "-s", one, "cat", "/proc/self/oom_score_adj").strip() == "500"
    assert cri("exec", "-s", two, "cat", "/proc/self/oom_score_adj").strip() == "100"
    machine = int(json.loads(cri("inspectp", pod[0]))["info"]["pid"])
    [sandbox] = cri.daemon.sandboxes()
    engine = cri.daemon.engine_pid(sandbox)
    named = {name for one in host_cgroup.hierarchies() for name in one.controllers}
    named |= {name for _, names, _ in host_cgroup.others() for name in names}
    for pid in (machine, engine):
        lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
        places = {name: path for number, names, path in lines for name in names.split(",") if name in named}
        unified = {path for number, _, path in lines if number == "0"}
        assert set(places.values()) | (unified if len(places) < len(named) else set()) == {
            f"{parent}/{pod[0]}"
        }
    assert int(Path(f"/proc/{machine}/oom_score_adj").read_text()) == 500
    # Who may not lower it stays where the client was, which is below the machine all the same.
    assert int(Path(f"/proc/{engine}/oom_score_adj").read_text()) in (-998, 0)
    cri("rmp", "-f", pod[0])
    until(lambda: not list(Path("/sys/fs/cgroup").glob(f"**{parent}")), "the cgroups are gone")


def _forwarded(cri: Cri, pod: str, port: int, data: bytes = b"") -> bytes:
    endpoint = f"unix://{cri.daemon.socket}"
    return forwarded(endpoint, cri.daemon.around, pod, port, data, more=cri.daemon.diagnosis)


def test_port_forward_reaches_the_guests_loopback(cri: Cri) -> None:
    pod = cri.pod()
    serve = "mkdir /w; echo served >/w/f; busybox httpd -p {}:{} -h /w; "
    script = (
        serve.format("127.0.0.1", 8080)
        + serve.format("[::1]", 8081)
        + "nc -ll -p 9 -e wc -c & exec nc -ll -p 7 -e head -c 3000000"
    )
    one = cri.container(pod, "one", "sh", "-c", script)
    until(
        lambda: {":7 ", ":9 "} <= set(re.findall(":[79] ", cri("exec", "-s", one, "netstat", "-ltn"))),
        "all servers listen",
        cri.daemon.diagnosis,
    )
    request = b"GET /f HTTP/1.0\r\n\r\n"
    for port in (8080, 8081):
        answer = _forwarded(cri, pod[0], port, request)
        assert answer.endswith(b"\r\n\r\nserved\n"), answer
    # More than windows and buffers hold, both ways at once.
    data = os.urandom(3_000_000)
    assert _forwarded(cri, pod[0], 7, data) == data
    # Each direction has its own end: `wc` answers when it has seen that of its input.
    process = json.loads(cri("inspectp", pod[0]))["info"]["pid"]
    half_closed = (
        "import socket, sys\n"
        "s = socket.create_connection(('127.0.0.1', 9), 60)\n"
        "s.sendall(sys.stdin.buffer.read())\n"
        "s.shutdown(socket.SHUT_WR)\n"
        "while piece := s.recv(65536): sys.stdout.buffer.write(piece)"
    )
    counted = subprocess.run(
        ["nsenter", "--net", "-t", str(process), sys.executable, "-c", half_closed],
        input=data,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert counted.stdout.split() == [b"3000000"], counted.stderr
    # Nobody listens there: that ends, and harms nothing.
    assert _forwarded(cri, pod[0], 81) == b""
    assert _forwarded(cri, pod[0], 8080, request).endswith(b"served\n")


def test_the_tutorial(cri: Cri, busybox_image: str, tmp_path: Path) -> None:
    layout = Path(busybox_image.removeprefix("oci:"))
    cri.daemon.import_image(layout, "docker.io/library/busybox:latest", "k8s.io")
    programs = tmp_path / "programs"
    programs.mkdir()
    socket = f"unix://{cri.daemon.socket}"
    tutorials.program(
        programs, "crictl", *cri.daemon.around, str(shutil.which("crictl")), "-r", socket, "-i", socket
    )
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    tutorials.run("tutorials/kubernetes-node.md", tmp_path, environment)

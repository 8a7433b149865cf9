"""CRI-O, with our shim as a runtime of type "vm" and `kata-runtime` as one of type "oci": pods through crictl."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from cni_support import PLUGINS, forwarded, write_network
from containerd_support import ROOT, with_command
from terminal import Terminal
from waiting import PATIENCE, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PROGRAMS = ROOT / "build/programs/crio"
CONMON = shutil.which("conmon") or ROOT / "build/programs/podman/usr/bin/conmon"
BUSYBOX = "localhost/busybox:latest"
PAUSE = "localhost/pause:latest"
CONTAINER = 1
"""NamespaceMode of the CRI: a namespace of the container's own."""


class Crio:
    """The daemon, in a network namespace of its own, and crictl.

    Args:
        directory: Made by the caller.
        guest: The guest's directory.
        busybox: An OCI layout.
    """

    def __init__(self, directory: Path, guest: Path, busybox: Path) -> None:
        self.directory = directory
        self.log = directory / "crio.log"
        self.run_dir = directory / "r"
        self.netns = f"ko{os.getpid()}"
        self.endpoint = f"unix://{directory}/c.sock"
        self.around = ["nsenter", f"--net=/run/netns/{self.netns}"]
        self.env = {
            **os.environ,
            "KATA_RUN_DIR": str(self.run_dir),
            "KATA_STATE_DIR": str(directory / "s"),
            "KATA_GUEST_DIR": str(guest),
        }
        self._daemon: subprocess.Popen[bytes] | None = None
        self._configure()
        # CRI-O ends it with TERM, as it does the containers, and has patience with who does not listen.
        waits = "trap 'exit 0' TERM; sleep 2147483647 & wait"
        pause = with_command(busybox, directory / "pause", "/bin/busybox", "sh", "-c", waits)
        for layout, name in ((busybox, BUSYBOX), (pause, PAUSE)):
            place = f"containers-storage:[overlay@{directory}/root+{directory}/runroot]{name}"
            policy = ["--policy", str(directory / "policy.json")]
            subprocess.run(["skopeo", *policy, "copy", "--quiet", f"oci:{layout}", place], check=True)

    def _configure(self) -> None:
        directory = self.directory
        # Without one it complains, on a terminal into the midst of what is looked at.
        (directory / "crictl.yaml").write_text(
            f"runtime-endpoint: {self.endpoint}\nimage-endpoint: {self.endpoint}\n"
        )
        (directory / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        networks = write_network(directory, "ko", "10.87.7.0/24")
        shim = directory / "bin/containerd-shim-kata-v2"
        shim.parent.mkdir()
        shim.symlink_to(ROOT / "src/kata/__main__.py")
        # conmon calls a runtime without the daemon's environment.
        runtime = directory / "bin/kata-runtime"
        exports = "".join(
            f"export {name}='{value}'\n" for name, value in self.env.items() if name.startswith("KATA_")
        )
        runtime.write_text(f'#!/bin/sh\n{exports}exec {ROOT}/src/kata/oci_runtime/__main__.py "$@"\n')
        runtime.chmod(0o755)
        (directory / "crio.conf").write_text(
            f"""\
[crio]
root = "{directory}/root"
runroot = "{directory}/runroot"
storage_driver = "overlay"
log_dir = "{directory}/log"
version_file = "{directory}/version"
clean_shutdown_file = "{directory}/clean"
internal_wipe = false
[crio.api]
listen = "{directory}/c.sock"
stream_address = "127.0.0.1"
stream_port = "0"
[crio.runtime]
default_runtime = "kata"
cgroup_manager = "cgroupfs"
conmon_cgroup = "pod"
pinns_path = "{PROGRAMS}/pinns"
namespaces_dir = "{directory}/ns"
container_exits_dir = "{directory}/exits"
container_attach_socket_dir = "{directory}/at"
hooks_dir = []
[crio.runtime.runtimes.kata]
runtime_type = "vm"
runtime_path = "{shim}"
runtime_root = "{directory}/vm"
privileged_without_host_devices = true
[crio.runtime.runtimes.kata-oci]
runtime_type = "oci"
runtime_path = "{runtime}"
runtime_root = "{directory}/oci"
monitor_path = "{CONMON}"
monitor_cgroup = "pod"
privileged_without_host_devices = true
[crio.image]
pause_image = "{PAUSE}"
pause_command = ""
signature_policy = "{directory}/policy.json"
[crio.network]
network_dir = "{networks}"
plugin_dirs = ["{PLUGINS}"]
[crio.nri]
enable_nri = false
"""
        )

    def start(self) -> None:
        """Start the daemon, and return when it answers."""
        with open(self.log, "ab") as log:
            self._daemon = subprocess.Popen(
                [
                    *self.around,
                    str(PROGRAMS / "crio"),
                    "--config",
                    str(self.directory / "crio.conf"),
                    "--config-dir",
                    "",
                ],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(lambda: self.ask("version").returncode == 0, "CRI-O answers", self.log.read_text)

    def stop(self) -> None:
        """End the daemon; its pods go on."""
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGTERM)
            self._daemon.wait(30)
            self._daemon = None

    def command(self, *arguments: str) -> list[str]:
        """The argv of crictl with these arguments."""
        crictl = ["crictl", "--config", str(self.directory / "crictl.yaml"), "--timeout", "2m"]
        return [*self.around, *crictl, *arguments]

    def ask(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run crictl to its end, whatever that is."""
        return subprocess.run(
            self.command(*arguments), input=stdin, capture_output=True, timeout=PATIENCE, check=False
        )

    def __call__(self, *arguments: str, stdin: bytes = b"", code: int = 0) -> str:
        """Run crictl; its standard output, after a look at its exit status."""
        done = self.ask(*arguments, stdin=stdin)
        said = f"crictl {' '.join(arguments)}: {done.stderr.decode()}\n{self.diagnosis()}"
        assert done.returncode == code, said
        return done.stdout.decode()

    def diagnosis(self) -> str:
        """What the engines' logs and CRI-O's end with."""
        logs = [*self.run_dir.glob("sandboxes/*/engine.log"), self.log]
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in logs)

    def sandboxes(self) -> list[str]:
        """Names of the sandboxes' run directories."""
        try:
            return sorted(os.listdir(self.run_dir / "sandboxes"))
        except FileNotFoundError:
            return []

    def pod(self, handler: str = "kata", **linux: object) -> tuple[str, str]:
        """Run a pod with one of the runtimes; its id, and its configuration's file."""
        about = {
            "metadata": {"name": "p", "uid": "u", "namespace": "test"},
            "hostname": "pod-of-crio",
            "log_directory": str(self.directory / "logs"),
            "linux": linux,
        }
        path = self.write("pod", about)
        return self("runp", "--runtime", handler, path).strip(), path

    def container(self, pod: tuple[str, str], name: str, *command: str, **more: object) -> str:
        """Make and start a container in a pod; its id."""
        about = {
            "metadata": {"name": name},
            "image": {"image": BUSYBOX},
            "command": command,
            "log_path": f"{name}.log",
            "linux": {},
            **more,
        }
        made = self("create", pod[0], self.write(name, about), pod[1]).strip()
        self("start", made)
        return made

    def status(self, container: str) -> dict[str, object]:
        """What ``crictl inspect`` says of a container's status."""
        return dict(json.loads(self("inspect", container))["status"])

    def write(self, name: str, content: Mapping[str, object]) -> str:
        """A file for crictl; its path."""
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps(content))
        return str(path)


@pytest.fixture(scope="module")
def daemon(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Crio]:
    for program in (PROGRAMS / "crio", PROGRAMS / "pinns", CONMON):
        if not Path(program).exists():
            pytest.skip("needs CRI-O (tools/setup test builds it)")
    if shutil.which("crictl") is None or not (PLUGINS / "bridge").exists():
        pytest.skip("needs crictl and CNI's plugins (tools/setup test)")
    directory = Path(tempfile.mkdtemp(prefix="o", dir=run_directory))
    one = Crio(directory, guest_assets, Path(busybox_image.removeprefix("oci:")))
    subprocess.run(["ip", "netns", "add", one.netns], check=True)
    try:
        subprocess.run(["ip", "-n", one.netns, "link", "set", "lo", "up"], check=True)
        one.start()
        yield one
    finally:
        one.stop()
        # CRI-O's own: it keeps the directory of its storage a mount.
        subprocess.run(
            ["umount", "--recursive", directory / "root/overlay"], capture_output=True, check=False
        )
        subprocess.run(["ip", "netns", "delete", one.netns], check=False)
        # With cgroups of version 1 it leaves those of its monitors.
        for cgroup in Path("/sys/fs/cgroup").glob("**/crio-conmon-*"):
            with contextlib.suppress(OSError):
                cgroup.rmdir()
        shutil.rmtree(directory, ignore_errors=True)


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

"""Docker 23 or newer, with this checkout's shim as a runtime of its."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import netlab
import pytest
import tutorials
from containerd_support import ROOT, RUNTIME, Containerd
from management_support import curl
from netlab import answer_a
from socket_support import client
from test_namespace import advertise
from waiting import PATIENCE, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

FIRST_WITH_SHIMS = 23
PROGRAMS = (
    f"{ROOT}/build/programs/usr/bin:{ROOT}/build/programs/usr/sbin:{os.environ['PATH']}:/usr/sbin:/sbin"
)


class Docker:
    """A dockerd of the tests' own, in a network namespace where it may make its bridge."""

    def __init__(self, directory: Path, guest: Path) -> None:
        self.containerd = Containerd(directory, guest)
        self.netns = f"kt{os.getpid()}d"
        self.containerd.around = ["nsenter", f"--net=/run/netns/{self.netns}"]
        self.env = {**self.containerd.env, "DOCKER_HOST": f"unix://{directory}/docker.sock"}
        self.env["PATH"] = f"{directory}/bin:{PROGRAMS}"
        self.directory = directory
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start both daemons."""
        self.containerd.start()
        self.start_daemon()

    def start_daemon(self) -> None:
        """Start dockerd; containers that run already go on."""
        log = self.directory / "dockerd.log"
        with open(log, "ab") as file:
            self._daemon = subprocess.Popen(
                [
                    *self.containerd.around,
                    *("dockerd", "--data-root", str(self.directory / "data")),
                    *("--exec-root", str(self.directory / "exec"), "--pidfile", str(self.directory / "pid")),
                    *("--host", self.env["DOCKER_HOST"], "--containerd", str(self.containerd.socket)),
                    *("--bip", "10.77.0.1/24", "--config-file", str(self.directory / "daemon.json")),
                ],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        until(lambda: self("version", code=None).startswith("Client"), "dockerd answers", log.read_text)
        until(lambda: "Server" in self("version", code=None), "dockerd answers", log.read_text)

    def stop_daemon(self) -> None:
        """End dockerd, and no container."""
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait(60)

    def stop(self) -> None:
        """End both."""
        self.stop_daemon()
        self.containerd.stop()
        # For its next start dockerd keeps two mounts when it ends: the namespace of its containers without a network,
        # and, where the host's mounts are private, its data.
        for kept in ("exec/netns/default", "data"):
            subprocess.run(["umount", str(self.directory / kept)], capture_output=True, check=False)

    def __call__(self, *arguments: str, stdin: bytes = b"", code: int | None = 0) -> str:
        """Run docker; its output and then its errors, after a look at its exit status."""
        done = subprocess.run(
            ["docker", *arguments],
            input=stdin,
            capture_output=True,
            timeout=PATIENCE,
            env=self.env,
            check=False,
        )
        said = done.stdout.decode() + done.stderr.decode()
        assert code is None or done.returncode == code, (
            f"docker {' '.join(arguments)}: {done.returncode}: {said}\n{self.containerd.diagnosis()}"
        )
        return said

    def run(self, *arguments: str, code: int = 0) -> str:
        """``docker run`` with our runtime."""
        return self("run", "--runtime", RUNTIME, *arguments, code=code)


@contextlib.contextmanager
def running(run_directory: Path, guest_assets: Path) -> Iterator[Docker]:
    """Both daemons, with an image ``bb``; with them go the containers that they have in the end."""
    program = shutil.which("dockerd", path=PROGRAMS)
    if program is None or shutil.which("docker", path=PROGRAMS) is None:
        pytest.skip("needs docker (apt-get install docker.io docker-cli)")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)", version)
    if found is None or int(found[1]) < FIRST_WITH_SHIMS:
        pytest.skip(f"needs Docker {FIRST_WITH_SHIMS} or newer: older ones know no shims as runtimes")
    if shutil.which("iptables", path=PROGRAMS) is None:
        pytest.skip("needs iptables, for dockerd (apt-get install iptables)")
    directory = Path(tempfile.mkdtemp(prefix="d", dir=run_directory))
    one = Docker(directory, guest_assets)
    (directory / "daemon.json").write_text('{"live-restore": true}')
    done = subprocess.run(
        [
            str(ROOT / "src/kata/__main__.py"),
            "install",
            "docker",
            "--config",
            str(directory / "daemon.json"),
        ],
        env=one.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    subprocess.run(["ip", "netns", "add", one.netns], check=True)
    try:
        subprocess.run(["ip", "-n", one.netns, "link", "set", "lo", "up"], check=True)
        one.start()
        one("import", "-", "bb", stdin=_busybox())
        yield one
    finally:
        for name in one("ps", "-aq", code=None).split():
            one("rm", "-f", name, code=None)
        one.stop()
        subprocess.run(["ip", "netns", "delete", one.netns], check=False)
        shutil.rmtree(directory, ignore_errors=True)


def _busybox() -> bytes:
    """A root file system as a tar archive: Debian's static busybox and links to it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.add("/bin/busybox", arcname="bin/busybox")
        for name in (
            "sh",
            "sleep",
            "ls",
            "cat",
            "ip",
            "ping",
            "uname",
            "true",
            "echo",
            "nc",
            "rm",
            "nslookup",
            "od",
            "tr",
            "httpd",
        ):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return out.getvalue()


@pytest.fixture(scope="module")
def docker(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Docker]:
    with running(run_directory, guest_assets) as one:
        yield one


def clean(docker: Docker) -> None:
    """Remove all containers; no sandbox may be left."""
    for name in docker("ps", "-aq").split():
        docker("rm", "-f", name)
    until(lambda: not docker.containerd.sandboxes(), "no sandbox is left", docker.containerd.diagnosis, 15)


@pytest.fixture(autouse=True)
def _clean(docker: Docker) -> Iterator[None]:
    yield
    clean(docker)


def test_a_container_with_dockers_network(docker: Docker) -> None:
    script = "uname -r; ip address show eth0; ping -c 1 -W 20 10.77.0.1; exit 4"
    # By the name that `kata install docker` gave it.
    said = docker("run", "--runtime", "kata", "--rm", "bb", "sh", "-c", script, code=4)
    assert os.uname().release not in said
    assert "inet 10.77.0." in said
    assert "1 packets received" in said


def by_tcp(docker: Docker, container: str, name: str) -> str:
    """What a container is told by TCP of a name's address: the answer's bytes, in hexadecimal."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    question = b"\x12\x34\1\0\0\1\0\0\0\0\0\0" + labels + b"\0\0\1\0\1"
    octal = "".join(f"\\{byte:03o}" for byte in len(question).to_bytes(2, "big") + question)
    ask = f"printf '{octal}' | nc -w 20 127.0.0.11 53 | od -An -v -tx1 | tr -d ' \\n'"
    return docker("exec", container, "sh", "-c", ask)


def check_names(docker: Docker, container: str, known: dict[str, str]) -> None:
    """Docker's resolver answers a container by UDP and by TCP."""
    for name, address in known.items():
        found = docker("exec", container, "nslookup", "-type=a", name)
        assert f"Address: {address}" in found, (container, name, found)
        packed = "".join(f"{int(part):02x}" for part in address.split("."))
        assert by_tcp(docker, container, name).endswith(packed), (container, name)


def test_several_networks(docker: Docker) -> None:  # noqa: PLR0915
    """Docker wires them when the machine runs already."""
    for name, subnet in (("front", "10.78.1.0/24"), ("back", "10.78.2.0/24")):
        docker("network", "create", "--subnet", subnet, name)
    try:
        serve = "while :; do nc -l -p 80 -e echo reached; done"
        on_back = ("-d", "--network", "back", "--ip")
        docker.run(*on_back, "10.78.2.9", "--name", "server", "bb", "sh", "-c", serve)
        docker(
            "run", *on_back, "10.78.2.8", "--network-alias", "db", "--name", "other", "bb", "sleep", "1000"
        )
        look = "nc -w 20 10.78.2.9 80; exec sleep 1000"
        on_both = ("--network", "front", "--network", "back", "--dns", "10.78.1.1")
        docker.run("-d", "--name", "both", *on_both, "bb", "sh", "-c", look)
        until(lambda: "reached" in docker("logs", "both"), "the second network is used")
        shown = docker("exec", "both", "ip", "-4", "address")
        assert ("inet 10.78.1." in shown, "inet 10.78.2." in shown) == (True, True)
        names = [line.split()[1] for line in docker("exec", "both", "ip", "-o", "link").splitlines() if line]
        assert sorted(names) == ["eth0:", "eth1:", "lo:"], "and no other"
        # Names, whatever the others run by; of a server of names in a container the port is free.
        for container in ("server", "both", "other"):
            check_names(docker, container, {"server": "10.78.2.9", "db": "10.78.2.8", "other": "10.78.2.8"})
        assert "nameserver 127.0.0.11\n" in docker("exec", "both", "cat", "/etc/resolv.conf")
        docker("exec", "-d", "both", "nc", "-l", "-p", "53", "-e", "echo", "mine")
        until(
            lambda: "mine" in docker("exec", "both", "nc", "-w", "5", "127.0.0.1", "53", code=None),
            "it serves",
        )
        # Names from outside, which dockerd asks for in the container's namespace. Nobody serves them at first.
        began = time.monotonic()
        assert by_tcp(docker, "both", "far.example")[8:12] == "8102", "server failure"
        assert time.monotonic() - began < 1.9, "dockerd has not waited in vain"
        netlab.serve_in(docker.netns, ("10.78.1.1", 53), answer_a, socket.SOCK_DGRAM)
        for server in ((), ("10.78.1.1",)):  # by dockerd, and by the guest itself
            assert "Address: 192.0.2.77" in docker(
                "exec", "both", "nslookup", "-type=a", "far.example", *server
            )
        docker.stop_daemon()
        docker.start_daemon()
        check_names(docker, "both", {"db": "10.78.2.8"})
        # These networks have no IPv6, and a neighbour who says that it is a router is not believed.
        bridge = "br-" + docker("network", "inspect", "-f", "{{.Id}}", "back")[:12]
        command = [
            "ip",
            "netns",
            "exec",
            docker.netns,
            "sysctl",
            "-qw",
            f"net.ipv6.conf.{bridge}.disable_ipv6=0",
        ]
        subprocess.run(command, check=True)
        advertise(docker.netns, bridge)
        time.sleep(1)
        assert "inet6" not in docker("exec", "server", "ip", "address", "show", "eth0")
        assert docker("exec", "server", "cat", "/proc/sys/net/ipv6/conf/eth0/disable_ipv6") == "1\n"
        # A container follows its networks while it runs, as its names do.
        docker("network", "connect", "bridge", "both")
        until(lambda: "inet 10.77.0." in docker("exec", "both", "ip", "-4", "address"), "it is connected")
        assert docker("exec", "both", "ping", "-c", "1", "-W", "20", "10.77.0.1")
        docker("network", "disconnect", "front", "both")
        until(
            lambda: "inet 10.78.1." not in docker("exec", "both", "ip", "-4", "address"), "it is taken off"
        )
        assert len(docker("exec", "both", "ls", "/sys/class/net").split()) == 3, "lo and two others"
        docker("network", "connect", "front", "both")
        until(lambda: "inet 10.78.1." in docker("exec", "both", "ip", "-4", "address"), "and again")
        check_names(docker, "both", {"db": "10.78.2.8"})
        # One that began without any has its network later, also with names.
        docker("run", "-d", "--network", "none", "--name", "alone", "bb", "sleep", "1000")
        assert docker("exec", "alone", "ls", "/sys/class/net").split() == ["lo"]
        docker("network", "disconnect", "none", "alone")
        docker("network", "connect", "back", "alone")
        until(
            lambda: "inet 10.78.2." in docker("exec", "alone", "ip", "-4", "address"),
            "it has one",
            patience_s=20,
        )
        assert "reached" in docker("exec", "alone", "nc", "-w", "20", "10.78.2.9", "80")
        check_names(docker, "alone", {"db": "10.78.2.8"})
        docker("restart", "-t", "1", "both")
        shown = docker("exec", "both", "ip", "-4", "address")
        assert all(f"inet 10.{subnet}." in shown for subnet in ("78.1", "78.2", "77.0"))
    finally:
        docker("rm", "-f", "both", "server", "other", "alone", code=None)
        docker("network", "rm", "front", "back")


def test_a_published_port(docker: Docker) -> None:
    serve = "while :; do echo -e 'HTTP/1.0 200 OK\\r\\n\\r\\nserved' | nc -l -p 80 >/dev/null; done"
    docker.run("-d", "--name", "web", "-p", "8099:80", "bb", "sh", "-c", serve)
    fetch = (
        "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8099/', timeout=5).read())"
    )
    command = [*docker.containerd.around, "python3", "-c", fetch]
    until(
        lambda: b"served" in subprocess.run(command, capture_output=True, check=False).stdout,
        "the port answers",
    )


def test_the_life_of_a_container(docker: Docker) -> None:
    (docker.directory / "file").write_text("content")
    script = "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.1; done"
    volume = f"{docker.directory}/file:/vol/file:ro"
    docker.run("-d", "--name", "life", "-m", "128m", "-v", volume, "bb", "sh", "-c", script)
    until(lambda: "up" in docker("logs", "life"), "it is up")
    assert docker("exec", "life", "cat", "/vol/file") == "content"
    assert docker("exec", "-i", "life", "cat", stdin=b"through") == "through"
    stdin = "for n in self 1; do readlink /proc/$n/fd/0; done"
    assert docker("exec", "life", "sh", "-c", stdin).split() == ["/dev/null", "/dev/null"]
    assert "executable file not found in $PATH" in docker("exec", "life", "nosuch", code=126)
    assert "qemu" in docker("top", "life")
    identity = docker("inspect", "--format", "{{.Id}}", "life").strip()
    link = docker.containerd.run_dir / "vc/sbs" / identity / "shim-monitor.sock"
    assert f'container_id="{identity}"' in curl(link, "/metrics")[2]
    assert "128MiB" in docker("stats", "--no-stream", "life")
    docker("pause", "life")
    assert "(Paused)" in docker("ps", "--format", "{{.Status}}")
    docker("unpause", "life")
    docker("cp", str(docker.directory / "file"), "life:/copied")
    assert docker("exec", "life", "cat", "/copied") == "content"
    docker("update", "--memory", "64m", "--memory-swap", "64m", "life")
    docker("restart", "-t", "30", "life")
    until(lambda: docker("logs", "life").split() == ["up", "bye", "up"], "it has restarted")
    docker("stop", "-t", "30", "life")
    assert docker("inspect", "--format", "{{.State.ExitCode}}", "life").strip() == "3"
    docker("commit", "life", "made")
    assert docker.run("--rm", "made", "cat", "/copied") == "content"


def test_what_a_privileged_container_finds(docker: Docker, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    mounted = ["mount", "-t", "tmpfs", "none", str(tmp_path / "sub")]
    script = (
        "hostname; touch /v/x /v/sub/x 2>/dev/null || echo read-only; dd if=/dev/zero of=/i bs=1M count=4 2>/dev/null;"
        " mke2fs -F /i >/dev/null 2>&1; mkdir /m; mount -o loop /i /m && ls /m"
    )
    subprocess.run(mounted, check=True)
    try:
        options = ("--rm", "--privileged", "--uts", "host", "-v", f"{tmp_path}:/v:ro")
        found = docker.run(*options, "bb", "sh", "-c", script)
        assert not list((tmp_path / "sub").iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path / "sub")], check=True)
    assert found.split() == [os.uname().nodename, "read-only", "lost+found"]


def test_docker_in_a_container_by_its_socket(docker: Docker, tmp_path: Path) -> None:
    programs = client(tmp_path).parent
    mounts = ("-v", f"{docker.directory}/docker.sock:/var/run/docker.sock", "-v", f"{programs}:/programs:ro")
    # The end of the question would be taken for a client that has lost interest.
    script = (
        "(printf 'GET /version HTTP/1.0\\r\\n\\r\\n'; sleep 5) | /programs/unix-client /var/run/docker.sock"
    )
    said = docker.run("--rm", *mounts, "bb", "sh", "-c", script)
    assert '"ApiVersion"' in said, said


def test_kill_and_wait(docker: Docker) -> None:
    docker.run("-d", "--name", "shot", "bb", "sleep", "1000")
    docker("kill", "shot")
    assert docker("wait", "shot").strip() == "137"
    # What does not answer, and what is frozen.
    for name, end in (("gone", ("rm", "-f")), ("cold", ("kill",))):
        docker.run("-d", "--name", name, "bb", "sleep", "1000")
        if name == "cold":
            docker("pause", name)
        else:
            os.kill(int(docker("inspect", "--format", "{{.State.Pid}}", name)), signal.SIGSTOP)
        began = time.monotonic()
        docker(*end, name)
        assert time.monotonic() - began < 30, name
    assert docker("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "cold") == "exited 137\n"


def test_a_terminal(docker: Docker) -> None:
    command = f"docker run --rm -it --runtime {RUNTIME} bb sh -c 'test -t 0 && echo terminal'"
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        env=docker.env,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert b"terminal" in done.stdout


@pytest.mark.parametrize(("option", "name"), [("--network", "network"), ("--pid", "PID"), ("--ipc", "IPC")])
def test_the_hosts_namespaces_are_refused(docker: Docker, option: str, name: str) -> None:
    said = docker.run("--rm", option, "host", "bb", "true", code=125)
    assert f"host's {name} namespace" in said


def test_a_missing_command_is_127(docker: Docker) -> None:
    assert "executable file not found in $PATH" in docker.run("--rm", "bb", "nosuch", code=127)


def test_the_tutorial(docker: Docker, tmp_path: Path) -> None:
    docker("tag", "bb", "busybox")
    tutorials.run("tutorials/docker-host.md", tmp_path, docker.env)

"""nerdctl with containerd 2: what it does to one of our containers, from `run` to `rm`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from containerd_support import IMAGE, ROOT, RUNTIME, Containerd
from waiting import PATIENCE, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PROGRAMS = f"{ROOT}/build/programs/usr/bin:{os.environ['PATH']}:/usr/sbin:/sbin"
PLUGINS = Path("/usr/lib/cni")
SUBNET, GATEWAY = "10.77.1.0/24", "10.77.1.1"


class Nerdctl:
    """nerdctl, and the daemon that it talks to, in a network namespace where CNI may make its bridge.

    Args:
        directory: Made by the caller.
        guest: The guest's directory.

    Attributes:
        command: nerdctl, with the options that keep it to this directory.
        netns: The network namespace's name; `running` makes it.
    """

    def __init__(self, directory: Path, guest: Path) -> None:
        self.containerd = Containerd(directory, guest, second=True)
        self.netns = f"kt{os.getpid()}n"
        self.containerd.around = ["nsenter", f"--net=/run/netns/{self.netns}"]
        self.directory = directory
        self.env = {
            **self.containerd.env,
            "CONTAINERD_ADDRESS": str(self.containerd.socket),
            "CNI_PATH": str(PLUGINS),
            "NETCONFPATH": str(directory / "net.d"),
            "NERDCTL_TOML": str(directory / "none.toml"),
        }
        self.env["PATH"] = f"{directory}/bin:{self.env['PATH']}:/usr/sbin:/sbin"
        program = shutil.which("nerdctl", path=PROGRAMS) or ""
        self.command = [*self.containerd.around, program, "--data-root", str(directory / "data")]

    def __call__(self, *arguments: str, stdin: bytes = b"", code: int | None = 0) -> str:
        """Run nerdctl; its output and then its errors, after a look at its exit status."""
        done = subprocess.run(
            [*self.command, *arguments],
            input=stdin,
            capture_output=True,
            timeout=PATIENCE,
            env=self.env,
            check=False,
        )
        said = done.stdout.decode() + complaints(done.stderr)
        assert code is None or done.returncode == code, (
            f"nerdctl {' '.join(arguments)}: {done.returncode}: {said}\n{self.containerd.diagnosis()}"
        )
        return said

    def run(self, *arguments: str, code: int = 0) -> str:
        """``nerdctl run`` with our runtime."""
        return self("run", "--runtime", RUNTIME, *arguments, code=code)

    def make_network(self) -> None:
        """Make the network that its containers get, by default, with its addresses noted below this directory: CNI's
        own place is /var/lib/cni.
        """
        self(*("network", "create", "--subnet", SUBNET, "--label", "nerdctl/default-network=true", "kt"))
        [path] = (self.directory / "net.d").rglob("nerdctl-kt.conflist")
        network = json.loads(path.read_text())
        network["plugins"][0]["ipam"]["dataDir"] = str(self.directory / "ipam")
        # The name that `run` asks for; nerdctl makes a network of that name itself, and only that, when it finds none.
        network["name"] = "bridge"
        path.with_name("nerdctl-bridge.conflist").write_text(json.dumps(network))
        path.unlink()


def complaints(stderr: bytes) -> str:
    """What nerdctl says on standard error of the operation itself, without the times and without its own warnings (and
    that a signal came too late for a container that had ended).
    """
    lines = [re.sub(r'^time="[^"]*" ', "", line) for line in stderr.decode().splitlines(keepends=True)]
    return "".join(
        line for line in lines if not line.startswith("level=warning") and "forward signal" not in line
    )


@contextmanager
def running(directory: Path, guest: Path, busybox: str) -> Iterator[Nerdctl]:
    """nerdctl and its daemon with busybox's image as ``bb``; with them go its containers.

    Args:
        directory: Has a short path, since sockets lie in it; removed at the end.
        guest: The guest's directory.
        busybox: The image, as an OCI layout.
    """
    if shutil.which("nerdctl", path=PROGRAMS) is None:
        pytest.skip("needs nerdctl (tools/setup test builds it)")
    if not (PLUGINS / "bridge").exists() or shutil.which("iptables", path=PROGRAMS) is None:
        pytest.skip(
            "needs CNI's plugins and iptables (apt-get install containernetworking-plugins iptables)"
        )
    one = Nerdctl(directory, guest)
    subprocess.run(["ip", "netns", "add", one.netns], check=True)
    try:
        subprocess.run(["ip", "-n", one.netns, "link", "set", "lo", "up"], check=True)
        one.containerd.start()
        one.containerd.import_image(Path(busybox.removeprefix("oci:")))
        one.make_network()
        one("tag", IMAGE, "bb")
        yield one
    finally:
        try:
            clean(one)
        finally:
            one.containerd.stop()
            subprocess.run(["ip", "netns", "delete", one.netns], check=False)
            shutil.rmtree(directory, ignore_errors=True)


def clean(nerdctl: Nerdctl) -> None:
    """Remove all containers; no sandbox may be left."""
    for name in nerdctl("ps", "-aq", code=None).split():
        nerdctl("rm", "-f", name, code=None)
    until(lambda: not nerdctl.containerd.sandboxes(), "no sandbox is left", nerdctl.containerd.diagnosis, 15)


@pytest.fixture(scope="module")
def nerdctl(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Nerdctl]:
    directory = Path(tempfile.mkdtemp(prefix="n", dir=run_directory))
    with running(directory, guest_assets, busybox_image) as one:
        yield one


@pytest.fixture(autouse=True)
def _clean(nerdctl: Nerdctl) -> Iterator[None]:
    yield
    clean(nerdctl)


def test_a_container_with_nerdctls_network(nerdctl: Nerdctl) -> None:
    script = f"uname -r; ip address show eth0; ping -c 1 -W 20 {GATEWAY}; exit 4"
    said = nerdctl.run("--rm", "bb", "sh", "-c", script, code=4)
    assert os.uname().release not in said
    assert "inet 10.77.1." in said
    assert "1 packets received" in said
    # Input that ends before the machine is there; several times, since it is a matter of moments.
    for _ in range(3):
        assert nerdctl("run", "--runtime", RUNTIME, "--rm", "-i", "bb", "cat", stdin=b"early") == "early"


def test_the_life_of_a_container(nerdctl: Nerdctl) -> None:
    file = nerdctl.directory / "file"
    file.write_text("content")
    script = "trap 'echo bye; exit 3' TERM; echo up; echo served >/x; httpd -p 80 -h /; while :; do sleep 0.1; done"
    options = ("-p", "8098:80", "-m", "128m", "-v", f"{nerdctl.directory}:/vol")
    nerdctl.run("-d", "--name", "life", *options, "bb", "sh", "-c", script)
    until(lambda: "up" in nerdctl("logs", "life"), "it is up")
    fetch = (
        "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8098/x', timeout=5).read())"
    )
    command = [*nerdctl.containerd.around, "python3", "-c", fetch]
    until(
        lambda: b"served" in subprocess.run(command, capture_output=True, check=False).stdout,
        "the port answers",
    )
    assert nerdctl("exec", "-i", "life", "cat", stdin=b"through") == "through"
    # It takes the first interface in the namespace for the container's.
    assert nerdctl("inspect", "--format", "{{.NetworkSettings.IPAddress}}", "life").startswith("10.77.1.")
    assert "80/tcp -> 0.0.0.0:8098" in nerdctl("port", "life")
    assert "qemu" in nerdctl("top", "life")
    assert "128MiB" in nerdctl("stats", "--no-stream", "life")
    nerdctl("pause", "life")
    assert "Paused" in nerdctl("ps", "-a", "--format", "{{.Status}}")
    nerdctl("unpause", "life")
    nerdctl("stop", "-t", "30", "life")
    assert nerdctl("inspect", "--format", "{{.State.ExitCode}}", "life").strip() == "3"
    assert nerdctl("logs", "life").split() == ["up", "bye"]
    nerdctl("rm", "life")


def test_files_are_never_copied_from_or_to_the_host_itself(nerdctl: Nerdctl) -> None:
    file, back = nerdctl.directory / "file", nerdctl.directory / "back"
    file.write_text("content")
    nerdctl.run("-d", "--name", "files", "-v", f"{nerdctl.directory}:/vol", "bb", "sleep", "1000")
    # It goes through /proc/PID/root of the task, which is the hypervisor's.
    name = f"kata-test-{os.getpid()}"
    assert "read-only file system" in nerdctl("cp", str(file), f"files:/{name}", code=1)
    assert not Path("/", name).exists()
    nerdctl("cp", str(file), f"files:/tmp/{name}", code=1)
    assert not Path("/tmp", name).exists()
    assert "source does not exist" in nerdctl("cp", "files:/etc/passwd", str(back), code=1)
    assert "source does not exist" in nerdctl("cp", f"files:{file}", str(back), code=1)
    assert not back.exists()
    # Where volumes are on the host it reads in the specification.
    nerdctl("cp", str(file), "files:/vol/copied")
    assert nerdctl("exec", "files", "cat", "/vol/copied") == "content"
    # What does instead.
    archive = subprocess.run(["tar", "-C", str(file.parent), "-c", "file"], capture_output=True, check=True)
    nerdctl("exec", "-i", "files", "tar", "-C", "/", "-x", stdin=archive.stdout)
    assert nerdctl("exec", "files", "cat", "/file") == "content"
    nerdctl("stop", "-t", "0", "files")
    # A stopped container's are in its snapshot, which is the host's to mount.
    nerdctl("cp", "files:/file", str(back))
    assert back.read_text() == "content"
    nerdctl("cp", str(file), "files:/there")
    nerdctl("start", "files")
    assert nerdctl("exec", "files", "cat", "/there") == "content"

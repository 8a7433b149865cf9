"""CRI-O, with our shim as a runtime of type "vm": one pod's life through crictl."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from containerd_support import PATIENCE, ROOT, until, with_command

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PROGRAMS = ROOT / "build/programs/crio"
PLUGINS = Path("/usr/lib/cni")
BUSYBOX = "localhost/busybox:latest"
PAUSE = "localhost/pause:latest"


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
        (directory / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        networks = directory / "net.d"
        networks.mkdir()
        plugin = {
            "type": "bridge",
            "bridge": "ko0",
            "isGateway": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.87.7.0/24"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
                "dataDir": str(directory / "ipam"),
            },
        }
        (networks / "10-ko.conflist").write_text(
            json.dumps({"cniVersion": "0.4.0", "name": "ko", "plugins": [plugin]})
        )
        shim = directory / "bin/containerd-shim-kata-v2"
        shim.parent.mkdir()
        shim.symlink_to(ROOT / "src/kata/__main__.py")
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
container_attach_socket_dir = "{directory}/attach"
hooks_dir = []
[crio.runtime.runtimes.kata]
runtime_type = "vm"
runtime_path = "{shim}"
runtime_root = "{directory}/vm"
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
        until(lambda: self._crictl("version").returncode == 0, "CRI-O answers", self.log.read_text)

    def stop(self) -> None:
        """End the daemon; its pods go on."""
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGTERM)
            self._daemon.wait(30)
            self._daemon = None

    def _crictl(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        socket = f"unix://{self.directory}/c.sock"
        command = [*self.around, "crictl", "--timeout", "2m", "-r", socket, "-i", socket, *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, timeout=PATIENCE, check=False)

    def __call__(self, *arguments: str, stdin: bytes = b"", code: int = 0) -> str:
        """Run crictl; its standard output, after a look at its exit status."""
        done = self._crictl(*arguments, stdin=stdin)
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

    def write(self, name: str, content: Mapping[str, object]) -> str:
        """A file for crictl; its path."""
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps(content))
        return str(path)


@pytest.fixture
def crio(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Crio]:
    for program in (PROGRAMS / "crio", PROGRAMS / "pinns"):
        if not program.exists():
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
        one("rmp", "-a", "-f")
        until(lambda: not one.sandboxes(), "no sandbox is left", one.diagnosis, 15)
    finally:
        one.stop()
        # CRI-O's own: it keeps the directory of its storage a mount.
        subprocess.run(
            ["umount", "--recursive", directory / "root/overlay"], capture_output=True, check=False
        )
        subprocess.run(["ip", "netns", "delete", one.netns], check=False)
        shutil.rmtree(directory, ignore_errors=True)


def test_a_pod_and_its_containers(crio: Crio) -> None:
    pod_file = crio.write(
        "pod",
        {
            "metadata": {"name": "p", "uid": "u", "namespace": "test"},
            "hostname": "pod-of-crio",
            "log_directory": str(crio.directory / "logs"),
            "linux": {},
        },
    )

    def container(name: str, *command: str) -> str:
        about = {
            "metadata": {"name": name},
            "image": {"image": BUSYBOX},
            "command": command,
            "log_path": f"{name}.log",
            "linux": {},
        }
        made = crio("create", pod, crio.write(name, about), pod_file).strip()
        crio("start", made)
        return made

    pod = crio("runp", "--runtime", "kata", pod_file).strip()
    one = container("one", "sleep", "1000")
    two = container("two", "sh", "-c", "echo said; echo wrong >&2; exit 5")
    assert len(crio.sandboxes()) == 1
    release = crio("exec", "-s", one, "uname", "-r").strip()
    assert release not in ("", os.uname().release)
    assert crio("exec", "-s", one, "hostname").strip() == "pod-of-crio"
    address = json.loads(crio("inspectp", pod))["status"]["network"]["ip"]
    assert f"inet {address}/" in crio("exec", "-s", one, "ip", "address", "show", "eth0")
    assert crio("exec", "-i", one, "cat", stdin=b"through") == "through"
    crio("exec", "-s", one, "sh", "-c", "exit 4", code=1)

    def status(which: str) -> dict[str, object]:
        return dict(json.loads(crio("inspect", which))["status"])

    until(lambda: status(two)["state"] == "CONTAINER_EXITED", "the container has ended", crio.diagnosis)
    assert status(two)["exitCode"] == 5
    lines = (crio.directory / "logs/two.log").read_text().splitlines()
    assert sorted(line.split(" ", 1)[1] for line in lines) == ["stderr F wrong", "stdout F said"]
    assert json.loads(crio("stats", "-o", "json", one))["stats"]
    crio("stop", "--timeout", "1", one)
    # The pod's processes see each other unless it says otherwise, so this is not process 1, which ignores TERM.
    assert status(one)["exitCode"] == 143
    for which in (one, two):
        crio("rm", which)
    again = container("again", "sleep", "1000")
    # It goes on without its daemon, and is known again.
    crio.stop()
    crio.start()
    assert status(again)["state"] == "CONTAINER_RUNNING"
    assert crio("exec", "-s", again, "echo", "there").strip() == "there"
    crio("stopp", pod)
    crio("rmp", pod)
    until(lambda: not crio.sandboxes(), "no sandbox is left", crio.diagnosis, 15)

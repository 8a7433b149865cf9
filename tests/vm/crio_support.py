"""CRI-O, with our shim as a runtime of type "vm" and `kata-runtime` as one of type "oci", in a directory of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from cni_support import PLUGINS, write_network
from containerd_support import ROOT, with_command
from scripts import write_script
from waiting import PATIENCE, until

PROGRAMS = ROOT / "build/programs/crio"
CONMON = shutil.which("conmon") or ROOT / "build/programs/podman/usr/bin/conmon"
BUSYBOX = "localhost/busybox:latest"
PAUSE = "localhost/pause:latest"


# Where root may not lower scores of the OOM killer, as in many containers, runc fails by the one that CRI-O wants for
# pods. containerd has an option for that (restrict_oom_score_adj).
_RUNC = """\
#!/bin/sh
set -e
for word; do
    if [ "$last" = --bundle ]; then
        jq 'del(.process.oomScoreAdj)' "$word/config.json" >"$word/changed"
        mv "$word/changed" "$word/config.json"
    fi
    last=$word
done
exec {runc} "$@"
"""


def lacks() -> str:
    """What of CRI-O and of what it takes is not here; empty for nothing."""
    for program in (PROGRAMS / "crio", PROGRAMS / "pinns", CONMON):
        if not Path(program).exists():
            return "CRI-O (tools/setup test builds it)"
    if shutil.which("crictl") is None or not (PLUGINS / "bridge").exists():
        return "crictl and CNI's plugins (tools/setup test)"
    return ""


def version() -> str:
    """What CRI-O calls itself."""
    said = subprocess.run([PROGRAMS / "crio", "--version"], capture_output=True, text=True, check=True)
    return said.stdout.split()[2]


def runc_handler(directory: Path) -> str:
    """The lines of a configuration that make runc a runtime beside ours.

    Args:
        directory: Takes its program and what it keeps.
    """
    program = directory / "runc-here"
    program.write_text(_RUNC.format(runc=shutil.which("runc")))
    program.chmod(0o755)
    return f"""\
[crio.runtime.runtimes.runc]
runtime_type = "oci"
runtime_path = "{program}"
runtime_root = "{directory}/runc"
monitor_path = "{CONMON}"
monitor_cgroup = "pod"
"""


class Crio:
    """The daemon, in a network namespace of its own, and crictl.

    Args:
        directory: Made by the caller.
        guest: The guest's directory.
        busybox: An OCI layout.
        networks: The directory of its networks' configuration; its own without one.
        pause: An OCI layout of what a pod has as its first process; one of busybox's without it.
        more: Further lines of its configuration.

    Attributes:
        env: The daemon's environment.
        around: What is to be put before a command that has to see its network.
        default_runtime: What pods are made by that ask for no runtime, from the daemon's next start on.
    """

    def __init__(
        self,
        directory: Path,
        guest: Path,
        busybox: Path,
        networks: Path | None = None,
        pause: Path | None = None,
        more: str = "",
    ) -> None:
        self.directory = directory
        self.log = directory / "crio.log"
        self.run_dir = directory / "r"
        self.netns = f"ko{os.getpid()}"
        self.endpoint = f"unix://{directory}/c.sock"
        self.around = ["nsenter", f"--net=/run/netns/{self.netns}"]
        self.default_runtime = "kata"
        self.env = {
            **os.environ,
            "KATA_RUN_DIR": str(self.run_dir),
            "KATA_STATE_DIR": str(directory / "s"),
            "KATA_GUEST_DIR": str(guest),
        }
        self._daemon: subprocess.Popen[bytes] | None = None
        self._configure(networks or write_network(directory, "ko", "10.87.7.0/24"), more)
        if pause is None:
            # CRI-O ends it with TERM, as it does the containers, and has patience with who does not listen.
            waits = "trap 'exit 0' TERM; sleep 2147483647 & wait"
            pause = with_command(busybox, directory / "pause", "/bin/busybox", "sh", "-c", waits)
        for layout, name in ((busybox, BUSYBOX), (pause, PAUSE)):
            place = f"containers-storage:[overlay@{directory}/root+{directory}/runroot]{name}"
            policy = ["--policy", str(directory / "policy.json")]
            subprocess.run(["skopeo", *policy, "copy", "--quiet", f"oci:{layout}", place], check=True)

    def _configure(self, networks: Path, more: str) -> None:
        directory = self.directory
        # Without one it complains, on a terminal into the midst of what is looked at.
        (directory / "crictl.yaml").write_text(
            f"runtime-endpoint: {self.endpoint}\nimage-endpoint: {self.endpoint}\n"
        )
        (directory / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        shim = directory / "bin/containerd-shim-kata-v2"
        shim.parent.mkdir()
        shim.symlink_to(ROOT / "src/kata/__main__.py")
        # conmon calls a runtime without the daemon's environment.
        runtime = directory / "bin/kata-runtime"
        given = {name: value for name, value in self.env.items() if name.startswith("KATA_")}
        write_script(runtime, [ROOT / "src/kata/oci_runtime/__main__.py"], given)
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
cgroup_manager = "cgroupfs"
conmon_cgroup = "pod"
# CRI-O 1.34 makes them by nft.
disable_hostport_mapping = {"false" if shutil.which("nft") else "true"}
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
{more}"""
        )

    def make_namespace(self) -> None:
        """Make the network namespace."""
        subprocess.run(["ip", "netns", "add", self.netns], check=True)
        subprocess.run(["ip", "-n", self.netns, "link", "set", "lo", "up"], check=True)

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
                    "--default-runtime",
                    self.default_runtime,
                ],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(lambda: self.ask("version").returncode == 0, "CRI-O answers", self.log.read_text)

    @property
    def crashed(self) -> bool:
        """Whether the daemon has ended by itself."""
        return self._daemon is not None and self._daemon.poll() is not None

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

    def remove(self) -> None:
        """End the daemon, and remove all that it has made on the host, but for pods: nobody knows them then."""
        try:
            self.stop()
        finally:
            # CRI-O's own: it keeps the directory of its storage a mount, and where it has crashed, all of its pods'.
            with open("/proc/self/mountinfo") as file:
                places = [
                    place for line in file if (place := line.split()[4]).startswith(f"{self.directory}/")
                ]
            for place in reversed(places):
                subprocess.run(["umount", "--lazy", place], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "delete", self.netns], check=False)
            # With cgroups of version 1 it leaves those of its monitors.
            for parent, names, _ in os.walk("/sys/fs/cgroup"):  # others' may go meanwhile
                for name in names:
                    if name.startswith("crio-conmon-"):
                        with contextlib.suppress(OSError):
                            os.rmdir(f"{parent}/{name}")
            shutil.rmtree(self.directory, ignore_errors=True)

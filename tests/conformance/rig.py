"""Where critest runs: containerd with both runtimes, CNI, a registry on loopback, all in a network namespace."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import images
from cni_support import PLUGINS, write_network
from containerd_support import Containerd
from waiting import until

ROOT = Path(__file__).resolve().parents[2]
PORT = 5000
NAMES = ("registry.k8s.io", "k8s.gcr.io", "gcr.io")
"""The registries that critest asks."""
CRI = 'plugins."io.containerd.grpc.v1.cri"'


class Registry:
    """A registry on loopback, with critest's images.

    Args:
        directory: For what it stores.
        inside: What is executed in its network namespace goes through this.
    """

    def __init__(self, directory: Path, inside: list[str]) -> None:
        self.directory = directory
        self.inside = inside
        self._registry: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def start(self) -> None:
        """Start it, and bring the images into it.

        Raises:
            RuntimeError: A program is missing.
            subprocess.CalledProcessError: A step failed.
        """
        config = self.directory / "registry.yml"
        config.write_text(
            "version: 0.1\nlog: {level: error}\n"
            f"storage: {{filesystem: {{rootdirectory: {self.directory}/registry}}}}\n"
            f"http: {{addr: '127.0.0.1:{PORT}'}}\n"
        )
        self._log = open(self.directory / "registry.log", "wb")  # noqa: SIM115 - closed by stop
        self._registry = subprocess.Popen(
            [*self.inside, "docker-registry", "serve", str(config)], stdout=self._log, stderr=self._log
        )
        listens = [*self.inside, "ss", "-Hltn", f"sport = :{PORT}"]
        until(
            lambda: subprocess.run(listens, capture_output=True, check=True).stdout, "the registry listens"
        )
        with tempfile.TemporaryDirectory(dir=self.directory) as work:
            self._fill(Path(work))

    def _fill(self, work: Path) -> None:
        """Bring the images into the registry."""
        for number, (name, image) in enumerate(images.wanted(work).items()):
            layout = work / str(number)
            images.write(image, ROOT / "build/images/busybox", layout)
            _, _, path = name.partition("/")
            copy = ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}"]
            subprocess.run([*self.inside, *copy, f"docker://127.0.0.1:{PORT}/{path}"], check=True)
            shutil.rmtree(layout)

    def stop(self) -> None:
        """End it."""
        if self._registry is not None:
            self._registry.terminate()
            self._registry.wait(30)
        if self._log is not None:
            self._log.close()


class Rig:
    """Everything that critest needs besides itself.

    Args:
        directory: With a short path, empty.
        guest: The guest's directory.
        name: Of the network namespace; unique on this machine.
        second: Take containerd 2.
    """

    def __init__(self, directory: Path, guest: Path, name: str, *, second: bool = False) -> None:
        self.directory = directory
        self.netns = name
        self.inside = ["nsenter", f"--net=/run/netns/{name}"]
        self.daemon = Containerd(directory, guest, second=second)
        self.daemon.around = self.inside
        self.endpoint = f"unix://{self.daemon.socket}"
        self._registry = Registry(directory, self.inside)
        self._configure()

    def _configure(self) -> None:
        ports = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
        networks = write_network(self.directory, "kc", "10.89.7.0/24", ports, hairpinMode=True, ipMasq=True)
        for registry in NAMES:
            hosts = self.directory / "mirrors" / registry
            hosts.mkdir(parents=True)
            (hosts / "hosts.toml").write_text(
                f'server = "https://{registry}"\n[host."http://127.0.0.1:{PORT}"]\n'
                'capabilities = ["pull", "resolve"]\n'
            )
        self.daemon.configure(
            [],
            f"""
[{CRI}]
sandbox_image = "{images.PAUSE}"
restrict_oom_score_adj = true
[{CRI}.registry]
config_path = "{self.directory}/mirrors"
[{CRI}.cni]
bin_dir = "{PLUGINS}"
conf_dir = "{networks}"
[{CRI}.containerd]
default_runtime_name = "runc"
[{CRI}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[{CRI}.containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
privileged_without_host_devices = true
pod_annotations = ["io.katacontainers.*"]
""",
        )

    def start(self) -> None:
        """Start everything.

        Raises:
            RuntimeError: A program is missing.
            subprocess.CalledProcessError: A step failed.
        """
        subprocess.run(["ip", "netns", "add", self.netns], check=True)
        subprocess.run(["ip", "-n", self.netns, "link", "set", "lo", "up"], check=True)
        self._registry.start()
        self.daemon.start()

    def pull(self, image: str) -> None:
        """Have containerd fetch an image, as the CRI's clients would.

        Raises:
            subprocess.CalledProcessError: It could not.
        """
        crictl = ["crictl", "--timeout", "2m", "-r", self.endpoint, "-i", self.endpoint]
        subprocess.run([*self.inside, *crictl, "pull", image], check=True, capture_output=True)

    def stop(self) -> None:
        """End everything; what cannot be ended is said on standard error."""
        crictl = ["crictl", "--timeout", "2m", "-r", self.endpoint, "-i", self.endpoint]
        subprocess.run([*self.inside, *crictl, "rmp", "-a", "-f"], capture_output=True, check=False)
        left = self.daemon.sandboxes()
        if left:
            sys.stderr.write(f"sandboxes are left: {', '.join(left)}\n")
        self.daemon.stop()
        self._registry.stop()
        subprocess.run(["ip", "netns", "delete", self.netns], check=False)
